"""What `compare` and `ceiling` show and write: the table of scores, plots, rows per picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from heed_core.errors import InputError
from heed_gaze.comparison.matching import Case
from heed_gaze.comparison.scoring import (
    KINDS,
    LOWER_IS_BETTER,
    Comparison,
    Kind,
    attainment,
    compare,
    curves_of,
)
from heed_gaze.metrics.saccades import (
    amplitude_histogram,
    amplitudes_px,
    direction_histogram,
    directions_rad,
    histogram_distance,
)
from heed_gaze.metrics.searching import probability_mismatch
from heed_gaze.plots import (
    draw_amplitudes,
    draw_attainment,
    draw_directions,
    draw_performance,
    draw_scanpath,
)
from heed_gaze.readers.pictures import read_picture
from heed_gaze.scanpaths import Scanpath
from heed_gaze_cli.scanpath_options import ScoreOptions, read_labels
from heed_runtime.files import atomic_folder, refuse_existing, write_csv, write_json
from heed_runtime.recipe import Row, Table
from heed_runtime.report import new_figure, save_figure, save_table, style
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from heed_gaze.scanpaths import ScanpathSet

_EXAMPLES = 3
_BINS = 30


def score(
    options: ScoreOptions,
    cases: Sequence[Case],
    data: ScanpathSet,
    *,
    skipped: Sequence[str],
    used: Sequence[Path],
) -> Result:
    """Score the cases, write what `--out` asks for, never over what was `used`, and show it."""
    if options.out is not None:
        refuse_existing(options.out, overwrite=options.overwrite, used=used)
    found = _compare(options, cases)
    predicted = bool(found.pairs["predicted"])
    rows = score_rows(found)
    tables = [Table(title="scores", rows=rows)]
    if distances := distance_rows(cases):
        tables.append(Table(title="saccades", rows=distances))
    if lost := _undefined_rows(found):
        tables.append(Table(title="undefined pairs", rows=lost))
    if skipped:
        tables.append(Table(title="skipped", rows=[{"scanpath": line} for line in skipped]))
    facts = {
        "n": len(cases),
        "layout": data.layout,
        "pairs": {kind: count for kind, count in found.pairs.items() if count},
        "scores": rows,
        "saccades": distances,
        "undefined": {name: dict(kinds) for name, kinds in found.undefined.items()},
        "skipped": list(skipped),
    }
    files: list[Path] = []
    if options.out is not None:
        files = _write(options, facts, found, tables, data.images)
    count = found.pairs["predicted" if predicted else "human"]
    kinds, unit = f"{len(cases)} pictures", "pictures"
    if any(case.task for case in cases):
        kinds, unit = (
            f"{len(cases)} tasks in {len({case.image for case in cases})} pictures",
            "tasks",
        )
    return Result(
        title=f"{kinds}, {count} pairs of scanpaths; means over {unit}",
        tables=tables,
        data=facts,
        files=files,
    )


def _compare(options: ScoreOptions, cases: Sequence[Case]) -> Comparison:
    widths = {case.size_px[0] for case in cases}
    if options.px_per_degree is not None and len(widths) > 1:
        raise InputError(
            f"--px-per-degree needs pictures of one width, these have {sorted(widths)}",
            remedy="leave the flag away, or score pictures of one width",
        )
    labels = read_labels(options.labels)
    by_image = {
        case.image: labels[stem] for case in cases if (stem := Path(case.image).stem) in labels
    }
    with options.terminal.progress("compare", len(cases)) as progress:
        return compare(
            cases, options.settings(max(widths)), labels=by_image, progress=progress.advance
        )


def score_rows(found: Comparison) -> list[Row]:
    """A row per score: the means, the intervals, and how far from chance to the viewers."""
    rows: list[Row] = []
    shown = [kind for kind in KINDS if found.pairs[kind]]
    for name, intervals in found.intervals.items():
        row: dict[str, str | int | float | None] = {
            "score": name,
            "better": "lower" if name in LOWER_IS_BETTER else "higher",
        }
        for kind in shown:
            one = intervals.get(kind)
            row[kind] = None if one is None else one.mean
            if kind in ("predicted", "human"):
                row[f"{kind} low"] = None if one is None else one.low
                row[f"{kind} high"] = None if one is None else one.high
        if "predicted" in shown:
            row["attained"] = attainment(name, intervals)
        rows.append(row)
    return rows


def _undefined_rows(found: Comparison) -> list[Row]:
    return [
        {"score": name, **{kind: kinds.get(kind, 0) for kind in KINDS if found.pairs[kind]}}
        for name, kinds in found.undefined.items()
    ]


def _everyone(cases: Sequence[Case]) -> dict[Kind, list[Scanpath]]:
    """All scanpaths of predictions and viewers."""
    groups: dict[Kind, list[Scanpath]] = {
        "predicted": [path for case in cases for path in case.predicted],
        "human": [path for case in cases for path in case.human],
    }
    return {kind: paths for kind, paths in groups.items() if paths}


def distance_rows(cases: Sequence[Case]) -> list[Row]:
    """How unlike the saccades of predictions and viewers are, beside two halves of the viewers.

    Jensen-Shannon divergence in bits of the histograms of amplitudes and directions.
    """
    groups = _everyone(cases)
    human = groups["human"]
    viewers = sorted({path.subject for path in human})
    first = set(viewers[::2])
    halves = [[p for p in human if (p.subject in first) == side] for side in (True, False)]
    edges = np.linspace(0.0, max(float(np.hypot(*case.size_px)) for case in cases), _BINS + 1)
    pairs = {"half of the viewers": halves}
    if "predicted" in groups:
        pairs = {"predicted": [groups["predicted"], human], **pairs}
    return [
        {
            "against the viewers": name,
            "amplitudes (bits)": histogram_distance(
                amplitude_histogram(one, edges), amplitude_histogram(other, edges)
            ),
            "directions (bits)": histogram_distance(
                direction_histogram(one), direction_histogram(other)
            ),
        }
        for name, (one, other) in pairs.items()
        if one and other
    ]


def _write(
    options: ScoreOptions,
    facts: Mapping[str, object],
    found: Comparison,
    tables: Sequence[Table],
    images: Mapping[str, Path],
) -> list[Path]:
    assert options.out is not None
    with atomic_folder(options.out, overwrite=options.overwrite) as folder:
        write_json(folder / "metrics.json", dict(facts))
        write_csv(folder / "cases.csv", _case_rows(found))
        for table in tables:
            save_table(table, folder)
        for stem, figure in _plots(found, images).items():
            save_figure(figure, folder / f"{stem}.png")
    return sorted(options.out.iterdir())


def _case_rows(found: Comparison) -> list[Row]:
    rows: list[Row] = []
    for index, case in enumerate(found.cases):
        row: dict[str, str | int | float | None] = {"image": case.image, "task": case.task}
        for name, kinds in found.scores.items():
            for kind, values in kinds.items():
                value = float(values[index])
                row[f"{name} {kind}"] = value if np.isfinite(value) else None
        rows.append(row)
    return rows


def _plots(found: Comparison, images: Mapping[str, Path]) -> dict[str, Figure]:
    groups = _everyone(found.cases)
    figures: dict[str, Figure] = {}
    with style():
        if found.pairs["predicted"]:
            figures["scores"] = _attained(found)
            figures["examples"] = _examples(found, images)
        figure = new_figure(width_in=9.0, height_in=4.2)
        draw_amplitudes(
            figure.add_subplot(1, 2, 1), {k: amplitudes_px(paths) for k, paths in groups.items()}
        )
        rose = figure.add_subplot(1, 2, 2, projection="polar")
        draw_directions(rose, {k: directions_rad(paths) for k, paths in groups.items()})  # type: ignore[arg-type]
        figures["saccades"] = figure
        if curves := curves_of(found.cases, found.chance):
            figure = new_figure()
            axes = figure.add_subplot()
            means = {str(kind): np.nanmean(rows, axis=0) for kind, rows in curves.items()}
            draw_performance(axes, means, chance="random")
            if {"predicted", "human"} <= set(means):
                gap = probability_mismatch(means["predicted"], means["human"])
                axes.set_title(f"probability mismatch {gap:.2f}")
            figures["performance"] = figure
    return figures


def _attained(found: Comparison) -> Figure:
    """Every score between chance and the viewers."""
    scales = {}
    for name, kinds in found.intervals.items():
        if not np.isfinite(attainment(name, kinds)):
            continue
        floor, ceiling = kinds["random"].mean, kinds["human"].mean
        one = kinds["predicted"]
        elsewhere = kinds["elsewhere"].mean if "elsewhere" in kinds else np.nan
        values = np.array([one.mean, one.low, one.high, elsewhere])
        scales[name] = (values - floor) / (ceiling - floor)
    figure = new_figure(width_in=7.0, height_in=1.2 + 0.27 * len(scales))
    draw_attainment(figure.add_subplot(), scales)
    return figure


def _examples(found: Comparison, images: Mapping[str, Path]) -> Figure:
    """The best, the middle and the worst picture by ScanMatch: a prediction beside a viewer."""
    row = found.scores["scanmatch"]["predicted"]
    known = np.flatnonzero(np.isfinite(row))
    order = known[np.argsort(-row[known], kind="stable")]
    chosen = order[np.unique(np.linspace(0, len(order) - 1, _EXAMPLES).round().astype(int))]
    cases = [found.cases[k] for k in chosen]
    shape = max(case.size_px[1] / case.size_px[0] for case in cases)
    figure = new_figure(width_in=8.0, height_in=(0.3 + 3.9 * shape) * len(cases))
    for number, (index, case) in enumerate(zip(chosen, cases, strict=True)):
        picture = read_picture(images[case.image]) if case.image in images else None
        for column, (who, path) in enumerate(
            (("predicted", case.predicted[0]), ("viewer", case.human[0]))
        ):
            axes = figure.add_subplot(len(cases), 2, 2 * number + column + 1)
            draw_scanpath(axes, path, picture=picture)
            score = f", ScanMatch {row[index]:.2f}" if not column else ""
            axes.set_title(f"{case.name}: {who} {path.subject}{score}", fontsize=9)
    return figure
