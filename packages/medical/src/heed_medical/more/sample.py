"""Made-up studies of eight findings in a real layout: pictures, WFDB records, a manifest.

A finding is a bright patch at one of eight places of the X-ray, a combination of rate, width and
T wave of the ECG, and a sentence of both reports. Place and beats vary, noise lies over all, and
some studies lack a modality, as in real data. None of it is medicine.
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
from heed_medical.more.settings import CHEXPERT
from heed_medical.splits import SPLITS

FINDINGS = CHEXPERT[2:6] + CHEXPERT[8:12]
SIDE = 64
RATE_HZ, SECONDS = 100, 10
_STRENGTHS = (0.7, 1.1, 0.5, -0.8, 0.3, 0.8, -0.5, 0.6, 0.9, 1.2, 1.1, 0.9)
"""Of the beats in each lead, as in a heart of a normal axis."""
_PER_FINDING = {"train": 20, "val": 2, "test": 4}


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
    return {
        "name": name,
        "subject_id": f"s-{name}",
        "xray_path": f"images/{name}.png",
        "ecg_path": f"ecgs/{name}.hea",
        "xray_report": f"{FINDINGS[finding]} is present.",
        "ecg_report": describe_ecg(finding),
        **{label: int(label == FINDINGS[finding]) for label in FINDINGS},
    }


def make_xray(
    finding: int, rng: np.random.Generator, *, side: int = SIDE
) -> Float64[np.ndarray, "h w"]:
    """A cloudy picture within 0..1, brighter at the place of a finding."""
    row, column = divmod(finding, 4)
    shift = rng.uniform(-0.04, 0.04, 2)
    centre = (row + 0.5) / 2 + shift[0], (column + 0.5) / 4 + shift[1]
    y, x = np.mgrid[:side, :side] / side
    distance = np.square(y - centre[0]) + np.square(x - centre[1])
    clouds = gaussian_filter(rng.normal(size=(side, side)), side / 12)
    picture = 0.4 + 0.03 * clouds / clouds.std() + 0.02 * rng.normal(size=(side, side))
    picture += 0.35 * np.exp(-distance / (2 * 0.09**2))
    return np.asarray(np.clip(picture, 0.0, 1.0))


def describe_ecg(finding: int) -> str:
    """What the machine says of the ECG of a finding.

    Example:
        >>> describe_ecg(5)
        'tachycardia, narrow QRS, T inversion'
    """
    fast, wide, inverted = _traits(finding)
    return ", ".join(
        (
            "tachycardia" if fast else "normal rate",
            "wide QRS" if wide else "narrow QRS",
            "T inversion" if inverted else "upright T",
        )
    )


def make_ecg(finding: int, rng: np.random.Generator) -> Float64[np.ndarray, "12 n"]:
    """Ten seconds in mV: beats with the traits of a finding, drift and noise."""
    fast, wide, inverted = _traits(finding)
    time = np.arange(RATE_HZ * SECONDS) / RATE_HZ
    period = 60.0 / ((120 if fast else 60) * rng.uniform(0.9, 1.1))
    beats = np.arange(rng.uniform(0, period), SECONDS + period, period)
    beats = beats + rng.normal(size=len(beats)) * 0.01
    distance = time[None] - beats[:, None]
    spikes = np.exp(-np.square(distance / (0.06 if wide else 0.02))).sum(0)
    waves = np.exp(-np.square((distance - 0.24) / 0.05)).sum(0)
    beats_mv = spikes + (-0.35 if inverted else 0.35) * waves
    strength = np.array(_STRENGTHS) * rng.uniform(0.7, 1.3, len(LEADS))
    drift = 0.3 * np.sin(2 * np.pi * (0.1 * time + rng.uniform(size=(len(LEADS), 1))))
    noise = 0.04 * rng.normal(size=(len(LEADS), len(time)))
    return np.asarray(strength[:, None] * beats_mv + drift + noise)


def _traits(finding: int) -> tuple[bool, bool, bool]:
    """Whether the beats of a finding are fast, wide, and have inverted T waves."""
    return bool(finding & 1), bool(finding & 2), bool(finding & 4)
