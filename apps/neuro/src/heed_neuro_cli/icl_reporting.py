"""Rows, tables and plots of an evaluation of in-context regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from heed_neuro.icl import theory
from heed_neuro.icl.flow import Flow, gradient_flow
from heed_neuro.icl.patterns import Pattern
from heed_neuro.icl.risks import Agreement, nearest_step
from heed_neuro.icl.tasks import LinearTask
from heed_neuro_cli.icl_module import ChunkErrors
from heed_neuro_cli.icl_pictures import draw_circuits, draw_dynamics, draw_lengths, flow_of
from heed_runtime.recipe import Report, Row, Table

REFERENCE: Mapping[int, Mapping[str, float]] = {
    length: dict(
        zip(
            ("zero", "vanilla_gd", "debiased_gd", "two_head", "one_head", "ridge"),
            values,
            strict=True,
        )
    )
    for length, values in {
        10: (1.10, 0.495, 0.518, 0.517, 0.751, 0.196),
        20: (1.10, 0.346, 0.354, 0.354, 0.569, 0.134),
        40: (1.10, 0.240, 0.243, 0.243, 0.405, 0.114),
        80: (1.10, 0.175, 0.176, 0.176, 0.289, 0.107),
        160: (1.10, 0.139, 0.140, 0.140, 0.207, 0.103),
    }.items()
}
"""Risks of the paper's task (d = 5, sigma^2 = 0.1) by length: 4e5 sequences of an independent
program, to three places (+- 0.003)."""

FLOW_STEPS = 40_000
"""Euler steps of the theory's flow that is drawn beside a training."""


def rows_of_chunk(found: ChunkErrors) -> list[Row]:
    """Sums of errors; of the first chunk also the circuits and the course of the training."""
    rows: list[Row] = [
        {
            "kind": "errors",
            "case": found.name,
            "length": found.length,
            "count": found.count,
            "predictor": name,
            "total": sums.total,
            "squares": sums.squares,
            "paired": sums.paired,
            "paired_squares": sums.paired_squares,
        }
        for name, sums in found.sums.items()
    ]
    rows.append({"kind": "agreement", "length": found.length, **asdict(found.agreement)})
    if found.pattern is None:
        return rows
    pattern = found.pattern
    for circuit, matrices in (("kq", pattern.kq), ("ov", pattern.ov)):
        rows += [
            {"kind": circuit, "head": head, "row": i, "column": j, "value": float(value)}
            for (head, i, j), value in np.ndenumerate(matrices)
        ]
    rows += [
        {"kind": "step", "step": int(step), "head": head, "omega": float(omega), "mu": float(mu)}
        for step, values in zip(found.steps, found.course, strict=True)
        for head, (omega, mu) in enumerate(values.T)
    ]
    return rows


def summarise(rows: Sequence[Row], task: LinearTask, *, trained: int) -> Report:
    """The table of risks by length, the pattern, and the plots.

    Args:
        rows: Of all chunks.
        task: What the model is evaluated on.
        trained: The length of the contexts that it was trained on.
    """
    risks, paired = _risks(rows)
    pattern = _pattern(rows, task.dim)
    own = risks["model"][task.length if task.length in risks["model"] else min(risks["model"])]
    metrics = {"mse": own[0], "standard_error": own[1], **pattern.metrics(task)}
    alike = _correlations(rows)
    metrics["correlation_with_step"] = alike.get(task.length, min(alike.values()))
    if task.length in risks["model"]:
        for name in ("debiased_gd", "ridge"):
            metrics[f"mse_{name}"] = risks[name][task.length][0]
    heads = len(pattern.kq)
    plots = {"circuits": draw_circuits(pattern)}
    course = flow_of([row for row in rows if row["kind"] == "step"], heads)
    if course is not None:
        plots["dynamics"] = draw_dynamics(course, _theory(course, task))
    if len(risks["model"]) > 1:
        plots["lengths"] = draw_lengths(risks, trained=trained)
    return Report(
        metrics=metrics,
        tables=[
            Table(title=f"mean squared error (noise: {task.noise})", rows=_table(risks)),
            *_beside_reference(risks, task),
            Table(title="difference from debiased GD, same sequences", rows=_table(paired)),
            Table(
                title=f"correlation with {nearest_step(task)}",
                rows=[{"L": length, "model": r} for length, r in sorted(alike.items())],
            ),
            Table(title="heads", rows=_heads(pattern)),
            *(
                [Table(title="exact", rows=_exact(risks, task, trained))]
                if not task.supports
                else []
            ),
        ],
        plots=plots,
    )


Risks = dict[str, dict[int, tuple[float, float]]]


def _risks(rows: Sequence[Row]) -> tuple[Risks, Risks]:
    """Mean and standard error by predictor and length: of errors, and of paired differences."""
    sums: dict[tuple[str, int], np.ndarray] = {}
    for row in rows:
        if row["kind"] == "errors":
            key = (str(row["predictor"]), int(row["length"] or 0))
            names = ("count", "total", "squares", "paired", "paired_squares")
            sums[key] = sums.get(key, np.zeros(5)) + [float(row[name] or 0) for name in names]
    risks: Risks = {}
    paired: Risks = {}
    for (name, length), (n, total, squares, apart, apart_squares) in sums.items():
        for table, first, second in (
            (risks, total, squares),
            (paired, apart, apart_squares),
        ):
            variance = max(0.0, (second - first**2 / n) / max(1.0, n - 1))
            table.setdefault(name, {})[length] = (first / n, float(np.sqrt(variance / n)))
    return risks, paired


def _correlations(rows: Sequence[Row]) -> dict[int, float]:
    """Length -> correlation of the model's predictions with the step's."""
    names = [field.name for field in fields(Agreement)]
    found: dict[int, Agreement] = {}
    for row in rows:
        if row["kind"] == "agreement":
            length = int(row["length"] or 0)
            own = Agreement(**{name: float(row[name] or 0) for name in names})
            found[length] = found.get(length, Agreement()) + own
    return {length: own.correlation for length, own in found.items()}


def _beside_reference(risks: Risks, task: LinearTask) -> list[Table]:
    """Of the paper's task: each risk beside that of an independent program."""
    if task.supports or not task.isotropic or (task.dim, task.noise_variance) != (5, 0.1):
        return []
    rows: list[Row] = []
    for length in sorted(set(REFERENCE) & set(risks["model"])):
        row: dict[str, Any] = {"L": length}
        for name, wanted in REFERENCE[length].items():
            row[name] = f"{risks[name][length][0]:.3f} ({wanted:.3f})"
        rows.append(row)
    title = "beside reference"
    return [Table(title=title, rows=rows)] if rows else []


def _table(risks: Mapping[str, Mapping[int, tuple[float, float]]]) -> list[Row]:
    """A row per length, a column per predictor and one for its standard error."""
    rows: list[Row] = []
    for length in sorted(risks["model"]):
        row: dict[str, Any] = {"L": length}
        for name, found in risks.items():
            mean, error = found[length]
            row[name] = f"{mean:.4f} +- {error:.4f}"
        rows.append(row)
    return rows


def _heads(pattern: Pattern) -> list[Row]:
    return [
        {
            "head": head + 1,
            "omega": float(pattern.omega[head]),
            "mu": float(pattern.mu[head]),
            "diag_homogeneity": float(pattern.diag_homogeneity[head]),
            "off_diag_max": float(pattern.off_diag_max[head]),
            "y_row_max": float(pattern.y_row_max[head]),
            "last_entry_share": float(pattern.last_entry_share[head]),
            "live": int(pattern.live[head]),
        }
        for head in range(len(pattern.kq))
    ]


def _exact(risks: Risks, task: LinearTask, trained: int) -> list[Row]:
    """What theory says, by length, to hold against the table."""
    from heed_neuro.icl.risks import at_length

    rows: list[Row] = []
    for length in sorted(risks["model"]):
        here = at_length(task, length)
        rows.append(
            {
                "L": length,
                "zero": theory.zero_risk(here),
                "vanilla_gd": theory.gradient_risk(theory.vanilla_rate(here), here, debiased=False),
                "debiased_gd": theory.gradient_risk(
                    theory.debiased_rate(here), here, debiased=True
                ),
                "best_step": theory.preconditioned_risk(
                    theory.preconditioner(here, debiased=True), here, debiased=True
                ),
                "linear_attention": theory.linear_attention_risk(here, trained=trained),
                "eta*": theory.debiased_rate(here),
                "bayes_high_dim": (
                    theory.high_dimensional_bayes_risk(task.dim / length, task.noise_variance)
                    if task.isotropic
                    else None
                ),
            }
        )
    return rows


def _theory(course: Flow, task: LinearTask) -> Flow | None:
    """The flow of the approximate loss from where the training began."""
    if task.supports or not task.isotropic:
        return None
    steps = np.unique(np.geomspace(1, FLOW_STEPS, 120).astype(int))
    return gradient_flow(course.omega[0], course.mu[0], task, steps=[0, *steps.tolist()])


def _pattern(rows: Sequence[Row], dim: int) -> Pattern:
    found = {}
    for circuit in ("kq", "ov"):
        entries = [row for row in rows if row["kind"] == circuit]
        shape = tuple(
            1 + max(int(row[name] or 0) for row in entries) for name in ("head", "row", "column")
        )
        matrices = np.zeros(shape)
        for row in entries:
            place = tuple(int(row[name] or 0) for name in ("head", "row", "column"))
            matrices[place] = row["value"]
        found[circuit] = matrices
    return Pattern(kq=found["kq"], ov=found["ov"], dim=dim)
