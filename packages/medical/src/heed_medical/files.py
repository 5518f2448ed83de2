"""Names that tell files of several folders apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


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
