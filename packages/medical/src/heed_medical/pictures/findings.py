"""Findings of a picture as CheXpert and MIMIC-CXR give them: 1, 0, -1 (uncertain) or nothing."""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from heed_core.errors import InputError
from heed_medical.pictures.records import PictureFile
from heed_medical.pictures.settings import Blank, PictureData, Uncertain

Value = Literal["positive", "negative"] | None

_MIXED: dict[str, Value] = {
    **dict.fromkeys(("Atelectasis", "Edema", "Pleural Effusion"), "positive"),
    **dict.fromkeys(("Cardiomegaly", "Consolidation"), "negative"),
}
"""What an uncertain finding is best taken for (Irvin et al., CheXpert, arXiv 1901.07031)."""


@runtime_checkable
class Policy(Protocol):
    """What uncertain and blank findings count as; settings of data have it."""

    @property
    def uncertain(self) -> Uncertain:
        """Of -1."""

    @property
    def blank(self) -> Blank:
        """Of nothing."""


def finding_value(text: str, finding: str, data: Policy) -> Value:
    """What a cell says of a finding; None: to be left out.

    Raises:
        ValueError: It is not 1, 0, -1 or blank.

    Example:
        >>> finding_value("-1.0", "Edema", PictureData(uncertain="mixed"))
        'positive'
    """
    if text == "":
        return "negative" if data.blank == "negative" else None
    number = float(text)
    if number == -1:
        if data.uncertain == "mixed":
            return _MIXED.get(finding)
        return None if data.uncertain == "leave-out" else data.uncertain
    if number not in (0.0, 1.0):
        raise ValueError(f"must be 1, 0, -1 or blank, got {text!r}")
    return "positive" if number == 1.0 else "negative"


def findings_of(picture: PictureFile, data: PictureData) -> Float32[np.ndarray, " k"]:
    """The wanted findings of a picture: 1 present, 0 absent, NaN to be left out.

    Raises:
        InputError: A value is none.
    """
    labels = [finding_label(picture.columns[f], f, data, picture.place) for f in data.findings]
    return np.array([np.nan if x is None else x for x in labels], dtype=np.float32)


def finding_label(text: str, finding: str, data: Policy, place: str) -> int | None:
    """A cell of a table as a label: 1 present, 0 absent, None to be left out.

    Raises:
        InputError: It is not 1, 0, -1 or blank; `place` names it.
    """
    try:
        value = finding_value(text, finding, data)
    except ValueError:
        raise InputError(f"has {finding} = {text!r}, use 1, 0, -1 or blank", place=place) from None
    return None if value is None else int(value == "positive")


def unsure(pictures: Sequence[PictureFile], data: PictureData) -> list[str]:
    """A line for each finding that is uncertain or not mentioned in some of the pictures."""
    lines = [
        unsure_line(finding, [picture.columns[finding] for picture in pictures], data)
        for finding in data.findings
    ]
    return [line for line in lines if line]


def unsure_line(
    finding: str, texts: Sequence[str], data: Policy, *, cases: str = "pictures"
) -> str:
    """How often a finding is uncertain or not mentioned, and what it is taken for then.

    Args:
        finding: Its name.
        texts: What a table says of it in each case.
        data: The policy.
        cases: What the cases are called.

    Returns:
        One line; empty where every case is certain.
    """
    kinds: dict[str, list[str]] = {
        "uncertain": [text for text in texts if text and float(text) == -1],
        "not mentioned": [text for text in texts if not text],
    }
    parts = [
        f"{kind} in {len(found)} of {len(texts)} {cases} "
        f"({finding_value(found[0], finding, data) or 'left out'})"
        for kind, found in kinds.items()
        if found
    ]
    return f"{finding}: {', '.join(parts)}" if parts else ""
