"""Findings of a picture as CheXpert and MIMIC-CXR give them: 1, 0, -1 (uncertain) or nothing."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32

from heed_core.errors import InputError
from heed_medical.pictures.records import PictureFile
from heed_medical.pictures.settings import PictureData

Value = Literal["positive", "negative"] | None

_MIXED: dict[str, Value] = {
    **dict.fromkeys(("Atelectasis", "Edema", "Pleural Effusion"), "positive"),
    **dict.fromkeys(("Cardiomegaly", "Consolidation"), "negative"),
}
"""What an uncertain finding is best taken for (Irvin et al., CheXpert, arXiv 1901.07031)."""


def finding_value(text: str, finding: str, data: PictureData) -> Value:
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
    values = []
    for finding in data.findings:
        text = picture.columns[finding]
        try:
            value = finding_value(text, finding, data)
        except ValueError:
            raise InputError(
                f"has {finding} = {text!r}, use 1, 0, -1 or blank", place=picture.place
            ) from None
        values.append(np.nan if value is None else float(value == "positive"))
    return np.array(values, dtype=np.float32)


def unsure(pictures: Sequence[PictureFile], data: PictureData) -> list[str]:
    """A line for each finding that is uncertain or not mentioned in some of the pictures.

    Says how often, and what it is taken for.
    """
    lines = []
    for finding in data.findings:
        texts = [picture.columns[finding] for picture in pictures]
        kinds: dict[str, list[str]] = {
            "uncertain": [text for text in texts if text and float(text) == -1],
            "not mentioned": [text for text in texts if not text],
        }
        parts = [
            f"{kind} in {len(found)} of {len(texts)} pictures "
            f"({finding_value(found[0], finding, data) or 'left out'})"
            for kind, found in kinds.items()
            if found
        ]
        if parts:
            lines.append(f"{finding}: {', '.join(parts)}")
    return lines
