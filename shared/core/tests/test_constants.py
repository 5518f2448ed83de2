"""Modules that are built on the meta device are whole once their weights are loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from heed_core.attention.linear import LinearAttention
from heed_core.attention.multi_axis import PartitionAttention
from heed_core.attention.reduced import ReducedAttention
from heed_core.relative import AlibiBias

MAKERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "partition": (lambda: PartitionAttention(12, heads=3, size=(2, 3)), (1, 4, 6, 12)),
    "cholesky": (lambda: ReducedAttention(12, qk="cholesky"), (1, 5, 12)),
    "retention": (
        lambda: LinearAttention(
            12, heads=3, causal=True, decay="retention", features="identity", normalise=False
        ),
        (1, 5, 12),
    ),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("assign", [True, False])
def test_a_module_of_the_meta_device_is_whole_when_loaded(name: str, assign: bool) -> None:
    make, shape = MAKERS[name]
    module, x = make(), torch.randn(shape)
    with torch.device("meta"):
        twin = make()
    if not assign:
        twin.to_empty(device="cpu")
        for buffer in twin.buffers():  # what memory may hold
            buffer.fill_(7)
    twin.load_state_dict(module.state_dict(), assign=assign)
    assert torch.equal(twin(x), module(x))
    assert torch.equal(copy.deepcopy(twin)(x), module(x))


def test_constants_are_moved_and_not_saved() -> None:
    bias = AlibiBias(4).to(torch.bfloat16)
    assert not bias.state_dict()
    bias.load_state_dict({})
    assert bias.slopes.dtype == torch.bfloat16


def test_who_loads_weights_in_inference_mode_may_train_later() -> None:
    for make, shape in MAKERS.values():
        module = make()
        state = module.state_dict()
        with torch.inference_mode():
            module.load_state_dict(state)
        module(torch.randn(shape, requires_grad=True)).sum().backward()
