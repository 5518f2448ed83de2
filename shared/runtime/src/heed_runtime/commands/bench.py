"""Measure speed and peak memory here, beside the peers that are installed."""

from __future__ import annotations

import multiprocessing
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from heed_runtime.options import OptionalPath, SystemOptions
from heed_runtime.recipe import Contender, Row, Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    import torch
    from torch import nn

    from heed_core.testing.benchmark import Measurement
    from heed_runtime.app import App

Mode = Literal["training", "inference"]
MODES: tuple[Mode, ...] = ("training", "inference")


@dataclass(frozen=True, kw_only=True)
class Options(SystemOptions):
    """The flags of `bench`."""

    out: OptionalPath = None
    """Also write the numbers into this JSON file."""
    rounds: int = 10
    """Timed calls of each contender; the contenders take turns."""
    memory: bool = True
    """Measure peak memory too, each contender in a process of its own."""
    modes: tuple[Mode, ...] = MODES
    """What to measure: training steps, inference, or both."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"modes must be different ones of {MODES}, got {self.modes}")


def run(app: App, options: Options, settings: Any) -> Result:
    """Time all contenders, interleaved, in this one run, then the stages of ours."""
    from heed_runtime.engine import device_of
    from heed_runtime.files import write_json

    device = device_of(settings.trainer)
    recipe = app.recipe(options.system)
    contenders = recipe.contenders(settings)
    here = [contender for contender in contenders if contender.missing is None]
    rows: list[dict[str, Any]] = []
    with options.terminal.progress(
        "bench", len(options.modes) + len(here) * options.memory
    ) as progress:
        for mode in options.modes:
            rows += _rows(here, _times(here, mode, device, rounds=options.rounds), mode)
            progress.advance(note=mode)
        if options.memory:
            for index, contender in enumerate(contenders):
                if contender.missing is None:
                    found = _in_fresh_process(app, options.system, settings, index, options.modes)
                    for row in rows:
                        if row["name"] == contender.name:
                            row["peak_mib"] = found[row["mode"]]
                    progress.advance(note=contender.name)
    stages = stage_rows(recipe.stages(settings), device, rounds=options.rounds)
    missing: list[Row] = [
        {"name": contender.name, "why": contender.missing}
        for contender in contenders
        if contender.missing is not None
    ]
    data = {
        "system": options.system,
        "device": _device_name(device),
        "rows": rows,
        "stages": stages,
        "missing": missing,
    }
    return Result(
        title=f"{options.system} on {data['device']}, median of {options.rounds} rounds",
        tables=[
            *(
                Table(title=mode, rows=[row for row in rows if row["mode"] == mode])
                for mode in options.modes
            ),
            *([Table(title="stages", rows=stages)] if stages else []),
            *([Table(title="not measured", rows=missing)] if missing else []),
        ],
        data=data,
        files=[] if options.out is None else [write_json(options.out, data)],
    )


def _rows(
    contenders: list[Contender], found: Mapping[str, Measurement], mode: Mode
) -> list[dict[str, Any]]:
    return [
        {
            "name": contender.name,
            "mode": mode,
            "ms": 1e3 * found[contender.name].median_s,
            "items_per_s": contender.items / found[contender.name].median_s,
            "time_to_ours": found[contender.name].ratio,
            "peak_mib": None,
        }
        for contender in contenders
    ]


def stage_rows(
    stages: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int
) -> list[Row]:
    """The time of each stage, how often it can run in a second, and its share of their sum."""
    from heed_core.testing.benchmark import measure

    if not stages:
        return []
    found = measure(stages, rounds=rounds, warmup=2, device=device, memory=False)
    total = sum(item.median_s for item in found)
    return [
        {
            "stage": item.name,
            "ms": 1e3 * item.median_s,
            "calls_per_s": 1 / item.median_s,
            "share": item.median_s / total,
        }
        for item in found
    ]


def _times(
    contenders: list[Contender], mode: Mode, device: torch.device, *, rounds: int
) -> dict[str, Measurement]:
    from heed_core.testing.benchmark import measure

    steps = {item.name: make_step(item, mode, device) for item in contenders}
    found = measure(steps, rounds=rounds, warmup=2, device=device, memory=False)
    return {item.name: item for item in found}


def make_step(contender: Contender, mode: Mode, device: torch.device) -> Callable[[], object]:
    """One training step (forward, backward, AdamW) or one inference of a contender."""
    import torch

    torch.manual_seed(0)
    model: nn.Module = contender.build().to(device).train(mode == "training")
    inputs = tuple(x.to(device) for x in contender.inputs())
    if mode == "inference":

        @torch.inference_mode()
        def infer() -> object:
            return model(*inputs)

        return infer
    optimizer = torch.optim.AdamW(model.parameters())

    def train() -> None:
        optimizer.zero_grad()
        contender.loss(model(*inputs)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return train


def _in_fresh_process(
    app: App, system: str, settings: Any, index: int, modes: tuple[Mode, ...]
) -> dict[Mode, float]:
    """Peak memory where nothing was allocated and freed before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peaks, app, system, settings, index, modes).result()


def peaks(
    app: App, system: str, settings: Any, index: int, modes: tuple[Mode, ...] = MODES
) -> dict[Mode, float]:
    """The most memory (MiB) of a call of a contender, with its model, in each mode."""
    from heed_core.testing.benchmark import peak_memory_mib
    from heed_runtime.engine import device_of

    device = device_of(settings.trainer)
    contender = app.recipe(system).contenders(settings)[index]

    def call(mode: Mode) -> Callable[[], object]:
        return lambda: make_step(contender, mode, device)()

    found: dict[Mode, float] = {}
    for mode in sorted(modes):  # inference first: it leaves nothing behind
        # The first call fills the libraries' own buffers, which are nobody's cost.
        call(mode)()
        found[mode] = peak_memory_mib(call(mode), device=device)
    return found


def _device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
