"""Write a WFDB record."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from heed_medical.ecg.reading import LEADS, wfdb_library


def write_record(
    path: Path,
    signals: Float64[np.ndarray, "c n"],
    *,
    rate_hz: int,
    names: Sequence[str] = LEADS,
    unit: str = "mV",
    steps_per_unit: float = 1000.0,
) -> Path:
    """Write `path`.hea and `path`.dat with 16 bits per sample; the header's path comes back.

    Raises:
        MissingExtra: The library wfdb is not installed.
    """
    library = wfdb_library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, about wfdb's own use of it
        library.wrsamp(
            path.name,
            fs=rate_hz,
            units=[unit] * len(names),
            sig_name=list(names),
            p_signal=signals.T,
            fmt=["16"] * len(names),
            adc_gain=[steps_per_unit] * len(names),
            baseline=[0] * len(names),
            write_dir=str(path.parent),
        )
    return path.with_name(f"{path.name}.hea")
