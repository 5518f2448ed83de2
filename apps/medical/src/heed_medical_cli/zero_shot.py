"""Classify studies by the prompts of findings alone, with a run of MoRE that was not taught them.

Each finding is asked with its prompts (--data.prompts "MI=Myocardial Infarction|heart attack"; the
nearest counts); the cosine with an X-ray or an ECG is its score. Where a finding has denials
(--data.denials "MI=no infarction"; --data.contrast: "no FINDING" for those of CheXpert), the cosine
with the nearest of them is taken off. --data.prompt-file gives both as a table. Areas need no
threshold; for the finding that stands out, each finding's scores are first compared with their own
mean and spread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from heed_core.errors import InputError
from heed_medical.more.prediction import (
    called_rows,
    first_finding_alone,
    score_row,
    zero_shot_rows,
)
from heed_medical.more.prompts import with_prompt_file
from heed_medical_cli.more_embeddings import embed, open_more, refuse_existing, skipped_table
from heed_runtime.files import write_csv
from heed_runtime.options import Flag, OptionalPath
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result, rows_of
from heed_runtime.trained import UseOptions, data_of

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(UseOptions):
    """The flags."""

    data: OptionalPath = None
    """The data set. None: the one of the training."""
    split: str = "test"
    """Which labelled studies: train, val or test."""
    single_label: Flag = False
    """Each study counts for its first finding alone, as in the released script."""
    out: OptionalPath = None
    """Also write labels and scores of each study to this csv."""
    overwrite: Flag = False
    """Replace this file."""


def run(app: App, options: Options, settings: Any) -> Result:
    """Embed the studies and the prompts, compare them, sum up.

    Raises:
        InputError: There is no study with a finding, or no text tower.
    """
    refuse_existing([options.out], overwrite=options.overwrite)
    trained = open_more(app, options, settings)
    if "text" not in trained.settings.model.modalities:
        raise InputError("has no text tower to ask with", path=trained.run.path)
    root = data_of(trained.run, options.data)
    asked = with_prompt_file(trained.settings.data)
    trained = replace(trained, settings=replace(trained.settings, data=asked))
    names = asked.labels
    if not names:
        raise InputError("names no finding", path=root, remedy="name them with --data.labels")
    found, skipped = embed(
        trained,
        trained.recipe.cases(trained.settings, root, options.split),
        options.terminal,
        "zero-shot",
    )
    if options.single_label:
        found = [replace(one, labels=first_finding_alone(one.labels)) for one in found]
    rows = [score_row(one) for one in found]
    table = zero_shot_rows(rows, names)
    called = called_rows(rows, names)
    metrics: dict[str, float] = {}
    for modality in ("xray", "ecg"):
        for score in ("auroc", "auprc"):
            values = [float(r[score] or 0) for r in table if r["modality"] == modality]
            known = [value for value in values if np.isfinite(value)]
            if known:
                metrics[f"{modality}_{score}"] = float(np.mean(known))
    metrics |= {
        f"{row['modality']}_called_right": float(row["called right"] or 0) for row in called
    }
    prompts: list[Row] = [
        {
            "finding": name,
            "prompts": " | ".join(asked.prompts_of(name)),
            "denials": " | ".join(asked.denials_of(name)),
        }
        for name in names
    ]
    files = []
    if options.out is not None:
        kept = [
            {k: v for k, v in row.items() if not k.endswith(("embedding", "item"))} for row in rows
        ]
        files.append(write_csv(options.out, kept))
    return Result(
        title=f"zero-shot on {len(rows)} studies of the split {options.split!r}",
        tables=[
            Table(title="", rows=rows_of(metrics, key="metric")),
            Table(title="prompts", rows=prompts),
            Table(title="findings", rows=table),
            Table(title="the finding that stands out", rows=called),
            *skipped_table(skipped),
        ],
        data={
            "n": len(rows),
            "metrics": metrics,
            "prompts": prompts,
            "findings": table,
            "called": called,
            "skipped": skipped,
        },
        files=files,
    )
