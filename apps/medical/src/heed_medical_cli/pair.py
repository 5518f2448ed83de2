"""Pair MIMIC-CXR-JPG X-rays with MIMIC-IV-ECG records: the manifest that MoRE trains on.

CXR holds mimic-cxr-2.0.0-{metadata,split,chexpert}.csv(.gz) and files/; ECG holds record_list.csv,
machine_measurements.csv and files/. A frontal X-ray and an ECG of one subject at most --days apart
are a pair. An empty report is replaced by its CheXpert findings in words. No picture is read: check
does that.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from heed_core.errors import InputError
from heed_medical.more.pairing import (
    MOST_STATEMENTS,
    STATEMENTS,
    pair_mimic,
    write_manifest,
)
from heed_medical.splits import SPLITS
from heed_runtime.files import atomic_write, make_folder
from heed_runtime.options import CommonOptions, Flag, OptionalPath, OutPath
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The flags."""

    cxr: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CXR")]
    """The folder of MIMIC-CXR-JPG."""
    ecg: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ECG")]
    """The folder of MIMIC-IV-ECG."""
    out: OutPath
    """The manifest: a csv."""
    reports: OptionalPath = None
    """The folder with files/ of the reports of MIMIC-CXR. None: CXR."""
    days: int = 60
    """The most days between X-ray and ECG."""
    val_share: float = 0.02
    """Share of the training subjects that becomes validation beside the official ones."""
    seed: int = 42
    """Of their choice."""
    statements: int = STATEMENTS
    """How many of the machine's statements (report_0, ...) are the report of an ECG; 18 is all."""
    overwrite: Flag = False
    """Replace the file."""

    def __post_init__(self) -> None:
        if self.days < 0:
            raise ValueError(f"days must not be negative, got {self.days}")
        if not 0 <= self.val_share < 1:
            raise ValueError(f"val_share must be at least 0, below 1, got {self.val_share}")
        if not 1 <= self.statements <= MOST_STATEMENTS:
            raise ValueError(
                f"statements must be from 1 to {MOST_STATEMENTS}, got {self.statements}"
            )
        if self.out.suffix != ".csv":
            raise ValueError(f"out must be a .csv, got {self.out}")


def run(app: App, options: Options) -> Result:
    """Read the tables, pair, write.

    Raises:
        InputError: A table cannot be used, or there is no pair.
    """
    if options.out.exists() and not options.overwrite:
        raise InputError("is there already", path=options.out, remedy="add --overwrite")
    found = pair_mimic(
        options.cxr,
        options.ecg,
        out=options.out.parent,
        reports=options.reports,
        days=options.days,
        val_share=options.val_share,
        seed=options.seed,
        statements=options.statements,
    )
    make_folder(options.out.parent)
    with atomic_write(options.out) as path:
        write_manifest(found.rows, path)
    rows: list[Row] = []
    for split in SPLITS:
        inside = [row for row in found.rows if row["split"] == split]
        counts = {
            name: len({row[key] for row in inside})
            for name, key in (
                ("subjects", "subject_id"), ("X-rays", "xray_path"), ("ECGs", "ecg_path"),
            )
        }  # fmt: skip
        rows.append({"split": split, "pairs": len(inside), **counts})
    splits = Counter(row["split"] for row in found.rows)
    return Result(
        title=f"{len(found.rows)} pairs; {found.without_report} X-rays without a report",
        tables=[Table(title="", rows=rows)],
        data={"pairs": dict(splits), "splits": rows, "without_report": found.without_report},
        files=[options.out],
    )
