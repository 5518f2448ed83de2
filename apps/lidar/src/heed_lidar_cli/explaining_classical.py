"""Why the classical detector took a point for a curb: which tests it passed."""

from __future__ import annotations

import numpy as np

from heed_lidar.classical import TESTS, ClassicalConfig, RingPoints, examine, fit_ground
from heed_lidar.drawing import Caption, Picture, Rgb, birds_eye
from heed_lidar.pictures import shown_region
from heed_lidar_cli.prediction import StreetPrediction
from heed_runtime.recipe import Explanation

STAGES: tuple[tuple[str, Rgb], ...] = (
    ("not looked at", (56, 60, 70)),
    ("near the ground", (96, 102, 116)),
    ("height range passed", (86, 130, 180)),
    ("looks like a step", (86, 200, 220)),
    ("nearest to the path", (240, 170, 60)),
    ("on a curb line", (255, 92, 56)),
)
"""How far a point came, and its colour in the picture."""


def explain_detector(config: ClassicalConfig, prediction: StreetPrediction) -> Explanation:
    """A picture of how far each point came, and arrays: the tests, and the stage of each point.

    `stage` counts as `STAGES`; `rows` are the points near the ground, in ring order, and each test
    has an array of their results.
    """
    cloud = prediction.scan.cloud
    stage = np.zeros(len(cloud), dtype=np.uint8)
    arrays: dict[str, np.ndarray] = {}
    ground = fit_ground(cloud.xyz)
    if ground is not None:
        points = examine(cloud, ground, config)
        arrays = _arrays(points)
        stage[points.rows] = 1
        stage[points.rows[points.passed["height range"]]] = 2
        stage[points.rows[points.step]] = 3
    stage[prediction.curb_score > 0] = 4
    on_line = (prediction.curb_score > 0) & (prediction.classes == prediction.first)
    stage[on_line] = 5
    return Explanation(
        name=prediction.name,
        arrays={"stage": stage, **arrays},
        figures={"tests": _draw(prediction, stage)},
    )


def _arrays(points: RingPoints) -> dict[str, np.ndarray]:
    tests = {f"passed_{name.replace(' ', '_')}": points.passed[name] for name in TESTS}
    return {
        "rows": points.rows,
        "ring": points.ring,
        "height_range_m": points.height_range_m,
        **tests,
    }


def _draw(prediction: StreetPrediction, stage: np.ndarray) -> Picture:
    xyz = prediction.scan.cloud.xyz
    counts = np.bincount(stage, minlength=len(STAGES))
    legend = [
        (f"{name} ({count:,})", colour)
        for (name, colour), count in zip(STAGES, counts, strict=True)
    ]
    order = np.argsort(stage, kind="stable")
    lifted = xyz[order].copy()
    lifted[:, 2] += 10.0 * stage[order]  # those that came further are seen above the others
    colours = np.array([colour for _, colour in STAGES], dtype=np.uint8)[stage[order]]
    caption = Caption(title=f"{prediction.name}: tests of a step", legend=legend)
    return birds_eye(lifted, colours, region=shown_region(xyz), caption=caption)
