"""Writing the files of many cases into one folder, where other files may be already."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from heed_core.errors import InputError
from heed_runtime.files import explain_oserror, make_folder


class Outputs:
    """Puts each case's files in place whole, never over a file that was there unless allowed.

    Args:
        folder: Where the files go; made if absent.
        overwrite: Replace files that are there.

    Example:
        >>> with Outputs(Path("out"), overwrite=False) as outputs:  # doctest: +SKIP
        ...     outputs.put("case 1", lambda folder: [write(folder)])
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self.folder, self.overwrite = folder, overwrite
        self._owners: dict[Path, str] = {}
        self._temporary = Path()

    def __enter__(self) -> Outputs:
        make_folder(self.folder)
        with explain_oserror(self.folder):
            self._temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.folder))
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def put(self, case: str, write: Callable[[Path], list[Path]]) -> list[Path]:
        """Let `write` write the files of a case into an empty folder, then put them in place.

        Raises:
            InputError: A file is there already, another case has the same files, the disk is full.
        """
        with explain_oserror(self.folder):
            staging = Path(tempfile.mkdtemp(dir=self._temporary))
            written = write(staging)
            # What a reader needs beside the named files (a volume's raw data) moves with them.
            names = sorted(
                path.relative_to(staging) for path in staging.rglob("*") if path.is_file()
            )
            for name in names:
                self._refuse(name, case)
            for name in names:
                self._owners[name] = case
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._move(staging / name, target)
            return [self.folder / path.relative_to(staging) for path in written]

    def _refuse(self, name: Path, case: str) -> None:
        target = self.folder / name
        if name in self._owners:
            raise InputError(
                f"would be written for {case!r} and for {self._owners[name]!r}",
                path=target,
                remedy="give inputs of different names, or call once for each",
            )
        if target.exists() and not self.overwrite:
            raise _exists(target)

    def _move(self, source: Path, target: Path) -> None:
        if self.overwrite:
            source.replace(target)
            return
        try:
            os.link(source, target)  # unlike a rename, never replaces
        except FileExistsError:
            raise _exists(target) from None
        except OSError:  # a file system without links
            source.replace(target)


def _exists(path: Path) -> InputError:
    return InputError(
        "exists already", path=path, remedy="choose another folder or add --overwrite"
    )


def expand(paths: tuple[Path, ...]) -> list[Path]:
    """Files and folders as given; a pattern that the shell left as it is becomes what it matches.

    Raises:
        InputError: A path does not exist, or a pattern matches nothing.
    """
    found: list[Path] = []
    for path in paths:
        if path.exists():
            found.append(path)
            continue
        if not any(sign in str(path) for sign in "*?["):
            raise InputError("no such file or folder", path=path, remedy="check the path")
        anchor = Path(path.anchor) if path.anchor else Path()
        pattern = str(path.relative_to(path.anchor)) if path.anchor else str(path)
        matches = sorted(anchor.glob(pattern))
        if not matches:
            raise InputError("the pattern matches no file", path=path, remedy="check the pattern")
        found += matches
    return list(dict.fromkeys(found))
