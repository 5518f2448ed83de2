"""Read a WFDB record as the twelve standard leads in mV, whatever their order, case, rate and unit.

PTB-XL writes AVR, AVL, AVF; MIMIC-IV-ECG writes aVF before aVL; the PTB diagnostic records are in
lower case and have three more leads. Leads are therefore found by name, never by position.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from heed_core.errors import InputError, MissingExtra, reason_of

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
"""The order in which leads come out."""
ECG_SUFFIXES = (".hea", ".dat")

_RATES_HZ = (10, 50_000)
_TO_MILLIVOLT = {"v": 1e3, "mv": 1.0, "uv": 1e-3, "\u00b5v": 1e-3, "\u03bcv": 1e-3, "nv": 1e-6}
_CANONICAL = {lead.lower(): lead for lead in LEADS}


@dataclass(frozen=True, kw_only=True)
class Ecg:
    """A recording of twelve leads."""

    leads_mv: Float64[np.ndarray, "12 n"]
    """In the order of `LEADS`; samples that the file marks as missing are NaN."""
    rate_hz: float
    missing: tuple[str, ...] = ()
    """Leads that the file does not have; they are 0."""

    @property
    def duration_s(self) -> float:
        """How long it is."""
        return float(self.leads_mv.shape[1] / self.rate_hz)


def read_ecg(path: Path, *, missing_leads: Literal["error", "zero"] = "error") -> Ecg:
    """Read a record.

    Args:
        path: Its header, its signal file, or both without suffix.
        missing_leads: What becomes of a lead that the record does not have.

    Raises:
        InputError: The record is missing, truncated or no WFDB record; a lead is missing, there
            twice or without values; a unit is no voltage.
        MissingExtra: The library wfdb is not installed.
    """
    header = header_of(path)
    stem = header.with_suffix("")
    if not header.is_file():
        raise InputError("does not exist", path=header, remedy="a WFDB record is .hea and .dat")
    record = _record(stem, header)
    signals, rate = record.p_signal, float(record.fs or 0.0)
    if signals is None or signals.size == 0:
        raise InputError("has no signals", path=header, remedy="copy the record again")
    if not _RATES_HZ[0] <= rate <= _RATES_HZ[1]:
        raise InputError(
            f"has the sampling rate {rate:g} Hz, {_RATES_HZ[0]} to {_RATES_HZ[1]} were expected",
            path=header,
            remedy="correct the first line of the header",
        )
    names = [str(name or "") for name in record.sig_name or ()]
    columns = _columns(names, header)
    absent = tuple(lead for lead in LEADS if lead not in columns)
    if absent and (missing_leads == "error" or len(absent) == len(LEADS)):
        raise InputError(
            f"has no lead {', '.join(absent)} (its signals: {', '.join(names)})",
            path=header,
            remedy="rename the leads in the header, or --data.missing-leads zero fills them with 0",
        )
    leads = np.zeros((len(LEADS), len(signals)))
    for row, lead in enumerate(LEADS):
        if lead in columns:
            number = columns[lead]
            leads[row] = signals[:, number] * _factor(str(record.units[number] or ""), lead, header)
    return Ecg(leads_mv=_checked(leads, header), rate_hz=rate, missing=absent)


def header_of(path: Path) -> Path:
    """The header of a record that is named by its header, its signal file or without suffix."""
    stem = path.with_suffix("") if path.suffix.lower() in ECG_SUFFIXES else path
    return stem.with_name(f"{stem.name}.hea")


def stated_duration_s(path: Path) -> float | None:
    """How long a record is, as the first line of its header states; None where it does not.

    The line is `NAME SIGNALS RATE SAMPLES`; a rate may have a counter behind it (`360/0.1(5)`).
    """
    try:
        lines = header_of(path).read_text(encoding="utf-8", errors="replace").splitlines()
        first = next(line.split() for line in lines if line.strip() and line[0] != "#")
        rate, samples = float(first[2].partition("/")[0]), int(first[3])
    except (OSError, StopIteration, IndexError, ValueError):
        return None
    return samples / rate if rate > 0 and samples > 0 else None


def wfdb_library() -> Any:
    """The library wfdb, imported without the warnings that pandas has for it.

    Raises:
        MissingExtra: It is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import wfdb  # type: ignore[import-untyped]
        except ImportError:
            raise MissingExtra("wfdb", "heed-medical[ecg]") from None
    return wfdb


def _record(stem: Path, header: Path) -> Any:
    wfdb = wfdb_library()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pandas, about wfdb's own use of it
            return wfdb.rdrecord(str(stem.resolve()))
    except FileNotFoundError as error:
        name = Path(str(error.filename or "")).name or "its signal file"
        raise InputError(f"names {name}, which does not exist", path=header) from None
    except Exception as error:  # wfdb lets the faults of numpy and of its parser through
        reason = reason_of(error)
        raise InputError(
            f"is truncated or no WFDB record ({reason})",
            path=header,
            remedy="copy or download .hea and .dat again",
        ) from error


def lead_name(signal: str) -> str | None:
    """The lead that a signal's name means; None: no lead of the twelve.

    Example:
        >>> lead_name("Lead AVR"), lead_name("MDC_ECG_LEAD_V1"), lead_name("vx")
        ('aVR', 'V1', None)
    """
    plain = re.sub(r"^(mdc_ecg_)?lead[ _]*", "", signal.strip().lower())
    return _CANONICAL.get(plain.replace(" ", "").replace("_", ""))


def _columns(names: Sequence[str], header: Path) -> dict[str, int]:
    columns: dict[str, int] = {}
    for number, name in enumerate(names):
        lead = lead_name(name)
        if lead is None:
            continue
        if lead in columns:
            raise InputError(f"has the lead {lead} twice", path=header, remedy="name each once")
        columns[lead] = number
    return columns


def _factor(unit: str, lead: str, header: Path) -> float:
    factor = _TO_MILLIVOLT.get(unit.strip().lower())
    if factor is None:
        raise InputError(
            f"has the lead {lead} in {unit!r}, a voltage was expected",
            path=header,
            remedy="state mV, uV or V in the header",
        )
    return factor


def _checked(leads: Float64[np.ndarray, "12 n"], header: Path) -> Float64[np.ndarray, "12 n"]:
    if np.isinf(leads).any():
        raise InputError("holds infinite values", path=header, remedy="repair the record")
    empty = [lead for lead, row in zip(LEADS, leads, strict=True) if np.isnan(row).all()]
    if empty:
        raise InputError(
            f"has no values in the lead {', '.join(empty)}",
            path=header,
            remedy="remove the record, or the lead and set --data.missing-leads zero",
        )
    return leads
