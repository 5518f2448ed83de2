"""Made-up studies of eight findings in a real layout: pictures, WFDB records, a manifest.

A finding is a bright patch at one of eight places of the X-ray, one of eight heart rates of the
ECG, and some words of both reports. Place, rate and words vary, noise lies over all, and some
studies lack a modality, as in real data. None of it is medicine.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from PIL import Image
from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]

from heed_medical.ecg.reading import LEADS
from heed_medical.ecg.writing import write_record
from heed_medical.more.settings import CHEXPERT, SPLITS

FINDINGS = CHEXPERT[2:6] + CHEXPERT[8:12]
SIDE = 64
RATE_HZ, SECONDS = 100, 10
_RATES_BPM = (38, 48, 60, 75, 94, 118, 148, 185)
_RHYTHMS = (
    "marked sinus bradycardia", "idioventricular rhythm", "regular sinus rhythm",
    "atrial pacing", "borderline rate", "sinus tachycardia", "atrial flutter",
    "supraventricular tachycardia",
)  # fmt: skip
_PHRASES = (
    "{} is present.",
    "There is {} in this view.",
    "Findings consistent with {}.",
)
_FILLERS = (
    "The bones are intact.",
    "Lines are in place.",
)
_PER_FINDING = {"train": 16, "val": 2, "test": 3}


def write_sample(out: Path, *, seed: int) -> None:
    """Write `manifest.csv`, `images/` and `ecgs/` into an empty folder.

    Raises:
        MissingExtra: The library wfdb is not installed.
    """
    rng = np.random.default_rng(seed)
    for folder in ("images", "ecgs"):
        (out / folder).mkdir()
    names = ["name", "subject_id", "xray_path", "ecg_path", "xray_report", "ecg_report", "split"]
    rows = []
    for split in SPLITS:
        for number in range(_PER_FINDING[split] * len(FINDINGS)):
            row = _write_study(out, f"{split}{number:03d}", number % len(FINDINGS), rng)
            if split == "train" and number % 10 == 3:
                row["ecg_path"] = row["ecg_report"] = ""
            if split == "train" and number % 10 == 7:
                row["xray_path"] = row["xray_report"] = ""
            rows.append({**row, "split": split})
    with (out / "manifest.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*names, *FINDINGS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_study(
    out: Path, name: str, finding: int, rng: np.random.Generator
) -> dict[str, str | int]:
    picture = np.round(255 * make_xray(finding, rng)).astype(np.uint8)
    Image.fromarray(picture).save(out / "images" / f"{name}.png")
    write_record(out / "ecgs" / name, make_ecg(finding, rng), rate_hz=RATE_HZ)
    said = str(rng.choice(_PHRASES)).format(FINDINGS[finding].lower())
    filler = str(rng.choice(_FILLERS))
    return {
        "name": name,
        "subject_id": f"s-{name}",
        "xray_path": f"images/{name}.png",
        "ecg_path": f"ecgs/{name}.hea",
        "xray_report": f"{said} {filler}",
        "ecg_report": f"{_RHYTHMS[finding]}, {rng.choice(['confirmed', 'compare with before'])}",
        **{label: int(label == FINDINGS[finding]) for label in FINDINGS},
    }


def make_xray(
    finding: int, rng: np.random.Generator, *, side: int = SIDE
) -> Float64[np.ndarray, "h w"]:
    """A cloudy picture within 0..1, brighter at the place of a finding."""
    row, column = divmod(finding, 4)
    shift = rng.uniform(-0.06, 0.06, 2)
    centre = (row + 0.5) / 2 + shift[0], (column + 0.5) / 4 + shift[1]
    y, x = np.mgrid[:side, :side] / side
    distance = np.square(y - centre[0]) + np.square(x - centre[1])
    clouds = gaussian_filter(rng.normal(size=(side, side)), side / 12)
    picture = 0.4 + 0.04 * clouds / clouds.std() + 0.02 * rng.normal(size=(side, side))
    picture += 0.35 * np.exp(-distance / (2 * 0.07**2))
    return np.asarray(np.clip(picture, 0.0, 1.0))


def make_ecg(finding: int, rng: np.random.Generator) -> Float64[np.ndarray, "12 n"]:
    """Ten seconds in mV: beats at about the rate of a finding, drift and noise."""
    time = np.arange(RATE_HZ * SECONDS) / RATE_HZ
    period = 60.0 / (_RATES_BPM[finding] * rng.uniform(0.94, 1.06))
    beats = np.arange(rng.uniform(0, period), SECONDS + period, period)
    beats = beats + rng.normal(size=len(beats)) * 0.01
    distance = time[None] - beats[:, None]
    spikes = np.exp(-np.square(distance / 0.02)).sum(0)
    waves = 0.25 * np.exp(-np.square((distance - 0.22) / 0.05)).sum(0)
    strength = rng.uniform(-1.0, 1.0, len(LEADS))
    strength[1] = rng.uniform(0.7, 1.2)
    drift = 0.3 * np.sin(2 * np.pi * (0.1 * time + rng.uniform(size=(len(LEADS), 1))))
    noise = 0.08 * rng.normal(size=(len(LEADS), len(time)))
    return np.asarray(strength[:, None] * (spikes + waves) + drift + noise)
