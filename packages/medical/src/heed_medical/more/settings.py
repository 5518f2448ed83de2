"""How a data set of X-rays, ECGs and reports is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from heed_medical.more.attribution import Relevance
from heed_medical.more.network import MODALITIES
from heed_medical.pictures.settings import Blank, Uncertain

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
    apart by |, of which the nearest counts; default: "FINDING is present"."""
    denials: tuple[str, ...] = ()
    """What a finding is denied with, in the same form: the cosine with the nearest is taken off
    that with the nearest prompt."""
    contrast: bool = False
    """Whether findings of CheXpert that neither of these names are denied with "no FINDING", as in
    CheXzero. Off, because it misleads where the reports of the training deny nothing, as those that
    are written of findings."""
    prompt_file: Path | None = None
    """A csv or jsonl with the columns finding, prompt, denial, of which a finding may have several
    rows."""
    uncertain: Uncertain = "leave-out"
    """What a finding of -1 counts as. mixed: positive for Atelectasis, Edema and Pleural Effusion,
    negative for Cardiomegaly and Consolidation, left out for others."""
    blank: Blank = "negative"
    """What a finding that is not mentioned counts as."""
    missing_leads: Literal["error", "zero"] = "error"
    """What becomes of a lead that an ECG does not have."""
    ecg_part: Literal["first", "centre"] = "first"
    """Which part of a longer ECG is read."""
    equalise: bool = True
    """Whether the contrast of X-rays is made even (CLAHE)."""
    relevance: Relevance = "centred"
    """What explain calls relevant. centred: without what all keys of a query share, which makes
    maps even; published: with it, as Chefer et al. have it."""
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
        for name in ("prompts", "denials"):
            _check_prompts(getattr(self, name), name)
        if self.labels and (unknown := self.asked - set(self.labels)):
            raise ValueError(
                f"prompts and denials must be of the findings {', '.join(self.labels)}, got "
                f"{min(unknown)!r}"
            )

    @property
    def asked(self) -> set[str]:
        """The findings that `prompts` and `denials` name."""
        return set(_by_finding(self.prompts)) | set(_by_finding(self.denials))

    def prompts_of(self, finding: str) -> tuple[str, ...]:
        """The texts that a finding is asked with."""
        default = (PTBXL_PROMPTS.get(finding, f"{finding} is present"),)
        return _by_finding(self.prompts).get(finding, default)

    def denials_of(self, finding: str) -> tuple[str, ...]:
        """The texts that a finding is denied with; none where only the prompts count."""
        plain = self.contrast and finding in CHEXPERT[1:] and finding not in self.asked
        default = (f"no {finding}",) if plain else ()
        return _by_finding(self.denials).get(finding, default)


def _by_finding(prompts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`FINDING=TEXT|TEXT` -> the texts of each finding."""
    found = {}
    for prompt in prompts:
        name, _, text = prompt.partition("=")
        found[name.strip()] = tuple(part.strip() for part in text.split("|") if part.strip())
    return found


def _check_prompts(prompts: Sequence[str], name: str) -> None:
    for prompt in prompts:
        finding, equals, _ = prompt.partition("=")
        if not finding.strip() or not equals or not all(_by_finding([prompt]).values()):
            raise ValueError(f"{name} must be FINDING=TEXT, got {prompt!r}")
    findings = Counter(prompt.partition("=")[0].strip() for prompt in prompts)
    if twice := [finding for finding, count in findings.items() if count > 1]:
        raise ValueError(f"{name} name {twice[0]!r} twice; put several texts apart by |")
