"""Write a small data set in the system's real on-disk layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from heed_core.errors import InputError
from heed_runtime import __version__
from heed_runtime.files import atomic_folder, explain_oserror, write_json
from heed_runtime.options import CommonOptions, Flag, SystemName
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App
    from heed_runtime.recipe import Recipe

MARKER = ".heed-sample.json"
"""Says that the program wrote the folder, so that `--overwrite` may replace it."""


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """What to write, and where."""

    system: SystemName
    """The system; `list` names them."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The folder to make."""
    seed: int = 0
    """The same seed writes the same data."""
    overwrite: Flag = False
    """Replace a sample that is there."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def run(app: App, options: Options) -> Result:
    """Write the sample, whole or not at all."""
    count = write_sample(
        app.recipe(options.system), options.out, seed=options.seed, overwrite=options.overwrite
    )
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    row: Row = {"system": options.system, "seed": options.seed, "files": count, "bytes": size}
    return Result(
        title=f"a sample for {options.system}",
        tables=[Table(title="", rows=[row])],
        data={**row, "folder": str(options.out), "n_files": count},
        files=[options.out],
    )


def write_sample(
    recipe: Recipe[Any, Any, Any], out: Path, *, seed: int, overwrite: bool = False
) -> int:
    """Let a recipe write its sample into the folder `out`; returns the number of files.

    Raises:
        InputError: `out` holds something that is not to be replaced, or cannot be written.
    """
    holds_something = out.is_dir() and any(out.iterdir())
    if overwrite and holds_something and not (out / MARKER).exists():
        raise InputError("holds files that are no sample", path=out, remedy="choose another folder")
    with atomic_folder(out, overwrite=overwrite) as folder:
        with explain_oserror(out):
            recipe.sample(folder, seed=seed)
        count = sum(path.is_file() for path in folder.rglob("*"))
        marker = {"system": recipe.card.name, "seed": seed, "heed_version": __version__}
        write_json(folder / MARKER, marker)
    return count
