"""What studies lack of what a model takes, a line of text per kind."""

from __future__ import annotations

from collections.abc import Sequence

from heed_medical.ecg.reading import stated_duration_s
from heed_medical.ecg.signals import RATE_HZ
from heed_medical.more.studies import StudyFile, introduced

_CALLED = {"xray": "X-ray", "ecg": "ECG", "text": "report"}


def lacking(studies: Sequence[StudyFile], modalities: Sequence[str]) -> list[str]:
    """A line for each of these modalities that some studies do not have.

    A report that is empty when cleaned is none.

    Example:
        >>> lacking([StudyFile(name="a", report=("Clear.", ""))], ("xray", "ecg", "text"))
        ['1 of 1 studies have no X-ray', '1 of 1 studies have no ECG']
    """
    without = {
        "xray": [study for study in studies if study.xray is None],
        "ecg": [study for study in studies if study.ecg is None],
        "text": [study for study in studies if introduced(study.report) is None],
    }
    return [
        f"{len(without[name])} of {len(studies)} studies have no {_CALLED[name]}"
        for name in modalities
        if without[name]
    ]


def padded(studies: Sequence[StudyFile], samples: int) -> list[str]:
    """A line if some ECGs have fewer samples (at 100 Hz) than a model takes, by their headers."""
    paths = dict.fromkeys(study.ecg for study in studies if study.ecg)
    stated = [found for path in paths if (found := stated_duration_s(path)) is not None]
    short = [seconds for seconds in stated if seconds < least_s(samples)]
    if not short:
        return []
    return [
        f"{len(short)} of {len(paths)} ECGs last less than {samples / RATE_HZ:g} s (the "
        f"shortest {min(short):.1f} s); zeros follow them"
    ]


def least_s(samples: int) -> float:
    """What an ECG must last, in s, to need no zeros; half a sample is forgiven.

    Example:
        >>> least_s(1000)
        9.995
    """
    return (samples - 0.5) / RATE_HZ
