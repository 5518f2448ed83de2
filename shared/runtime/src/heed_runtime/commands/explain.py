"""Show where the model looked: pictures to look at, arrays to compute with."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heed_core.errors import InputError
from heed_runtime.options import Flag, InputPaths, OutPath
from heed_runtime.outputs import Outputs, expand
from heed_runtime.recipe import Explanation, Table
from heed_runtime.report import save_figure
from heed_runtime.terminal import Result
from heed_runtime.trained import UseOptions

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(UseOptions):
    """The flags of `explain`."""

    inputs: InputPaths
    """Files, folders or quoted patterns."""
    out: OutPath
    """The folder for pictures and arrays."""
    overwrite: Flag = False
    """Replace files that are there."""


def run(app: App, options: Options, settings: Any) -> Result:
    """Explain case by case."""
    from heed_runtime import engine

    paths = expand(options.inputs)
    trained = options.open(app, settings)
    recipe, settings = trained.recipe, trained.settings
    engine.give_notice(recipe)
    module = recipe.module(settings, trained.model).to(engine.device_of(settings.trainer)).eval()
    cases = recipe.inputs(settings, paths)
    skip = settings.data.on_error == "skip"
    rows, files, skipped = [], [], []
    with (
        trained.run.logging(),
        Outputs(options.out, overwrite=options.overwrite) as outputs,
        options.terminal.progress("explain", len(cases)) as progress,
        engine.autocast(settings.trainer),
    ):
        for index in range(len(cases)):
            try:
                case = cases[index]
            except InputError as error:
                if not skip:
                    raise
                options.terminal.warn(f"skipped: {error}")
                skipped.append(str(error))
                continue
            found = recipe.explain(settings, module, case)
            written = outputs.put(found.name, functools.partial(write, found))
            rows.append({"case": found.name, "files": " ".join(path.name for path in written)})
            files += written
            progress.advance()
    if not rows:
        raise InputError("none of the inputs can be read", remedy="see the lines above")
    tables = [Table(title="", rows=rows)]
    if skipped:
        tables.append(Table(title="skipped", rows=[{"case": line} for line in skipped]))
    data = {"system": trained.run.system, "n": len(rows), "skipped": skipped}
    title = f"{trained.run.system}: where it looked on {len(rows)} cases"
    return Result(title=title, tables=tables, data=data, files=files)


def write(explanation: Explanation, out: Path) -> list[Path]:
    """Write the arrays of an explanation as one npz file, its figures as PNG, its own files."""
    import numpy as np

    arrays = out / f"{explanation.name}.npz"
    arrays.parent.mkdir(parents=True, exist_ok=True)
    with arrays.open("wb") as file:
        np.savez_compressed(file, **dict(explanation.arrays))  # type: ignore[arg-type]
    figures = [
        save_figure(figure, out / f"{explanation.name}_{suffix}.png")
        for suffix, figure in explanation.figures.items()
    ]
    files = [out / f"{explanation.name}_{suffix}" for suffix in explanation.files]
    for path, save in zip(files, explanation.files.values(), strict=True):
        save(path)
    return [*figures, *files, arrays]
