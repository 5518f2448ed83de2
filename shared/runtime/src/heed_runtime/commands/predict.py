"""Predict files, folders and patterns; writes files of the domain's own formats."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heed_core.errors import InputError
from heed_runtime.options import Flag, InputPaths, OutPath
from heed_runtime.outputs import ERRORS, Outputs, append_json, expand
from heed_runtime.recipe import SizedData, Table
from heed_runtime.terminal import Result
from heed_runtime.trained import SharedOptions

if TYPE_CHECKING:
    from heed_runtime.app import App


SHOWN = 50


@dataclass(frozen=True, kw_only=True)
class Options(SharedOptions):
    """The flags of `predict`."""

    inputs: InputPaths
    """Files, folders or quoted patterns."""
    out: OutPath
    """The folder for the predictions."""
    overwrite: Flag = False
    """Replace files that are there."""
    resume: Flag = False
    """Go on where an earlier call with the same run and the same folder was stopped."""


@dataclass(frozen=True)
class Remaining:
    """The cases that are still to be predicted; each is read when it is asked for."""

    cases: SizedData
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.cases[self.indices[index]]

    @property
    def read_ahead(self) -> int:
        """As the cases say."""
        return int(getattr(self.cases, "read_ahead", 0))

    @property
    def skipped(self) -> Sequence[str]:
        """As the cases say."""
        skipped: Sequence[str] = getattr(self.cases, "skipped", ())
        return skipped


def run(app: App, options: Options, settings: Any) -> Result:
    """Predict case by case; each prediction is written before the next case is predicted."""
    from heed_runtime import distributed, engine

    paths = expand(options.inputs)
    trained = options.open(app, settings)
    distributed.join(cuda=engine.uses_cuda(trained.settings.trainer))
    recipe, settings = trained.recipe, trained.settings
    terminal = engine.terminal_of_rank(options.terminal)
    engine.give_notice(recipe)
    cases = recipe.inputs(settings, paths)
    outputs = Outputs(
        options.out,
        overwrite=options.overwrite,
        maker=trained.run.weights_hash(),
        resume=options.resume,
        inputs=paths,
    )
    with trained.run.logging(), outputs, _told_to_resume():
        there = outputs.done
        left = remaining(cases, there) if there else cases

        def write(prediction: Any) -> dict[str, Any]:
            files = outputs.put(
                prediction.name, lambda out: recipe.write_prediction(settings, prediction, out)
            )
            return {"case": prediction.name, "files": [str(path) for path in files]}

        done = engine.predict(
            recipe,
            settings,
            trained.model,
            left,
            use=write,
            terminal=terminal,
            label="predict",
            folder=trained.run.path,
            lost=lambda fault: append_json(options.out / ERRORS, {"error": fault.line}),
        )
    if distributed.rank() > 0:
        raise SystemExit(0)
    if not done.results and not there:
        raise InputError("none of the inputs can be read", remedy="see the lines above")
    earlier = len(cases) - len(left)
    return _result(trained.run.system, list(done.results), list(done.skipped), earlier=earlier)


@contextlib.contextmanager
def _told_to_resume() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        raise type(stop)("the same command with --resume goes on from here") from None


def remaining(cases: SizedData, there: Collection[str]) -> Remaining:
    """The cases whose names are not in `there`; those that cannot be read are met again."""
    names: Sequence[str] | None = getattr(cases, "names", None)

    def is_there(index: int) -> bool:
        if names is not None:
            return names[index] in there
        try:
            return cases[index].name in there
        except InputError:
            return False

    return Remaining(cases, [index for index in range(len(cases)) if not is_there(index)])


def _result(
    system: str, results: list[dict[str, Any]], skipped: list[str], *, earlier: int
) -> Result:
    rows = [{"case": row["case"], "files": " ".join(row["files"])} for row in results[:SHOWN]]
    if len(results) > SHOWN:
        rows.append({"case": "...", "files": f"{len(results) - SHOWN} more (--json lists all)"})
    tables = [Table(title="", rows=rows)]
    if skipped:
        tables.append(Table(title="skipped", rows=[{"case": line} for line in skipped]))
    data = {
        "system": system,
        "n": len(results),
        "earlier": earlier,
        "predictions": results,
        "skipped": skipped,
    }
    files = [Path(name) for row in results for name in row["files"]]
    title = f"{system}: {len(results)} cases" + (f", {earlier} were there" if earlier else "")
    return Result(title=title, tables=tables, data=data, files=files)
