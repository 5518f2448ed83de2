"""Read a whole data set of studies and report everything that is broken or treacherous."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heed_core.errors import InputError
from heed_medical.ecg.reading import read_ecg
from heed_medical.ecg.signals import RATE_HZ
from heed_medical.more.gaps import least_s
from heed_medical.more.network import MODALITIES
from heed_medical.more.settings import MoreData
from heed_medical.more.studies import (
    StudyFile,
    clean_report,
    list_studies,
    subjects_in_several_splits,
    unknown_splits,
)
from heed_medical.pictures.findings import unsure_line
from heed_medical.pictures.reading import read_grey
from heed_medical.splits import SPLITS

CountRow = Mapping[str, str | int | float | None]


@dataclass(frozen=True, kw_only=True)
class StudyCheck:
    """What a data set holds and what is wrong with it."""

    counts: Sequence[CountRow]
    """A row per split: studies, subjects, how many have what, positive findings."""
    problems: Sequence[str]
    warnings: Sequence[str]


def check_studies(data: MoreData, root: Path, *, samples: int = 1000) -> StudyCheck:
    """Read every file of every study; whatever is wrong becomes a line.

    Args:
        data: How to read.
        root: The data set.
        samples: Samples that an ECG needs at 100 Hz; shorter ones are told.
    """
    try:
        listing = list_studies(root, data)
    except InputError as error:
        return StudyCheck(counts=(), problems=(str(error),), warnings=())
    studies, problems, warnings = listing.studies, list(listing.problems), []
    if listing.drawn:
        lacking = "splits; they are" if "train" in listing.drawn else "val split; it is"
        warnings.append(f"{root}: gives no {lacking} drawn by subject (seed {data.split_seed})")
    problems += unknown_splits(studies)
    given = {study.split for study in studies}
    if "train" in given and "val" not in given:
        problems.append(f"{root}: has no study of the split 'val', and one subject to draw it from")
    for path in dict.fromkeys(s.xray for s in studies if s.xray):
        try:
            read_grey(path)
        except InputError as error:
            problems.append(str(error))
    for path in dict.fromkeys(s.ecg for s in studies if s.ecg):
        try:
            warnings += _odd_ecg(path, data, samples)
        except InputError as error:
            problems.append(str(error))
    problems += [
        f"{root}: subject {subject} is in the splits {' and '.join(splits)}; keep all studies of a "
        f"subject in one split"
        for subject, splits in subjects_in_several_splits(studies).items()
    ]
    empty = [s for s in studies if not any(map(clean_report, s.report))]
    if empty and len(empty) < len(studies):
        names = ", ".join(s.name for s in empty[:3])
        warnings.append(f"{root}: {len(empty)} studies have an empty report ({names})")
    warnings += [f"{root}: {line}" for line in _unsure(studies, data)]
    counts = [_counts(split, [s for s in studies if s.split == split]) for split in SPLITS]
    return StudyCheck(counts=counts, problems=problems, warnings=warnings)


def _unsure(studies: Sequence[StudyFile], data: MoreData) -> list[str]:
    """What findings are uncertain or not mentioned in a table, and what they count as."""
    told = [study.cells for study in studies if study.cells]
    lines = [
        unsure_line(name, [cells[name] for cells in told], data, cases="studies")
        for name in (told[0] if told else ())
    ]
    return [line for line in lines if line]


def _odd_ecg(path: Path, data: MoreData, samples: int) -> list[str]:
    ecg = read_ecg(path, missing_leads=data.missing_leads)
    lines = []
    if ecg.missing:
        lines.append(f"{path}: has no lead {', '.join(ecg.missing)}; filled with 0")
    if missing := int(np.isnan(ecg.leads_mv).sum()):
        lines.append(f"{path}: {missing} samples are missing (NaN); filled with 0")
    if ecg.duration_s < least_s(samples):
        lines.append(
            f"{path}: lasts {ecg.duration_s:.1f} s, less than {samples / RATE_HZ:g} s; zeros "
            "follow it"
        )
    return lines


def _counts(split: str, studies: Sequence[StudyFile]) -> CountRow:
    row: dict[str, str | int | float | None] = {
        "split": split,
        "studies": len(studies),
        "subjects": len({s.subject for s in studies if s.subject}),
    }
    row |= {name: sum(name in s.modalities for s in studies) for name in MODALITIES}
    for name in studies[0].labels if studies else ():
        row[name] = sum(s.labels[name] == 1 for s in studies)
    return row
