"""Writing the files of many cases into one folder, where other files may be already.

The folder's journal, a line of JSON per case, names the files of a case before the first of them is
put in place. So after a kill at any moment a case is done if all its files are there, and files of
a case that is not done are known to be ours.

The files are written in a folder of the process inside of that folder, and moved from there. The
process holds the lock beside it, which ends with the process however that ends: what a kill left is
removed by a later call that goes on or overwrites, what another process writes in now is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from heed_core.errors import InputError
from heed_runtime.files import ends, explain_oserror, make_folder, plain

JOURNAL = ".heed-predictions.jsonl"
ERRORS = "errors.jsonl"
"""A line of JSON for each case that was skipped."""
STAGING = ".tmp-outputs-"
"""Begins the names of the folders in which files are written before they are put in place."""
LOCK = ".lock"
"""Ends the name of the lock of such a folder, which lies beside it."""


class Outputs:
    """Puts each case's files in place whole, never over a file that was there unless allowed.

    Args:
        folder: Where the files go; made if absent.
        overwrite: Replace files that are there.
        maker: What makes the files (the hash of the weights); the journal is kept only with it.
        resume: Go on with what the same maker left, see `done`.
        inputs: Files and folders that are read. Nothing in them is replaced, but for what an
            earlier call wrote there.

    Example:
        >>> with Outputs(Path("out"), overwrite=False) as outputs:  # doctest: +SKIP
        ...     outputs.put("case 1", lambda folder: [write(folder)])
    """

    def __init__(
        self,
        folder: Path,
        *,
        overwrite: bool,
        maker: str | None = None,
        resume: bool = False,
        inputs: Iterable[Path] = (),
    ) -> None:
        self.folder, self.overwrite, self.maker = folder, overwrite, maker
        self._inputs = [path.resolve() for path in inputs]
        self._written = Written()
        self._owners: dict[Path, str] = {}
        self._temporary = Path()
        self._lock: FileLock | None = None
        self._tidy = overwrite or resume
        self._begun = _read_journal(folder / JOURNAL, maker) if resume else {}

    @property
    def done(self) -> frozenset[str]:
        """The cases whose files an earlier call of the same maker has put in place."""
        return frozenset(
            case
            for case, names in self._begun.items()
            if all((self.folder / name).is_file() for name in names)
        )

    def __enter__(self) -> Outputs:
        make_folder(self.folder)
        if self._tidy:
            _remove_left_over(self.folder)
        with explain_oserror(self.folder):
            self._temporary, self._lock = _make_staging(self.folder)
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        if self._lock is not None:
            _let_go(self._lock)

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
            if self.maker is not None:
                entry = {"case": case, "files": [str(name) for name in names], "by": self.maker}
                append_json(self.folder / JOURNAL, entry)
            for name in names:
                self._owners[name] = case
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._move(staging / name, target, replace=self._ours(name, case))
            shutil.rmtree(staging)
            return [self.folder / path.relative_to(staging) for path in written]

    def _ours(self, name: Path, case: str) -> bool:
        """Whether the file may be replaced: all may, or it is what a kill left of this case."""
        return self.overwrite or str(name) in self._begun.get(case, ())

    def _refuse(self, name: Path, case: str) -> None:
        target = self.folder / name
        if name in self._owners:
            raise InputError(
                f"would be written for {case!r} and for {self._owners[name]!r}",
                path=target,
                remedy="give inputs of different names, or call once for each",
            )
        if target.exists() and not self._ours(name, case):
            raise _exists(target, resumable=self.maker is not None)
        if target.exists() and self._is_input(target) and not self._written(target):
            raise InputError(
                "lies among the inputs and was not written by predict",
                path=target,
                remedy="choose another folder",
            )

    def _is_input(self, target: Path) -> bool:
        return any(end.is_relative_to(path) for end in ends(target) for path in self._inputs)

    def _move(self, source: Path, target: Path, *, replace: bool) -> None:
        if replace:
            source.replace(target)
            return
        try:
            os.link(source, target)  # unlike a rename, never replaces
        except FileExistsError:
            raise _exists(target, resumable=self.maker is not None) from None
        except OSError:  # a file system without links
            source.replace(target)


def _make_staging(folder: Path) -> tuple[Path, FileLock]:
    """A new folder for files of this process, and the lock that it holds for it."""
    staging = folder / f"{STAGING}{uuid.uuid4().hex}"
    lock = FileLock(staging.with_suffix(LOCK), timeout=0)
    with contextlib.suppress(NotImplementedError):  # no locks on this file system: never tidied up
        lock.acquire()
    staging.mkdir()
    return staging, lock


def _remove_left_over(folder: Path) -> None:
    """Remove what processes that are no more were writing in; a lock tells those that are."""
    for path in folder.glob(f"{STAGING}*{LOCK}"):
        lock = FileLock(path, timeout=0)
        with contextlib.suppress(OSError, NotImplementedError):  # Timeout is one: it is in use
            lock.acquire()
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            _let_go(lock)


def _let_go(lock: FileLock) -> None:
    """Release a lock and remove its file; no other process waits for it."""
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


def append_json(path: Path, entry: Mapping[str, object]) -> None:
    """Add one line of JSON to a file, in one write, so that processes do not mix their lines.

    Raises:
        InputError: The disk is full or the folder cannot be written.
    """
    line = json.dumps(plain(entry), ensure_ascii=False) + "\n"
    with explain_oserror(path.parent):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def _read_journal(path: Path, maker: str | None) -> dict[str, tuple[str, ...]]:
    """The files of each case that the maker began; a line that a kill cut short is no entry."""
    return {
        entry["case"]: tuple(entry["files"]) for entry in _entries(path) if entry["by"] == maker
    }


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a journal; none where there is none."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


class Written:
    """Tells the files that `predict` put in place, by the journals of the folders they lie in.

    Each journal is read once.

    Example:
        >>> Written()(Path("scans/000000.bin"))
        False
    """

    def __init__(self) -> None:
        self._folders: dict[Path, frozenset[Path]] = {}

    def __call__(self, path: Path) -> bool:
        """Whether the file is in a journal, whatever made it."""
        return any(path in self._written_into(folder) for folder in path.parents)

    def _written_into(self, folder: Path) -> frozenset[Path]:
        if folder not in self._folders:
            entries = _entries(folder / JOURNAL)
            self._folders[folder] = frozenset(
                folder / name for entry in entries for name in entry["files"]
            )
        return self._folders[folder]


def _exists(path: Path, *, resumable: bool) -> InputError:
    remedy = "add --overwrite or --resume" if resumable else "add --overwrite"
    return InputError("exists already", path=path, remedy=f"choose another folder or {remedy}")


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
