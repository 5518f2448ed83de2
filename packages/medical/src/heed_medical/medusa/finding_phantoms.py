"""Small chest pictures with three findings, made by a formula, in the layout of CheXpert.

A shadow in a lung (Lung Opacity), a wide heart (Cardiomegaly) and a bright line (Support Devices)
come and go independently. In the table some are uncertain (-1) and some that are absent are blank,
as in the real one.
"""

import csv
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from PIL import Image

from heed_medical.medusa.phantoms import make_chest
from heed_medical.pictures.listers import CHEXPERT_FINDINGS

FINDINGS = ("Cardiomegaly", "Lung Opacity", "Support Devices")
_UNCERTAIN, _BLANK = 0.08, 0.6


def make_picture(
    rng: np.random.Generator, *, heart: bool, shadow: bool, device: bool, side: int = 96
) -> Float32[np.ndarray, "h w"]:
    """A chest with some of the three findings, values within 0..1.

    Args:
        rng: Source of every other choice.
        heart: Whether the heart is wide.
        shadow: Whether a shadow lies in a lung.
        device: Whether a bright line runs down the chest.
        side: Height and width in pixels.
    """
    chest = make_chest(rng, positive=shadow, shadows=int(shadow), side=side)
    picture = np.array(chest.picture)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    if heart:
        where = (0.05 + rng.uniform(-0.05, 0.05), 0.35 + rng.uniform(-0.05, 0.05))
        inside = np.square((x - where[0]) / 0.5) + np.square((y - where[1]) / 0.3) < 1
        picture = np.where(inside, np.maximum(picture, 0.55), picture)
    if device:
        course = rng.uniform(-0.2, 0.2) + rng.uniform(-0.3, 0.3) * y
        line = (np.abs(x - course) < 1.6 / side) & (y < rng.uniform(0.0, 0.5))
        picture = np.where(line, 0.98, picture)
    return np.asarray(picture, dtype=np.float32)


def write_findings(
    out: Path, *, train: int = 160, test: int = 40, side: int = 96, seed: int = 0
) -> None:
    """Write `train.csv`, `valid.csv` and `{train,valid}/patientN/study1/view1_frontal.png`.

    Args:
        out: Made where it does not exist.
        train: Pictures of train.csv, of which validation is drawn by patient.
        test: Pictures of valid.csv, which is the test; without uncertain findings.
        side: Of the pictures, in pixels.
        seed: Equal seeds give equal files.
    """
    head = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_FINDINGS]
    out.mkdir(parents=True, exist_ok=True)
    for key, (name, count) in enumerate((("train", train), ("valid", test))):
        rows = []
        for number in range(count):
            rng = np.random.default_rng((seed, 3, key, number))
            there = [bool(rng.random() < 0.4) for _ in FINDINGS]
            heart, shadow, device = there
            picture = make_picture(rng, heart=heart, shadow=shadow, device=device, side=side)
            patient = f"patient{key}{number // 2:04d}/study{number % 2 + 1}"
            folder = out / name / patient
            folder.mkdir(parents=True)
            grey = np.rint(255 * np.asarray(picture)).astype(np.uint8)
            Image.fromarray(grey).save(folder / "view1_frontal.png")
            cells = dict.fromkeys(CHEXPERT_FINDINGS, "")
            for finding, present in zip(FINDINGS, there, strict=True):
                cells[finding] = _cell(rng, present, certain=name == "valid")
            path = f"CheXpert-v1.0-small/{name}/{patient}/view1_frontal.png"
            rows.append([path, "Female", "50", "Frontal", "PA", *cells.values()])
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(head)
            writer.writerows(rows)


def _cell(rng: np.random.Generator, present: bool, *, certain: bool) -> str:
    uncertain, blank = rng.random() < _UNCERTAIN, rng.random() < _BLANK
    if certain:
        return "1.0" if present else "0.0"
    if uncertain:
        return "-1.0"
    return "1.0" if present else "" if blank else "0.0"
