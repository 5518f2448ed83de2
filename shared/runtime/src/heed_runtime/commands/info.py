"""Show what a system is: settings, parameters, operations, data layout, citation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from heed_runtime.errors import UsageError
from heed_runtime.options import SystemOptions
from heed_runtime.recipe import Row, Table
from heed_runtime.settings import GROUPS, to_dict
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from torch import Tensor, nn

    from heed_runtime.app import App
    from heed_runtime.recipe import Card, Exportable


@dataclass(frozen=True, kw_only=True)
class Options(SystemOptions):
    """The settings of the model decide its size."""

    groups: ClassVar[tuple[str, ...]] = GROUPS


def run(app: App, options: Options, settings: Any) -> Result:
    """The card, the model's size at these settings, and all defaults."""
    recipe = app.recipe(options.system)
    model = recipe.model(settings).eval()
    try:
        sizes = measure(recipe.exportable(settings, model))
    except UsageError:  # nothing to export, so no example input
        sizes = {"parameters": count_parameters(model)}
    values = to_dict(settings)
    rows = [row for group in GROUPS for row in _flat(values[group], f"{group}.")]
    presets = list(recipe.presets)
    return Result(
        title=f"{recipe.card.name}: {recipe.card.title}",
        text=_describe(recipe.card, presets),
        tables=[Table(title="the model", rows=[sizes]), Table(title="settings", rows=rows)],
        data={
            "system": recipe.card.name,
            "card": dataclasses.asdict(recipe.card),
            "presets": presets,
            "model": sizes,
            "settings": values,
        },
    )


def measure(exportable: Exportable) -> Row:
    """Parameters of a model, and floating-point operations of its first example.

    A multiply-add counts two. The operations are counted on the meta device, which computes
    nothing, where the model allows it.
    """
    model, example = exportable.model, exportable.examples[0]
    try:
        flops = _count_flops(_frozen(model).to("meta"), [x.to("meta") for x in example])
    except (NotImplementedError, RuntimeError):
        flops = _count_flops(_frozen(model), example)
    return {
        "parameters": count_parameters(model),
        "trainable": count_parameters(model, trainable=True),
        "input": ", ".join("x".join(str(n) for n in tensor.shape) for tensor in example),
        "gflops": flops / 1e9,
    }


def _frozen(model: nn.Module) -> nn.Module:
    """A copy that needs no gradients.

    The counter watches what modules are given: a view of a parameter that needs gradients looks to
    it as if it had a history, also under `no_grad`, and it fails for want of one.
    """
    return copy.deepcopy(model).requires_grad_(False)


def _count_flops(model: nn.Module, example: Sequence[Tensor]) -> int:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    # The counter knows the plain products of attention; not every fused kernel has a formula.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*example)
    return int(counter.get_total_flops())


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """The number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def _describe(card: Card, presets: list[str]) -> str:
    facts = {
        "task": card.task,
        "reads": "; ".join(card.reads),
        "writes": card.writes,
        "verified": card.verified,
        "trained": card.trained,
        "reproduced": card.reproduced,
        "presets": ", ".join([f"{presets[0]} (default)", *presets[1:]]),
        "paper": card.paper,
        "notice": card.notice,
    }
    lines = [f"{name + ':':<12}{text}" for name, text in facts.items() if text]
    return "\n".join([*lines, "", "data layout:", *(f"  {x}" for x in card.layout.splitlines())])


def _flat(values: dict[str, Any], prefix: str) -> list[Row]:
    rows: list[Row] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append({"setting": f"{prefix}{name}", "value": str(value)})
    return rows
