"""Tell that a data set is in another layout than the settings, as those of a run, say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from heed_core.errors import InputError


def other_layout(root: Path, said: str, detect: Callable[[], str]) -> InputError | None:
    """What to raise where nothing was found in a layout, if the data are in another one.

    Args:
        root: The data set.
        said: The layout of the settings; "auto" cannot be wrong.
        detect: Finds the layout by what lies in the folder, or raises `InputError`.

    Returns:
        The error; None where the layout is the right one, or none is known.
    """
    if said == "auto":
        return None
    try:
        seen = detect()
    except InputError:
        return None
    if seen == said:
        return None
    return InputError(
        f"is not in the layout {said}, it seems to be in the layout {seen}",
        path=root,
        remedy=f"add --data.layout {seen}",
    )
