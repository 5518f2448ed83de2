"""From predictions to rows and tables: every vertex, and every region with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from heed_neuro.brain_encoder.regions import Regions, reported
from heed_neuro.brain_encoder.scores import (
    RegionScores,
    VertexScores,
    bootstrap_r,
    score_region,
    score_vertices,
)
from heed_runtime.recipe import Report, Row, Table

ALL = "all vertices"
REGION, VERTEX = "region", "vertex"


def score_rows(
    name: str,
    predicted: Mapping[str, np.ndarray],
    measured: Mapping[str, np.ndarray],
    regions: Mapping[str, Regions],
    ceilings: Mapping[str, np.ndarray],
    surface: Mapping[str, np.ndarray | None],
    *,
    seed: int = 0,
) -> list[Row]:
    """A row per region of each group, and a row per vertex."""
    rows: list[Row] = []
    vertices: list[Row] = []
    found: list[tuple[VertexScores, np.ndarray]] = []
    for group, own in measured.items():
        scores = score_vertices(predicted[group], own, ceilings.get(group))
        drawn = bootstrap_r(predicted[group], own, seed=seed)
        found.append((scores, drawn))
        everything = np.ones(own.shape[1], dtype=bool)
        for region, members in {ALL: everything, **reported(regions[group])}.items():
            row = _region_row(score_region(scores, members, drawn))
            rows.append({"case": name, "level": REGION, "group": group, "region": region, **row})
        vertices += _vertex_rows(name, group, scores, surface.get(group))
    if len(found) > 1:
        rows.insert(0, _both(name, found))
    return [*rows, *vertices]


def _both(name: str, found: Sequence[tuple[VertexScores, np.ndarray]]) -> Row:
    known = all(scores.ceiling is not None for scores, _ in found)

    def joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
        return np.concatenate([p for p in parts if p is not None]) if known else None

    whole = VertexScores(
        r=np.concatenate([scores.r for scores, _ in found]),
        ceiling=joined([scores.ceiling for scores, _ in found]),
        accuracy=joined([scores.accuracy for scores, _ in found]),
    )
    drawn = np.concatenate([own for _, own in found], axis=1)
    row = _region_row(score_region(whole, np.ones(len(whole.r), dtype=bool), drawn))
    return {"case": name, "level": REGION, "group": "both", "region": ALL, **row}


def _region_row(own: RegionScores) -> dict[str, str | int | float | None]:
    return {
        "vertices": own.vertices,
        "r": _number(own.r),
        "r_low": _number(own.r_low),
        "r_high": _number(own.r_high),
        "r_median": _number(own.r_median),
        "accuracy": own.accuracy,
        "accuracy_median": own.accuracy_median,
        "undefined": own.undefined,
        "no_ceiling": own.without_ceiling,
        "negative": own.negative,
    }


def _vertex_rows(
    name: str, group: str, scores: VertexScores, surface: np.ndarray | None
) -> list[Row]:
    rows: list[Row] = []
    for vertex, r in enumerate(scores.r):
        rows.append(
            {
                "case": name,
                "level": VERTEX,
                "group": group,
                "vertex": vertex,
                "r": _number(r),
                "ceiling": None if scores.ceiling is None else float(scores.ceiling[vertex]),
                "accuracy": None if scores.accuracy is None else _number(scores.accuracy[vertex]),
                "surface": None if surface is None else int(surface[vertex]),
            }
        )
    return rows


def report_rows(rows: Sequence[Row]) -> Report:
    """The headline numbers, a table of regions, and pictures."""
    from heed_neuro_cli.brain_pictures import draw_ceiling, draw_regions, draw_surfaces

    regions = [row for row in rows if row["level"] == REGION]
    vertices = [row for row in rows if row["level"] == VERTEX]
    total = regions[0]
    metrics = {
        name: _value(total[name])
        for name in ("r", "r_low", "r_high", "r_median", "accuracy", "accuracy_median")
    }
    metrics |= {
        "vertices": _value(total["vertices"]),
        "undefined": _value(total["undefined"]),
        "no_ceiling": _value(total["no_ceiling"]),
        "negative_share": _value(total["negative"]),
    }
    title = "regions"
    if total["accuracy"] is None:
        title = "regions (no noise ceiling: raw r only)"
        metrics = {k: v for k, v in metrics.items() if not k.startswith(("accuracy", "no_ceiling"))}
    hidden = {"case", "level"} | (
        {"accuracy", "accuracy_median", "no_ceiling"} if total["accuracy"] is None else set()
    )
    table: list[Row] = [{k: v for k, v in row.items() if k not in hidden} for row in regions]
    plots = {"regions": draw_regions(regions), **draw_surfaces(vertices)}
    if total["accuracy"] is not None:
        plots["ceiling"] = draw_ceiling(vertices)
    return Report(metrics=metrics, tables=[Table(title=title, rows=table)], plots=plots)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _value(item: str | float | None) -> float:
    return float("nan") if item is None else float(item)
