"""A call that raises leaves its cache as it was: made again, corrected, it gives what it should."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from heed_core.attention.bounded_memory import BoundedMemoryAttention
from heed_core.attention.causal_long_short import CausalLongShortAttention
from heed_core.attention.complex import ComplexAttention
from heed_core.attention.diagonal_state import DiagonalStateMixer
from heed_core.attention.dynamic_mask import DynamicMaskAttention
from heed_core.attention.mixture_of_heads import MixtureOfHeads
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.reduced import ReducedAttention
from heed_core.attention.relative_conv import RelativeConvAttention
from heed_core.attention.tensor import TensorAttention
from heed_core.blocks import BlockConfig, Decoder
from heed_core.cache import restores_cache
from heed_core.head_conversion import HeadMixture

TOKENS = 9
MODULES: dict[str, Callable[[], nn.Module]] = {
    "multi-head": lambda: MultiHeadAttention(12, heads=3, causal=True),
    "window": lambda: MultiHeadAttention(12, heads=3, causal=True, window=3),
    "mixture": lambda: HeadMixture(MixtureOfHeads(12, heads=3, shared=2, active=1, causal=True)),
    "dynamic-mask": lambda: DynamicMaskAttention(12, heads=3, keep=3),
    "complex": lambda: ComplexAttention(12, heads=3, causal=True),
    "relative-conv": lambda: RelativeConvAttention(12, heads=3),
    "long-short": lambda: CausalLongShortAttention(12, heads=3, window=4, chunk=4, rank=2),
    "reduced": lambda: ReducedAttention(12, heads=3, qk="symmetric", vo="none", causal=True),
    "tensor": lambda: TensorAttention(12, heads=3, causal=True),
    "tensor-polynomial": lambda: TensorAttention(12, heads=3, causal=True, method="poly"),
}
STATES: dict[str, Callable[[], nn.Module]] = {
    "bounded-memory": lambda: BoundedMemoryAttention(12, heads=3, slots=4, causal=True),
    "diagonal-state": lambda: DiagonalStateMixer(12, causal=True),
    "relative-conv": lambda: RelativeConvAttention(12, heads=3),
    "tensor": lambda: TensorAttention(12, heads=3, causal=True),
    "tensor-polynomial": lambda: TensorAttention(12, heads=3, causal=True, method="poly"),
}

WITHOUT_LENGTH = (BoundedMemoryAttention, DiagonalStateMixer)


def cache_of(module: nn.Module) -> object:
    return module.new_cache(2) if type(module) in WITHOUT_LENGTH else module.new_cache(2, TOKENS)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_a_wrong_mask_leaves_the_cache_alone(name: str) -> None:
    module, x = MODULES[name]().eval(), torch.randn(2, TOKENS, 12)
    cache = cache_of(module)
    first = module(x[:, :4], cache=cache)
    with pytest.raises(ValueError, match="mask must be"):
        module(x[:, 4:7], padding_mask=torch.ones(2, 99, dtype=torch.bool), cache=cache)
    assert cache.length == 4
    later = module(x[:, 4:], cache=cache)
    torch.testing.assert_close(torch.cat([first, later], dim=1), module(x), rtol=1e-4, atol=1e-5)


def test_gradients_that_a_cache_refuses_leave_it_alone() -> None:
    module, x = RelativeConvAttention(12, heads=3).eval(), torch.randn(2, TOKENS, 12)
    cache = cache_of(module)
    with pytest.raises(ValueError, match="holds no gradients"):
        module(x[:, :4], cache=cache)
    with torch.no_grad():
        torch.testing.assert_close(module(x, cache=cache), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.bad_input
@torch.no_grad()
def test_a_wrong_context_leaves_all_caches_of_a_stack_alone() -> None:
    stack = Decoder(BlockConfig(dim=16, heads=2, causal=True), depth=2).eval()
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    cache, short = stack.new_cache(2, 5), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="padding_mask must be"):
        stack(x[:, :2], -context, context_padding_mask=short, cache=cache)
    first = stack(x[:, :2], context, cache=cache)
    with pytest.raises(ValueError, match="padding_mask must be"):
        stack(x[:, 2:4], context_padding_mask=short, cache=cache)
    later = stack(x[:, 2:], cache=cache)
    torch.testing.assert_close(torch.cat([first, later], dim=1), stack(x, context))


@torch.no_grad()
def test_who_interrupts_a_call_may_go_on() -> None:
    module, x = MultiHeadAttention(12, heads=3, causal=True).eval(), torch.randn(2, 5, 12)
    cache = module.new_cache(2, 5)

    @restores_cache
    def interrupted(x: Tensor, *, cache: object) -> None:
        module(x, cache=cache)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(x[:, :2], cache=cache)
    assert cache.length == 0


@pytest.mark.bad_input
@pytest.mark.parametrize("name", STATES)
@torch.no_grad()
def test_another_number_of_sequences_is_named(name: str) -> None:
    module, x = STATES[name]().eval(), torch.randn(2, TOKENS, 12)
    cache = cache_of(module)
    module(x[:, :4], cache=cache)
    with pytest.raises(ValueError, match="the cache holds 2 sequences and the call has 1"):
        module(x[:1, 4:], cache=cache)
    assert cache.length == 4
