"""A trained MoRE, opened by the verbs that compute with embeddings: retrieve, zero-shot, probe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heed_core.errors import InputError
from heed_core.folders import files_under
from heed_medical.more.prediction import StudyPrediction
from heed_runtime import engine
from heed_runtime.errors import UsageError
from heed_runtime.recipe import Row, SizedData, Table
from heed_runtime.run import Run

if TYPE_CHECKING:
    from heed_runtime.app import App
    from heed_runtime.terminal import Terminal
    from heed_runtime.trained import Trained, UseOptions


def open_more(app: App, options: UseOptions, settings: Any) -> Trained:
    """Open a run of MoRE.

    Raises:
        InputError: It is no run.
        UsageError: It is a run of another system.
    """
    system = Run.open(options.run, app).system
    if system != "more":
        raise UsageError(f"{options.run} is a run of {system}, this verb needs one of more")
    trained = options.open(app, settings)
    engine.give_notice(trained.recipe)
    return trained


def embed(
    trained: Trained, studies: SizedData, terminal: Terminal, label: str
) -> tuple[Sequence[StudyPrediction], Sequence[str]]:
    """The predictions of studies, and a line for each that was skipped.

    Raises:
        InputError: None can be read, or one cannot and `data.on_error` is "stop".
    """

    def keep(prediction: StudyPrediction) -> StudyPrediction:
        return prediction

    with trained.run.logging():
        found = engine.predict(
            trained.recipe,
            trained.settings,
            trained.model,
            studies,
            use=keep,
            terminal=terminal,
            label=label,
            folder=trained.run.path,
        )
    if not found.results:
        raise InputError("none of the studies can be read", remedy="see the lines above")
    return found.results, found.skipped


def refuse_existing(files: Iterable[Path | None], *, overwrite: bool) -> None:
    """Do not write over files that are there, unless that is wanted.

    Raises:
        InputError: One is there.
    """
    for path in files:
        if path is not None and path.exists() and not overwrite:
            raise InputError("is there already", path=path, remedy="add --overwrite to replace it")


def skipped_table(lines: Sequence[str]) -> list[Table]:
    """A table of what was skipped; none where nothing was."""
    rows: list[Row] = [{"why": line} for line in lines]
    return [Table(title="skipped", rows=rows)] if rows else []


def is_index(path: Path) -> bool:
    """Whether a path is an index of embeddings or a folder that `predict` wrote."""
    if path.is_file():
        return path.suffix == ".safetensors"
    if not path.is_dir() or any(path.glob("*.csv")):
        return False
    return any(file.suffix == ".npz" for file in files_under(path))
