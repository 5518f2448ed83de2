"""Fit a logistic regression to frozen embeddings of a run of MoRE: what can be read from them.

The training studies of a labelled data set are embedded and one regression per finding is fitted;
the validation studies choose its penalty, the test studies give areas with 95 % intervals. --embed
names the embeddings: of X-rays, of ECGs, of reports, or several of them side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from heed_core.errors import InputError
from heed_medical.classification.findings import Findings, summarise_findings
from heed_medical.classification.metrics import Summary
from heed_medical.more.prediction import StudyPrediction
from heed_medical.more.probes import LinearProbe, choose_probe
from heed_medical_cli.more_embeddings import embed, open_more, refuse_existing, skipped_table
from heed_runtime.errors import UsageError
from heed_runtime.files import atomic_write, write_csv
from heed_runtime.options import Flag, OptionalPath
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result, rows_of
from heed_runtime.trained import Trained, UseOptions, data_of

if TYPE_CHECKING:
    from pathlib import Path

    from heed_runtime.app import App

Modality = Literal["xray", "ecg", "text"]


@dataclass(frozen=True, kw_only=True)
class Options(UseOptions):
    """The flags."""

    data: OptionalPath = None
    """The labelled data set, which may be another one. None: that of the training."""
    embed: tuple[Modality, ...] = ("ecg",)
    """Whose embeddings are read; several are joined."""
    before_projection: Flag = False
    """Read the towers' vectors instead of the embeddings in the common space."""
    penalties: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    """Pulls of the weights to 0, of which the validation studies choose one."""
    out: OptionalPath = None
    """Also write the probabilities of the test studies to this csv, and the probe beside it."""
    overwrite: Flag = False
    """Replace these files."""

    def __post_init__(self) -> None:
        if not self.embed or len(set(self.embed)) < len(self.embed):
            raise ValueError(f"embed must be one or more different modalities, got {self.embed}")
        if not self.penalties or not all(0 <= p < float("inf") for p in self.penalties):
            raise ValueError(f"penalties must be numbers of at least 0, got {self.penalties}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """The embeddings and labels of a split."""

    names: Sequence[str]
    vectors: np.ndarray
    labels: np.ndarray
    groups: np.ndarray


def run(app: App, options: Options, settings: Any) -> Result:
    """Embed three splits, fit, score.

    Raises:
        InputError: A split or a finding is missing.
        UsageError: The model does not have a modality.
    """
    out = options.out
    beside = None if out is None else out.with_suffix(".npz")
    refuse_existing([out, beside], overwrite=options.overwrite)
    trained = open_more(app, options, settings)
    if lacking := set(options.embed) - set(trained.settings.model.modalities):
        raise UsageError(f"{options.run} has no tower of {', '.join(sorted(lacking))}")
    root = data_of(trained.run, options.data)
    names = trained.settings.data.labels
    if not names:
        raise InputError("names no finding", path=root, remedy="name them with --data.labels")
    if options.before_projection:
        same = {name: nn.Identity() for name in trained.settings.model.modalities}
        trained.model.projectors = nn.ModuleDict(same)
    parts: dict[str, Part] = {}
    skipped: list[str] = []
    for split in ("train", "val", "test"):
        parts[split], lost = _part(trained, options, root, split)
        skipped += lost
    kept = _both_kinds(parts["train"])
    if not kept:
        raise InputError("has no finding that is both present and absent in training", path=root)
    fitted = _fit(parts, kept, tuple(names[k] for k in kept), options.penalties)
    left_out = [name for k, name in enumerate(names) if k not in kept]
    title = f"linear probe on {' + '.join(options.embed)}: penalty {fitted.penalty:g}"
    if left_out:
        title += f"; left out, with one kind of training study alone: {', '.join(left_out)}"
    summary = fitted.summary
    return Result(
        title=title,
        tables=[
            Table(title="", rows=rows_of(summary.metrics, key="metric")),
            Table(title="findings", rows=summary.rows),
            *skipped_table(skipped),
        ],
        data={
            "studies": {name: len(part.names) for name, part in parts.items()},
            "penalty": fitted.penalty,
            "metrics": summary.metrics,
            "findings": summary.rows,
            "left_out": left_out,
            "skipped": skipped,
        },
        files=[] if options.out is None else _write(options.out, parts["test"].names, fitted),
    )


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A probe, and how it does on the test studies."""

    findings: tuple[str, ...]
    probe: LinearProbe
    penalty: float
    probabilities: np.ndarray
    summary: Summary


def _fit(
    parts: Mapping[str, Part],
    kept: Sequence[int],
    names: tuple[str, ...],
    penalties: Sequence[float],
) -> Fitted:
    train, val, test = (parts[split] for split in ("train", "val", "test"))
    probe, penalty = choose_probe(
        (train.vectors, train.labels[:, kept]),
        (val.vectors, val.labels[:, kept]),
        penalties=penalties,
    )
    probabilities = probe.probabilities(test.vectors)
    summary = summarise_findings(
        Findings(
            names=names,
            probabilities=probabilities,
            labels=test.labels[:, kept],
            groups=test.groups,
        )
    )
    return Fitted(
        findings=names,
        probe=probe,
        penalty=penalty,
        probabilities=probabilities,
        summary=summary,
    )


def _write(out: Path, studies: Sequence[str], fitted: Fitted) -> list[Path]:
    """The probabilities as csv, and beside it the probe as npz."""
    cases: list[Row] = [
        {"study": study, **dict(zip(fitted.findings, map(float, row), strict=True))}
        for study, row in zip(studies, fitted.probabilities, strict=True)
    ]
    probe = fitted.probe
    with atomic_write(out.with_suffix(".npz")) as path, path.open("wb") as stream:
        np.savez(
            stream,
            weight=probe.weight,
            bias=probe.bias,
            mean=probe.mean,
            std=probe.std,
            findings=np.array(fitted.findings),
        )
    return [write_csv(out, cases), out.with_suffix(".npz")]


def _both_kinds(part: Part) -> list[int]:
    """The findings that are present in some studies and absent in others."""
    kept = []
    for k, column in enumerate(part.labels.T):
        if len(np.unique(column[np.isfinite(column)])) > 1:
            kept.append(k)
    return kept


def _part(trained: Trained, options: Options, root: Path, split: str) -> tuple[Part, Sequence[str]]:
    studies = trained.recipe.cases(trained.settings, root, split)
    found, skipped = embed(trained, studies, options.terminal, split)
    complete = [one for one in found if set(options.embed) <= set(one.embeddings)]
    if not complete:
        raise InputError(
            f"has no study of the split {split!r} with {' and '.join(options.embed)}", path=root
        )
    names = trained.settings.data.labels
    subjects: dict[str, int] = {}
    return (
        Part(
            names=[one.name for one in complete],
            vectors=np.stack([_joined(one, options.embed) for one in complete]),
            labels=np.array(
                [[_number(one.labels.get(name)) for name in names] for one in complete]
            ),
            groups=np.array(
                [subjects.setdefault(one.subject or one.name, len(subjects)) for one in complete]
            ),
        ),
        skipped,
    )


def _joined(one: StudyPrediction, names: Sequence[str]) -> np.ndarray:
    vectors = [one.embeddings[name] for name in names]
    return np.asarray(np.concatenate(vectors))


def _number(label: int | None) -> float:
    return float("nan") if label is None else float(label)
