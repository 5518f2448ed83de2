"""Predict files, folders and patterns; writes files of the domain's own formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heed_core.errors import InputError
from heed_runtime.options import Flag, InputPaths, OutPath
from heed_runtime.outputs import Outputs, expand
from heed_runtime.recipe import Table
from heed_runtime.terminal import Result
from heed_runtime.trained import SharedOptions

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(SharedOptions):
    """The flags of `predict`."""

    inputs: InputPaths
    """Files, folders or quoted patterns."""
    out: OutPath
    """The folder for the predictions."""
    overwrite: Flag = False
    """Replace files that are there."""


def run(app: App, options: Options) -> Result:
    """Predict case by case; each prediction is written before the next case is predicted."""
    from heed_runtime import distributed, engine

    paths = expand(options.inputs)
    trained = options.open(app)
    distributed.join(cuda=engine.uses_cuda(trained.settings.trainer))
    recipe, settings = trained.recipe, trained.settings
    terminal = engine.terminal_of_rank(options.terminal)
    engine.give_notice(recipe, terminal)
    cases = recipe.inputs(settings, paths)
    with trained.run.logging(), Outputs(options.out, overwrite=options.overwrite) as outputs:

        def write(prediction: Any) -> dict[str, Any]:
            files = outputs.put(
                prediction.name, lambda out: recipe.write_prediction(settings, prediction, out)
            )
            return {"case": prediction.name, "files": [str(path) for path in files]}

        done = engine.predict(
            recipe,
            settings,
            trained.model,
            cases,
            use=write,
            terminal=terminal,
            label="predict",
            folder=trained.run.path,
        )
    if distributed.rank() > 0:
        raise SystemExit(0)
    if not done.results:
        raise InputError("none of the inputs can be read", remedy="see the lines above")
    return _result(trained.run.system, list(done.results), list(done.skipped))


def _result(system: str, results: list[dict[str, Any]], skipped: list[str]) -> Result:
    rows = [{"case": row["case"], "files": " ".join(row["files"])} for row in results]
    tables = [Table(title="", rows=rows)]
    if skipped:
        tables.append(Table(title="skipped", rows=[{"case": line} for line in skipped]))
    data = {"system": system, "n": len(results), "predictions": results, "skipped": skipped}
    files = [Path(name) for row in results for name in row["files"]]
    return Result(title=f"{system}: {len(results)} cases", tables=tables, data=data, files=files)
