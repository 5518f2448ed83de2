"""Tell a training what its data leave out, and which patients its splits share."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

_SHOWN = 3


def warn_of_leaks(root: Path, splits_of: Mapping[str, Sequence[str]]) -> None:
    """Log one line that names patients who are in more than one split; nothing without any.

    Args:
        root: The data set.
        splits_of: Patient -> the splits that he or she is in, of those in several.
    """
    if not splits_of:
        return
    named = [f"{patient} in {' and '.join(splits)}" for patient, splits in splits_of.items()]
    more = ", ..." if len(named) > _SHOWN else ""
    logger.warning(
        "%s: patients in several splits (%d): %s%s; the scores will be too good, check lists them",
        root,
        len(named),
        ", ".join(named[:_SHOWN]),
        more,
    )


def warn_of_left_out(lines: Sequence[str]) -> None:
    """Log what a list leaves out of a data set, a line for each reason."""
    for line in lines:
        logger.warning("%s", line)
