"""Which files lie in a folder, and names that tell files of several folders apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def files_under(folder: Path) -> list[Path]:
    """All files in a folder and its sub-folders, sorted; names that begin with a dot are left out.

    Links to folders are followed. A folder that is reached in several ways counts once, under its
    own place rather than that of a link.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    starts = [folder]
    for start in starts:  # grows by the links that are met
        for here, folders, names in os.walk(start):
            place = Path(here)
            real = place.resolve()
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += [place / name for name in folders if (place / name).is_symlink()]
            found += [place / name for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


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
