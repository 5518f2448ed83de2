"""What a verb reads stays, wherever it is told to write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from heed_core.errors import InputError
from heed_runtime.files import refuse_existing


def refuse_replacing(out: Path | None, used: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse a folder for results that holds something, before any work is done.

    Args:
        out: The folder; None: nothing is written.
        used: Files that are read.
        overwrite: Whether the folder may be replaced; never one with a file that is read in it.

    Raises:
        InputError: It names a file that would be lost, or the folder is not to be replaced.
    """
    if out is None:
        return
    folder = out.resolve()
    for path in used:
        places = (path.resolve(), path.parent.resolve() / path.name)  # of a link: both ends
        if any(place.is_relative_to(folder) for place in places):
            raise InputError(
                f"holds files that are read here ({path})",
                path=out,
                remedy="choose another folder for --out",
            )
    refuse_existing(out, overwrite=overwrite)
