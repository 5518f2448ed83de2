"""Write the model as a program that runs without heed, checked against the model."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from heed_core.errors import InputError
from heed_runtime.errors import UsageError
from heed_runtime.files import atomic_write
from heed_runtime.options import Flag, RunOptions
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result
from heed_runtime.trained import Trained, open_trained

if TYPE_CHECKING:
    from torch import Tensor

    from heed_runtime.app import App
    from heed_runtime.recipe import Exportable

Format = Literal["export", "onnx"]
SUFFIXES: dict[str, Format] = {".pt2": "export", ".onnx": "onnx"}
TOLERANCE = 1e-4
"""Largest difference from the model, as a part of the largest output (at least of 1)."""

Program = Callable[..., tuple["Tensor", ...]]


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """The flags of `export`."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The file to write."""
    format: Format | None = None
    """export: a torch.export program (.pt2); onnx: ONNX. None: what the file's suffix says."""
    overwrite: Flag = False
    """Replace the file."""


def run(app: App, options: Options) -> Result:
    """Export, read the file back, compare with the model on all examples, then put it in place."""
    kind = options.format or SUFFIXES.get(options.out.suffix)
    if kind is None:
        raise InputError(
            "the suffix names no format",
            path=options.out,
            remedy=f"end it in {' or '.join(SUFFIXES)}, or add --format",
        )
    if options.out.is_dir():
        raise InputError(
            "is a folder, a file is needed", path=options.out, remedy="name a file in it"
        )
    if options.out.exists() and not options.overwrite:
        raise InputError("exists already", path=options.out, remedy="add --overwrite")
    trained = open_trained(app, options.run, device="cpu", precision="32-true")
    exportable = trained.recipe.exportable(trained.settings, trained.model)
    if kind in exportable.refused:
        others = [name for name in _WRITERS if name not in exportable.refused]
        raise UsageError(
            f"{trained.run.system} cannot be written as {kind}: {exportable.refused[kind]}",
            remedy=f"use --format {others[0]}" if others else None,
        )
    with trained.run.logging(), atomic_write(options.out) as temporary, _silence():
        program = _WRITERS[kind](exportable, temporary)
        rows = compare(exportable, program)
        worst = max(float(row["error"] or 0) for row in rows)
        if not all(row["ok"] for row in rows):
            raise RuntimeError(
                f"the exported program differs from the model by {worst:.3g}; nothing was written"
            )
    return _result(trained, kind, rows, options.out)


def compare(exportable: Exportable, program: Program) -> list[dict[str, Any]]:
    """The largest absolute difference between program and model on each example."""
    import torch

    rows = []
    for inputs in exportable.examples:
        with torch.inference_mode():
            expected = _tuple(exportable.model(*inputs))
        with torch.no_grad():
            found = program(*inputs)
        error, ok = 0.0, len(found) == len(expected)
        for ours, theirs in zip(expected, found, strict=False):
            if ours.shape != theirs.shape:
                error, ok = float("inf"), False
                continue
            difference = float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0
            limit = TOLERANCE * max(1.0, float(ours.abs().max()) if ours.numel() else 0.0)
            error, ok = max(error, difference), ok and difference <= limit
        shapes = " ".join("x".join(map(str, x.shape)) for x in inputs)
        rows.append({"input": shapes, "error": error, "ok": ok})
    return rows


def _write_program(exportable: Exportable, path: Path) -> Program:
    import torch

    program = torch.export.export(
        exportable.model, exportable.examples[0], dynamic_shapes=exportable.dynamic_shapes
    )
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return lambda *inputs: _tuple(loaded(*inputs))


def _write_onnx(exportable: Exportable, path: Path) -> Program:
    import onnxruntime  # type: ignore[import-untyped]
    import torch

    torch.onnx.export(
        exportable.model,
        exportable.examples[0],
        path,
        input_names=list(exportable.input_names),
        output_names=list(exportable.output_names),
        dynamic_shapes=exportable.dynamic_shapes,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def program(*inputs: Tensor) -> tuple[Tensor, ...]:
        named = {item.name: x.numpy() for item, x in zip(session.get_inputs(), inputs, strict=True)}
        return tuple(torch.from_numpy(array) for array in session.run(None, named))

    return program


_WRITERS: dict[str, Callable[[Any, Path], Program]] = {
    "export": _write_program,
    "onnx": _write_onnx,
}


def _tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    import torch

    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporters advise their developers on standard output and by warnings."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [item.level for item in loggers]
    for item in loggers:
        item.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for item, level in zip(loggers, levels, strict=True):
            item.setLevel(level)


def _result(trained: Trained, kind: str, rows: list[dict[str, Any]], out: Path) -> Result:
    shown: list[Row] = [{"input": row["input"], "largest error": row["error"]} for row in rows]
    data = {
        "system": trained.run.system,
        "format": kind,
        "bytes": out.stat().st_size,
        "checks": rows,
        "tolerance": TOLERANCE,
    }
    title = f"{trained.run.system} as {kind}, checked against the model"
    return Result(title=title, tables=[Table(title="", rows=shown)], data=data, files=[out])
