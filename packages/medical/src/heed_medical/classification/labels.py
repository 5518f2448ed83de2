"""Labels that are meant to be one class, and are written in several ways."""

from collections.abc import Iterable
from pathlib import Path

from heed_core.errors import InputError


def look_alikes(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels that differ in case, blanks or the notation of a number alone; empty: there are none.

    Example:
        >>> look_alikes(["0", "1", "0.0"])
        ('0', '0.0')
        >>> look_alikes(["mild", "moderate"])
        ()
    """
    groups: dict[str, set[str]] = {}
    for label in labels:
        groups.setdefault(_plain(label), set()).add(label)
    twins = [sorted(group) for _, group in sorted(groups.items()) if len(group) > 1]
    return tuple(twins[0]) if twins else ()


def refuse_look_alikes(labels: Iterable[str], root: Path) -> None:
    """Refuse to make classes of labels that look like one.

    Args:
        labels: Of a data set.
        root: The data set.

    Raises:
        InputError: Some differ in their notation alone.
    """
    if twins := look_alikes(labels):
        raise InputError(
            f"has the labels {' and '.join(map(repr, twins))}, which look like one class",
            path=root,
            remedy="write them alike, or name the classes with --data.classes",
        )


def _plain(label: str) -> str:
    text = " ".join(label.casefold().split())
    try:
        return text if "_" in text else repr(float(text))
    except ValueError:
        return text
