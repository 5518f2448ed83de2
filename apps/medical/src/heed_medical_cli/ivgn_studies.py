"""Studies of pictures and reports that tell what they lack when they are gone through."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from heed_core.folders import unique_names
from heed_medical.reports.data import StudyData
from heed_medical.reports.layouts import Study
from heed_medical.reports.settings import ReportData
from heed_medical.reports.words import clean_report

logger = logging.getLogger(__name__)

_SHOWN = 3


class ToldReports(StudyData):
    """Studies that log what they lack, a line per kind, when they are first counted.

    A pass over them counts them once, in the main process; a data set that is only made to see
    whether it can be made says nothing.

    Args:
        studies: Where they are.
        data: The settings, vocabulary settled.
        place: Where they are from, for messages.
        training: As of `StudyData`.
        skipped: As of `StudyData`.
    """

    def __init__(
        self,
        studies: Sequence[Study],
        data: ReportData,
        *,
        place: str,
        training: bool = False,
        skipped: Sequence[str] = (),
    ) -> None:
        super().__init__(studies, data, training=training, skipped=skipped)
        self.place, self._told = place, False

    def __len__(self) -> int:
        if not self._told:
            self._told = True
            for line in lacks(self.studies, self.data):
                logger.warning("%s: %s", self.place, line)
        return super().__len__()


def lacks(studies: Sequence[Study], data: ReportData) -> Iterator[str]:
    """A line for studies with too few pictures, with too many, and with an empty report.

    Example:
        >>> from pathlib import Path
        >>> lone = Study(name="a", pictures=(Path("a.png"),), report="")
        >>> list(lacks([lone], ReportData(lone="mask")))[0]
        'fewer than 2 pictures in 1 of 1 studies (a): the other views are left out'
    """
    if data.pictures == "needed":
        counts = {study.name: len(study.pictures) for study in studies}
        what = "the last one is repeated"
        if data.lone == "mask":
            what = "the other views are left out"
        few = [name for name, count in counts.items() if count < data.views]
        many = [name for name, count in counts.items() if count > data.views]
        for number, found, then in (("fewer", few, what), ("more", many, "the first ones count")):
            if found:
                yield f"{number} than {data.views} pictures in {_named(found, studies)}: {then}"
    empty = [
        study.name
        for study in studies
        if study.report is not None
        and not clean_report(study.report, data.dialect).replace(".", "").strip()
    ]
    if empty:
        yield f"an empty report in {_named(empty, studies)}: a lone full stop stands for it"


def distinct(studies: Sequence[Study]) -> list[Study]:
    """Each study once, and under a name of its own: many data sets call every picture 0.png."""
    once = list(dict.fromkeys(studies))
    places = []
    for study in once:
        picture = study.pictures[0]
        alone = picture.stem == study.name.rpartition("/")[2]
        places.append(picture if alone else picture.parent)
    names = unique_names([study.name for study in once], places)
    return [replace(study, name=name) for study, name in zip(once, names, strict=True)]


def _named(names: Sequence[str], studies: Sequence[Study]) -> str:
    shown = ", ".join((*names[:_SHOWN], *["..."] * (len(names) > _SHOWN)))
    return f"{len(names)} of {len(studies)} studies ({shown})"
