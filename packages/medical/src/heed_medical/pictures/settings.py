"""The settings of labelled pictures: which files, which labels, what size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Layout = Literal["auto", "table", "covidx", "rsna", "chexpert", "mimic", "folders"]
Balance = Literal["none", "classes", "positive"]
Uncertain = Literal["leave-out", "positive", "negative", "mixed"]
Blank = Literal["negative", "leave-out"]


@dataclass(frozen=True, kw_only=True)
class PictureData:
    """How files become pictures and labels.

    Fields that are `auto` or empty are settled by `plan_pictures`.
    """

    layout: Layout = "auto"
    """How the folder is laid out. table: a csv or jsonl with a row per picture; covidx:
    {train,test}_COVIDx*.txt; rsna: stage_2_train_labels.csv; chexpert: train.csv and valid.csv;
    mimic: mimic-cxr-2.0.0-*.csv.gz; folders: {train,val,test}/CLASS/."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a broken picture or row does: stop, or be skipped, counted and listed."""
    table: str = ""
    """The csv or jsonl of the layout table, relative to the data; in COVIDx the end of the lists'
    names, such as 9B; in MIMIC the labeller, chexpert or negbio. Empty: the one there is, or
    chexpert."""
    label: str = ""
    """The column of the labels; in CheXpert and MIMIC the finding, in RSNA Target, or class for its
    three classes. Empty: label; Pneumonia; Target."""
    classes: tuple[str, ...] = ()
    """The classes in order; the second of two, or the last, is the positive one. Empty: those of
    the training pictures."""
    only: tuple[str, ...] = ()
    """Keep the rows of a table with these values, each column=value; several values of one column
    are alternatives."""
    findings: tuple[str, ...] = ()
    """Columns with 1, 0, -1 or nothing, of which a picture may have several: instead of one class
    (table, CheXpert, MIMIC). Empty: one class each."""
    uncertain: Uncertain = "leave-out"
    """What -1 means in CheXpert and MIMIC. mixed: positive for Atelectasis, Edema and Pleural
    Effusion, negative for Cardiomegaly and Consolidation, left out for others."""
    blank: Blank = "negative"
    """What a finding that is not mentioned means in CheXpert and MIMIC."""
    views: Literal["frontal", "all"] = "frontal"
    """Which views of CheXpert and MIMIC are read."""
    size: tuple[int, int] = (480, 480)
    """Height and width that pictures are resized to, without cropping."""
    window: tuple[float, float] | None = None
    """Values that become black and white. None: 0 and 255 of 8-bit pictures, lowest and highest
    value of others (16-bit, DICOM)."""
    voi: bool = False
    """Show DICOM images by the window or table (VOI) that they store, where they store one."""
    balance: Balance = "none"
    """What a training sample is. none: one picture; classes: one picture of each class; positive:
    one of the last class and one of all others. Then a batch of 4 samples of two classes is 8
    pictures, half of each, none twice. An epoch shows the rarest class once with classes, and half
    of the others with positive, as that of COVID-Net."""
    val_share: float = 0.1
    """Share of the training patients that becomes the validation where the data have none."""
    split_seed: int = 0
    """Seed of the splits that the data do not give."""

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size must be two positive numbers, got {self.size}")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError(f"window must be (low, high) with low < high, got {self.window}")
        if self.window is not None and self.voi:
            raise ValueError("voi has no effect with a window of your own")
        if not 0.0 < self.val_share < 1.0:
            raise ValueError(f"val_share must be above 0 and below 1, got {self.val_share}")
        if len(set(self.classes)) < len(self.classes) or len(self.classes) == 1:
            raise ValueError(f"classes must be two or more different names, got {self.classes}")
        if len(set(self.findings)) < len(self.findings):
            raise ValueError(f"findings must be different names, got {self.findings}")
        if self.findings and (self.classes or self.label or self.balance != "none"):
            raise ValueError("classes, label and balance have no effect with findings")
        parse_only(self.only)


def parse_only(conditions: Sequence[str]) -> dict[str, set[str]]:
    """Conditions by column -> the values that are kept.

    Raises:
        ValueError: A condition without a column or a value.

    Example:
        >>> sorted(parse_only(["label=a", "label=b"])["label"])
        ['a', 'b']
    """
    kept: dict[str, set[str]] = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not column or not equals:
            raise ValueError(f"only must be column=value, got {condition!r}")
        kept.setdefault(column.strip(), set()).add(value.strip())
    return kept
