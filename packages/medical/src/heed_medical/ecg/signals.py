"""From a recording to the input of a network: rate, length, baseline, range."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64
from scipy.signal import medfilt, resample_poly  # type: ignore[import-untyped]

from heed_medical.ecg.reading import Ecg

RATE_HZ = 100
TINY = 1e-10


def resample(
    leads: Float64[np.ndarray, "12 n"], *, rate_hz: float, to_hz: int = RATE_HZ
) -> Float64[np.ndarray, "12 m"]:
    """Change the sampling rate with a polyphase filter."""
    ratio = Fraction(to_hz / rate_hz).limit_denominator(1000)
    if ratio == 1:
        return leads
    found = resample_poly(leads, ratio.numerator, ratio.denominator, axis=1)
    return np.asarray(found, dtype=np.float64)


def cut(
    leads: Float64[np.ndarray, "12 n"], samples: int, *, part: Literal["first", "centre"] = "first"
) -> Float64[np.ndarray, "12 m"]:
    """So many samples: of a longer recording a part, a shorter one with zeros after it."""
    count = leads.shape[1]
    if count < samples:
        return np.pad(leads, ((0, 0), (0, samples - count)))
    start = (count - samples) // 2 if part == "centre" else 0
    return leads[:, start : start + samples]


def remove_baseline(
    leads: Float64[np.ndarray, "12 n"], *, rate_hz: int = RATE_HZ
) -> Float64[np.ndarray, "12 n"]:
    """Subtract what two median filters (0.2 s, then 0.6 s) leave: the drift without the beats."""
    short, long = (_odd(round(seconds * rate_hz) + 1) for seconds in (0.2, 0.6))
    baseline = [medfilt(medfilt(lead, short), long) for lead in leads]
    return np.asarray(leads - np.stack(baseline))


def to_unit_range(leads: Float64[np.ndarray, "12 n"]) -> Float64[np.ndarray, "12 n"]:
    """Each lead from its lowest (-1) to its highest value (1); a constant lead is -1."""
    low = leads.min(axis=1, keepdims=True)
    high = leads.max(axis=1, keepdims=True)
    return np.asarray(2.0 * (leads - low) / (high - low + TINY) - 1.0)


def prepare_ecg(
    ecg: Ecg, *, samples: int = 1000, part: Literal["first", "centre"] = "first"
) -> Float32[np.ndarray, "12 n"]:
    """The input of MoRE's network: 100 Hz, without baseline, each lead within -1..1.

    Missing samples (NaN) count as 0 mV.
    """
    leads = resample(np.nan_to_num(ecg.leads_mv, nan=0.0), rate_hz=ecg.rate_hz)
    leads = to_unit_range(remove_baseline(cut(leads, samples, part=part)))
    return leads.astype(np.float32)


def _odd(count: int) -> int:
    return count + 1 - count % 2
