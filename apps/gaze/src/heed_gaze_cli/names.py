"""Names of cases and viewers, each once."""

from __future__ import annotations

from collections.abc import Sequence


def number_repeated(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that came before.

    Example:
        >>> number_repeated(["a", "b", "a"])
        ['a', 'b', 'a_2']
    """
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return found
