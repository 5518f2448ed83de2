"""The settings of studies: which files hold pictures and reports, how both become numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from heed_medical.reports.words import UNKNOWN, Dialect

Layout = Literal["auto", "r2gen", "table", "openi", "kaggle", "mimic"]
Section = Literal["findings", "impression"]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """How files become pictures and reports.

    Fields that are `auto` or empty are settled by `plan_reports`.
    """

    layout: Layout = "auto"
    """How the folder is laid out. r2gen: annotation.json and images/; table: a csv or jsonl with a
    row per picture; openi: ecgen-radiology/*.xml; kaggle: indiana_reports.csv; mimic:
    mimic-cxr-2.0.0-split.csv."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a broken study does: stop, or be skipped, counted and listed."""
    annotation: str = ""
    """The json or table, relative to the data. Empty: annotation.json, or the only table."""
    images: str = ""
    """The folder of the pictures, relative to the data. Empty: the usual one of the layout."""
    sections: tuple[Section, ...] = ("findings",)
    """Parts of raw reports (openi, kaggle, mimic) that are learnt."""
    views: int = 2
    """Pictures of a study that are read, in the order of the data; 2 for IU X-Ray, 1 for MIMIC."""
    lone: Literal["duplicate", "mask"] = "duplicate"
    """What a study with too few pictures does: repeat its last one, or leave views out."""
    pictures: Literal["needed", "ignored"] = "needed"
    """ignored: the network is shown no picture at all, for studies without any; what it then
    writes tells how far words alone lead."""
    dialect: Dialect = "iu"
    """Cleaning of reports: iu, or mimic (line breaks and ___)."""
    threshold: int = 3
    """Times that a word must occur in the training reports; 10 for MIMIC-CXR."""
    most_words: int = 60
    """Numbers of a report, begin and end included, and words that are written; 100 for MIMIC."""
    vocabulary: tuple[str, ...] = ()
    """The words in order. Empty: those of the training reports."""
    resize: int = 256
    """Shorter side of training pictures, of which a square of `size` is cut out."""
    size: int = 224
    """Height and width that the network sees."""
    val_share: float = 0.1
    """Share of the studies that becomes validation where the data give no splits."""
    test_share: float = 0.2
    """Share of the studies that becomes the test where the data give no splits."""
    split_seed: int = 0
    """Seed of the splits that the data do not give."""
    beam: int = 3
    """Beams that reports are written with; 1 is greedy."""
    trigram_penalty: float = 0.0
    """Taken off the log-probability of a word for each time that it followed the same two words
    earlier in the report. 1.386 (2 ln 2) with one beam is R2Gen's greedy decoding."""
    protocol: Literal["r2gen", "full"] = "r2gen"
    """References of scores. r2gen: rare words are <unk> and long reports cut, as in training; full:
    cleaned only. Several points lie between them."""
    write: tuple[Literal["json", "txt", "csv"], ...] = ("json", "txt")
    """What predict writes: all, the text, a row per word."""
    truth_findings: Path | None = None
    """A labeller's csv of the reference reports, for clinical efficacy in evaluate; rows are paired
    by id, study_id, image_id or case, or by their order where neither file has such a column."""
    found_findings: Path | None = None
    """A labeller's csv of the generated reports, for clinical efficacy in evaluate."""
    meteor_jar: Path | None = None
    """meteor-1.5.jar, for METEOR in evaluate; METEOR-es needs none."""

    def __post_init__(self) -> None:
        for name in ("views", "threshold", "beam"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.trigram_penalty < float("inf"):
            raise ValueError(f"trigram_penalty must not be negative, got {self.trigram_penalty}")
        if self.most_words < 3:
            raise ValueError(f"most_words must be at least 3, got {self.most_words}")
        if not 8 <= self.size <= self.resize:
            raise ValueError(
                f"size must be at least 8 and at most resize={self.resize}, got {self.size}"
            )
        for name in ("val_share", "test_share"):
            if not 0.0 < getattr(self, name) < 0.5:
                raise ValueError(f"{name} must be above 0, below 0.5, got {getattr(self, name)}")
        if not self.sections or len(set(self.sections)) < len(self.sections):
            raise ValueError(f"sections must be one or more different ones, got {self.sections}")
        if not self.write:
            raise ValueError("write must name json, txt or csv, got nothing")
        if self.vocabulary and UNKNOWN not in self.vocabulary:
            raise ValueError(f"vocabulary must hold {UNKNOWN}")
        if (self.truth_findings is None) != (self.found_findings is None):
            raise ValueError("truth_findings and found_findings have an effect together only")
