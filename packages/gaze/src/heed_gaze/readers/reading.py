"""Read scanpaths from whatever file or folder they are in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from heed_core.errors import InputError
from heed_gaze.readers.neutral import read_neutral_csv, read_neutral_json
from heed_gaze.readers.trials import ReadOptions, collect
from heed_gaze.scanpaths import ScanpathSet


def read_scanpaths(path: Path, options: ReadOptions | None = None) -> ScanpathSet:
    """Read a data set or a prediction; its layout is recognised.

    Args:
        path: A file or a folder.
        options: What is done with what is wrong.

    Raises:
        InputError: Nothing that is known, or it cannot be used.
    """
    options = options or ReadOptions()
    if not path.exists():
        raise InputError("no such file or folder", path=path, remedy="check the path")
    if path.suffix.lower() == ".csv":
        return collect(read_neutral_csv(path), options, path=path, layout="neutral CSV")
    document = load_json(path)
    if isinstance(document, Mapping) and "scanpaths" in document:
        trials = read_neutral_json(path, document)
        return collect(trials, options, path=path, layout="neutral JSON")
    raise InputError("is not a file of scanpaths that is known", path=path)


def load_json(path: Path) -> object:
    """The document of a JSON file.

    Raises:
        InputError: It is empty, truncated or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"is no whole JSON file ({error})", path=path, remedy="get the file again"
        ) from None
