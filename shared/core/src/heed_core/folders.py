"""The files under a folder, those behind links included, and names that tell files apart."""

from collections.abc import Sequence
from pathlib import Path

from heed_core.errors import InputError


def files_under(root: Path) -> list[Path]:
    """All files under a folder, sorted; hidden files and folders are left out.

    Links to folders are followed. One folder is entered once, by its own name where it has one
    under `root`, so links that lead in a circle or above `root` add nothing. A link to a file that
    is not there is listed: whoever reads it says so.

    Raises:
        InputError: A folder cannot be opened; a link without a suffix of letters, such as a
            folder's, leads nowhere.
    """
    home = root.resolve()
    seen: set[Path] = set()
    files: list[Path] = []
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = folder.resolve()
        if real in seen or (real != home and home.is_relative_to(real)):
            continue
        seen.add(real)
        for path in _entries(folder):
            if not path.is_dir():
                files.append(path)
                if not path.suffix[1:].strip("0123456789"):
                    refuse_broken_link(path)
            elif path.is_symlink():
                links.append(path)
            else:
                folders.append(path)
    return sorted(files)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except PermissionError:
        raise InputError(
            "cannot be opened", path=folder, remedy="check the rights of this folder"
        ) from None


def refuse_broken_link(path: Path) -> None:
    """Name a link that leads nowhere.

    Raises:
        InputError: It is one.
    """
    if is_broken_link(path):
        raise InputError(
            f"is a link to {path.readlink()}, which does not exist",
            path=path,
            remedy="repair or remove the link",
        )


def is_broken_link(path: Path) -> bool:
    """Whether a path is a link that leads nowhere."""
    return path.is_symlink() and not path.exists()


def unique_names(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Tell equal names apart: by the folders above their files, or else by a number.

    Example:
        >>> unique_names(["s", "s", "t"], [Path("/a/s.h5"), Path("/b/s.h5"), Path("/b/t.h5")])
        ['a/s', 'b/s', 't']
    """
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    found = list(names)
    for name, members in groups.items():
        if len(members) == 1:
            continue
        above = [paths[index].parent.resolve().parts[1:] for index in members]
        depth = 0
        while len({_last(parts, depth) for parts in above}) < len(set(above)):
            depth += 1
        for index, parts in zip(members, above, strict=True):
            found[index] = "/".join([*_last(parts, depth), name])
    taken: set[str] = set()
    for index, name in enumerate(found):
        number = 1
        while found[index] in taken:
            number += 1
            found[index] = f"{name}_{number}"
        taken.add(found[index])
    return found


def _last(parts: tuple[str, ...], count: int) -> tuple[str, ...]:
    return parts[max(len(parts) - count, 0) :]
