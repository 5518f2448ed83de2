"""How a data set of X-rays, ECGs and reports is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from heed_medical.more.network import MODALITIES

CHEXPERT = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
PTBXL_PROMPTS = {
    "NORM": "Normal ECG",
    "STTC": "ST T Change",
    "MI": "Myocardial Infarction",
    "HYP": "Hypertrophy",
    "CD": "Conduction Disturbance",
}


@dataclass(frozen=True, kw_only=True)
class MoreData:
    """How files become studies."""

    manifest: Path | None = None
    """The csv or jsonl with a study per row; default: manifest.csv, manifest.jsonl or labels.csv in
    the folder."""
    root: Path | None = None
    """Folder that the paths of the manifest start from; default: that of the manifest."""
    ptbxl_rate: Literal[100, 500] = 100
    """Which records of PTB-XL are read, in Hz."""
    modalities: tuple[str, ...] = ()
    """Which of xray, ecg, text are used; default: all that the training studies have."""
    labels: tuple[str, ...] = ()
    """Columns with findings (1 present, 0 absent); default: the names of CheXpert and PTB-XL."""
    prompts: tuple[str, ...] = ()
    """What each finding is asked with, in zero-shot classification: FINDING=TEXT, several texts
    apart by |; default: "FINDING is present"."""
    uncertain: Literal["absent", "present", "ignore"] = "ignore"
    """What a finding of -1 counts as."""
    missing_leads: Literal["error", "zero"] = "error"
    """What becomes of a lead that an ECG does not have."""
    ecg_part: Literal["first", "centre"] = "first"
    """Which part of a longer ECG is read."""
    equalise: bool = True
    """Whether the contrast of X-rays is made even (CLAHE)."""
    index: Path | None = None
    """Where predict looks for neighbours: an index, or a folder that an earlier predict wrote."""
    neighbours: int = 5
    """How many of them."""
    val_share: float = 0.1
    """Share of the subjects, or of the training subjects, that becomes the validation where the
    data have none."""
    split_seed: int = 0
    """Seed of the splits by subject that the data do not give; a fifth is the test where they give
    none."""
    cache_mb: int = 512
    """Prepared X-rays and ECGs are kept in memory up to this size."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a study that cannot be read."""

    def __post_init__(self) -> None:
        if unknown := set(self.modalities) - set(MODALITIES):
            raise ValueError(f"modalities must be of {', '.join(MODALITIES)}, got {unknown}")
        if not 0.0 < self.val_share < 0.5:
            raise ValueError(f"val_share must be above 0, below 0.5, got {self.val_share}")
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {self.neighbours}")
        if self.cache_mb < 0:
            raise ValueError(f"cache_mb must not be negative, got {self.cache_mb}")
        for prompt in self.prompts:
            finding, equals, text = prompt.partition("=")
            if not finding.strip() or not equals or not text.strip():
                raise ValueError(f"prompts must be FINDING=TEXT, got {prompt!r}")
        if self.labels and (unknown := self.asked - set(self.labels)):
            raise ValueError(
                f"prompts must be of the findings {', '.join(self.labels)}, got {unknown}"
            )

    @property
    def asked(self) -> set[str]:
        """The findings that `prompts` names."""
        return {prompt.partition("=")[0].strip() for prompt in self.prompts}

    def prompts_of(self, finding: str) -> tuple[str, ...]:
        """The texts that a finding is asked with."""
        for prompt in self.prompts:
            name, _, text = prompt.partition("=")
            if name.strip() == finding:
                return tuple(part.strip() for part in text.split("|") if part.strip())
        return (PTBXL_PROMPTS.get(finding, f"{finding} is present"),)
