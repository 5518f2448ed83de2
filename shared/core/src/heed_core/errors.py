"""The faults of a user's input, raised by every package in one shape.

A library raises; only a program prints. A program shows an `InputError` as the one line that `str`
gives.
"""

import re
from pathlib import Path

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
"""The codes by which a terminal changes its colours."""
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
"""Characters that break a line or command a terminal."""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    `str(error)` is one line: the file (and the place in it), what is wrong, and what to do.

    Args:
        problem: What is wrong, in plain words: what was found and what was expected.
        path: The file or folder at fault.
        place: Where in the file: a row, a key, a slice.
        remedy: What the user can do about it.

    Example:
        >>> print(InputError("has no column 'label'", path="train.csv", remedy="add the column"))
        train.csv: has no column 'label'; add the column
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | Path | None = None,
        place: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.problem, self.path, self.place, self.remedy = problem, path, place, remedy
        where = ", ".join(str(part) for part in (path, place) if part is not None)
        line = f"{where}: {problem}" if where else problem
        super().__init__(f"{line}; {remedy}" if remedy else line)

    def __str__(self) -> str:
        return _CONTROLS.sub(" ", super().__str__())  # what a damaged file holds breaks no line


class MissingExtra(ImportError):  # noqa: N818 (reads as what happened)
    """An optional dependency is needed and not installed; the message names the extra."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; install it with: pip install '{extra}'")


def reason_of(error: BaseException, path: str | Path | None = None) -> str:
    """What a library says of a fault, to be quoted in one line: at most 120 characters, no colours.

    Args:
        error: Of the library.
        path: Is left out, since the line that quotes names it already.

    Example:
        >>> reason_of(OSError("cannot read 'a.png'"), "a.png"), reason_of(EOFError())
        ('cannot read', 'EOFError')
    """
    text = next(iter(_ESCAPES.sub("", str(error)).strip().splitlines()), "")
    if path is not None:
        text = text.replace(str(path), "").strip(" '")
    return text[:120] or type(error).__name__
