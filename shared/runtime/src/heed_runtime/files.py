"""Writing files so that a kill at any moment leaves the old or the new one, never half of it."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from heed_core.errors import InputError

_REMEDIES = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EFBIG: ("the file is larger than allowed", "raise the limit or choose another folder"),
    errno.EACCES: ("no permission to write here", "choose a folder that you may write to"),
    errno.EPERM: ("no permission to write here", "choose a folder that you may write to"),
    errno.EROFS: ("the file system is read-only", "choose a folder that you may write to"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another folder"),
    errno.ENOTEMPTY: ("another program wrote here meanwhile", "choose another folder"),
    errno.ENAMETOOLONG: ("the path is too long", "choose a shorter one"),
}


@contextlib.contextmanager
def explain_oserror(folder: Path) -> Iterator[None]:
    """Turn the failures of a disk (full, read-only, not ours) into an `InputError` on `folder`.

    Any other `OSError` passes unchanged, and so does one that names a file elsewhere.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES or not _concerns(folder, error.filename):
            raise
        problem, remedy = _REMEDIES[error.errno]
        raise InputError(f"cannot write: {problem}", path=folder, remedy=remedy) from error


def make_folder(path: Path) -> Path:
    """Make a folder and its parents; raises `InputError` where that cannot be done."""
    with explain_oserror(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise InputError(
                "is a file, a folder is needed", path=path, remedy="choose another path"
            ) from None
    return path


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    r"""Give a temporary path beside `path`; what was written there becomes `path` at the end.

    The temporary file keeps the suffixes of `path` (writers choose their format by them) and is
    removed if the body raises. Parent folders are made.

    Raises:
        InputError: The folder cannot be written or the disk is full.

    Example:
        >>> with atomic_write(Path("scores.csv")) as temporary:  # doctest: +SKIP
        ...     temporary.write_text("case,dice\n")
    """
    folder = make_folder(path.parent)
    with explain_oserror(folder):
        temporary = _temporary(path)
        try:
            temporary.chmod(0o666 & ~_umask())
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(folder)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(
    path: Path, *, overwrite: bool = False, used: Iterable[Path | None] = ()
) -> Iterator[Path]:
    """Give a temporary folder beside `path`; it becomes `path` at the end.

    A body that raises leaves nothing behind, and an old folder as it was.

    Args:
        path: The folder to make. It may exist when empty.
        overwrite: Replace a folder that holds something.
        used: As of `refuse_existing`.

    Raises:
        InputError: `path` holds something that may not be replaced, or it cannot be written.
    """
    refuse_existing(path, overwrite=overwrite, used=used)
    path = path.resolve()
    parent = make_folder(path.parent)
    with explain_oserror(parent):
        temporary = _temporary(path, folder=True)
        old = temporary.with_name(temporary.name + "-old")
        try:
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            if overwrite and path.exists():
                path.rename(old)
            _rename_folder(temporary, path)
            _sync(parent)
        finally:
            if not path.exists() and old.exists():
                old.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _rename_folder(source: Path, path: Path) -> None:
    """Rename over an empty folder at most, never over one that holds something."""
    try:
        source.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise InputError(
            "another program wrote here meanwhile", path=path, remedy="choose another folder"
        ) from None


def _temporary(path: Path, *, folder: bool = False) -> Path:
    """Make an empty file or folder beside `path` that keeps its suffixes."""
    prefix, suffix = ".tmp-", f"-{path.name}"
    try:
        if folder:
            return Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=path.parent))
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
    except FileNotFoundError:
        raise InputError(
            "nothing can be made in this folder", path=path.parent, remedy="choose another one"
        ) from None
    os.close(handle)
    return Path(name)


def refuse_existing(path: Path, *, overwrite: bool, used: Iterable[Path | None] = ()) -> None:
    """Refuse a folder for results that holds something, before any work is done.

    Args:
        path: The folder.
        overwrite: Whether it may be replaced.
        used: Files and folders that are read: a folder with one of them is never replaced.

    Raises:
        InputError: `path` is a file, or holds something and is not to be replaced, or is the
            working directory or a parent of it, which cannot be replaced.
    """
    with explain_oserror(path):
        folder, exists = path.resolve(), path.exists()
    for one in used:
        if one is not None and any(end.is_relative_to(folder) for end in ends(one)):
            raise InputError(
                f"holds files that are read here ({one})",
                path=path,
                remedy="choose another folder",
            )
    if path.is_dir():
        if not overwrite and any(path.iterdir()):
            what = "holds a run" if (path / "config.yaml").exists() else "is not empty"
            raise InputError(what, path=path, remedy="choose another folder or add --overwrite")
    elif exists:
        raise InputError("is a file, a folder is needed", path=path, remedy="choose another path")
    if Path.cwd().is_relative_to(folder):
        raise InputError(
            "is the folder that you are in, which cannot be replaced",
            path=path,
            remedy="name another one",
        )


def ends(path: Path) -> tuple[Path, Path]:
    """Where a path leads, and, of a link, where the link itself lies."""
    return path.resolve(), path.parent.resolve() / path.name


def write_text(path: Path, text: str) -> Path:
    """Write `text` (UTF-8) as a whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, data: object) -> Path:
    """Write one JSON document; NaN and infinity become null."""
    return write_text(path, to_json(data) + "\n")


def write_yaml(path: Path, data: object, *, comment: str = "") -> Path:
    """Write plain data as YAML, keys in the given order, below lines of `comment`."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return write_text(path, head + yaml.safe_dump(plain(data), sort_keys=False, width=100))


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write a table; the columns are the union of the rows' keys, None and NaN are empty fields."""
    return write_text(path, to_csv(rows))


def to_json(data: object) -> str:
    """One JSON document, indented; NaN and infinity become null, paths and arrays plain values."""
    return json.dumps(plain(data), indent=2, allow_nan=False, ensure_ascii=False)


def to_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """A table as text; see `write_csv`."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = {key: plain(value) for key, value in row.items()}
        writer.writerow({key: "" if value is None else value for key, value in values.items()})
    return text.getvalue()


def plain(data: object) -> object:
    """Reduce to what JSON and YAML know: numpy scalars and arrays, tensors, paths, tuples, NaN."""
    if data is None or isinstance(data, bool | int | str):
        return data
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    if isinstance(data, Mapping):
        return {str(plain(key)): plain(value) for key, value in data.items()}
    if hasattr(data, "tolist"):
        return plain(data.tolist())
    if isinstance(data, Sequence | set | frozenset):
        return [plain(item) for item in data]
    raise TypeError(f"cannot be written as JSON or YAML: {type(data).__name__}")


def _concerns(folder: Path, name: object) -> bool:
    """Whether a fault is in the folder or a parent of it; a write to an open file names no file."""
    if not isinstance(name, str):
        return True
    here, there = folder.resolve(), Path(name).resolve()
    return here.is_relative_to(there) or there.is_relative_to(here)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
