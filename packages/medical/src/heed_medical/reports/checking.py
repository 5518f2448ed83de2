"""Read a whole set of studies and report everything that is broken or treacherous."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from heed_core.errors import InputError
from heed_medical.pictures.reading import read_grey
from heed_medical.reports.data import plan_reports
from heed_medical.reports.layouts import Listing, Study, list_studies
from heed_medical.reports.settings import ReportData
from heed_medical.reports.words import clean_report
from heed_medical.splits import SPLITS, in_several_splits

CountRow = Mapping[str, str | int | float | None]
_RELEASES = {
    (2069, 296, 590): "IU X-Ray as released with R2Gen",
    (270790, 2130, 3858): "MIMIC-CXR as released with R2Gen",
    (3062, 382, 382): "another circulated copy of IU X-Ray, not that of R2Gen's numbers",
}
"""Studies in train, val and test."""


@dataclass(frozen=True, kw_only=True)
class ReportCheck:
    """What a data set holds and what is wrong with it."""

    counts: Sequence[CountRow]
    problems: Sequence[str]
    warnings: Sequence[str]


def check_reports(data: ReportData, root: Path) -> ReportCheck:
    """Read every picture and report of every split; whatever is wrong becomes a line."""
    try:
        listing = list_studies(root, data)
    except InputError as error:
        return ReportCheck(counts=(), problems=(str(error),), warnings=())
    problems = list(listing.problems)
    try:
        data = plan_reports(replace(data, on_error="skip"), root)
    except InputError as error:
        problems.append(str(error))
    if data.pictures == "needed":
        problems += _broken_pictures(listing)
    return ReportCheck(
        counts=[_count(listing, split, data) for split in SPLITS],
        problems=problems,
        warnings=_warnings(listing, data, root),
    )


def _broken_pictures(listing: Listing) -> list[str]:
    problems = []
    for study in listing.studies:
        for path in study.pictures:
            try:
                if not path.is_file():
                    raise InputError(
                        f"does not exist (study {study.name})",
                        path=path,
                        remedy="add it, or name the folder with --data.images",
                    )
                read_grey(path)
            except InputError as error:
                problems.append(str(error))
    return problems


def _of(listing: Listing, split: str) -> list[Study]:
    return [study for study in listing.studies if study.split == split]


def _count(listing: Listing, split: str, data: ReportData) -> CountRow:
    studies = _of(listing, split)
    known = set(data.vocabulary)
    reports = [clean_report(study.report or "", data.dialect).split() for study in studies]
    words = [word for report in reports for word in report]
    lengths = [len(report) for report in reports]
    return {
        "split": split,
        "studies": len(studies),
        "pictures": sum(len(study.pictures) for study in studies),
        "different reports": len({" ".join(report) for report in reports}),
        "words": len(words),
        "different words": len(set(words)),
        "mean length": round(float(np.mean(lengths)), 2) if lengths else None,
        "longest": max(lengths, default=0),
        "cut": sum(length + 2 > data.most_words for length in lengths),
        "unknown words": sum(word not in known for word in words) if known else None,
    }


def _warnings(listing: Listing, data: ReportData, root: Path) -> list[str]:
    found = []
    counts = Counter(study.split for study in listing.studies)
    key = (counts["train"], counts["val"], counts["test"])
    if listing.layout == "r2gen":
        known = _RELEASES.get(key)
        found.append(
            f"{root}: {key[0]} / {key[1]} / {key[2]} studies: "
            + (f"this is {known}" if known else "no release that is known")
        )
    if data.vocabulary:
        found.append(f"{root}: {len(data.vocabulary)} words, <unk> counted")
    found += [
        f"{root}: the report of {study.name} is empty; it is learnt as a lone full stop"
        for study in listing.studies
        if not clean_report(study.report or "", data.dialect).replace(".", "").strip()
    ]
    if listing.left_out:
        wanted = " and ".join(data.sections)
        found.append(f"{root}: {listing.left_out} reports without {wanted} or picture are left out")
    if lone := sum(0 < len(study.pictures) < data.views for study in listing.studies):
        what = "repeated" if data.lone == "duplicate" else "left out"
        found.append(f"{root}: {lone} studies have fewer than {data.views} pictures: views {what}")
    if more := sum(len(study.pictures) > data.views for study in listing.studies):
        found.append(
            f"{root}: {more} studies have more than {data.views} pictures: the first count"
        )
    found += [
        f"{root}: patient {patient} is in the splits {' and '.join(splits)}"
        for patient, splits in patients_in_several_splits(listing.studies).items()
    ]
    return found


def patients_in_several_splits(studies: Iterable[Study]) -> dict[str, tuple[str, ...]]:
    """Patients whose studies lie in more than one split -> these splits."""
    return in_several_splits((study.patient, study.split) for study in studies)
