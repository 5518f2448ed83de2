"""Score a trained model on labelled cases, as its paper does: table, JSON, plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heed_core.errors import InputError
from heed_runtime.files import atomic_folder, write_csv, write_json
from heed_runtime.options import OptionalPath
from heed_runtime.recipe import Report, Row, Table
from heed_runtime.report import save_figure, save_table
from heed_runtime.settings import to_dict
from heed_runtime.terminal import Result, rows_of
from heed_runtime.trained import SharedOptions, Trained, data_of

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(SharedOptions):
    """The flags of `evaluate`."""

    data: OptionalPath = None
    """The data set. None: the one of the training."""
    split: str = "test"
    """Which labelled cases: train, val or test."""


def run(app: App, options: Options, settings: Any) -> Result:
    """Predict the cases, score each, sum up, write everything."""
    from heed_runtime import distributed, engine

    trained = options.open(app, settings)
    distributed.join(cuda=engine.uses_cuda(trained.settings.trainer))
    recipe, settings = trained.recipe, trained.settings
    terminal = engine.terminal_of_rank(options.terminal)
    engine.give_notice(recipe)
    root = data_of(trained.run, options.data)
    with trained.run.logging():
        scored = engine.predict(
            recipe,
            settings,
            trained.model,
            recipe.cases(settings, root, options.split),
            use=lambda prediction: [dict(row) for row in recipe.score(settings, prediction)],
            terminal=terminal,
            label="evaluate",
            folder=trained.run.path,
        )
        if distributed.rank() > 0:
            raise SystemExit(0)
        if not scored.results:
            raise InputError(
                f"no case of the split {options.split!r} can be read", path=root, remedy="run check"
            )
        rows = [row for rows in scored.results for row in rows]
        report = recipe.report(settings, rows)
        facts = {
            "system": trained.run.system,
            "split": options.split,
            "n": len(scored.results),
            "data": root.resolve(),
            "metrics": report.metrics,
            "skipped": scored.skipped,
            "weights_sha256": trained.run.weights_hash(),
            "settings": to_dict(settings),
        }
        out = trained.run.evaluation(options.split)
        _write(out, facts, rows, report)
    return _result(trained, options.split, facts, report, scored.skipped, out)


def _write(out: Path, facts: Mapping[str, Any], rows: Sequence[Row], report: Report) -> None:
    """Replace the folder of the split as a whole."""
    with atomic_folder(out, overwrite=True) as folder:
        write_json(folder / "metrics.json", facts)
        write_csv(folder / "cases.csv", rows)
        for table in report.tables:
            save_table(table, folder)
        for stem, figure in report.plots.items():
            save_figure(figure, folder / f"{stem}.png")


def _result(
    trained: Trained,
    split: str,
    facts: Mapping[str, Any],
    report: Report,
    skipped: Sequence[str],
    out: Path,
) -> Result:
    tables = [Table(title="", rows=rows_of(report.metrics, key="metric")), *report.tables]
    if skipped:
        tables.append(Table(title="skipped", rows=[{"case": line} for line in skipped]))
    title = f"{trained.run.system} on {facts['n']} cases of the split {split!r}"
    data = {key: value for key, value in facts.items() if key != "settings"}
    data["tables"] = {table.title: table.rows for table in report.tables}
    return Result(title=title, tables=tables, data=data, files=sorted(out.iterdir()))
