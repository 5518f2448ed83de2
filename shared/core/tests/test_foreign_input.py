"""What does not fit is refused in one way, and nothing is read that belongs to others."""

from __future__ import annotations

import pytest
import torch

from heed_core.attention.bilevel import routed_attention
from heed_core.attention.causal_long_short import CausalLongShortAttention
from heed_core.attention.class_attention import class_attention
from heed_core.attention.complex import ComplexAttention
from heed_core.attention.connectivity import gathered_attention
from heed_core.attention.delta_rule import delta_rule
from heed_core.attention.dynamic_mask import (
    DynamicMaskAttention,
    dynamic_mask_attention,
    dynamic_scores,
)
from heed_core.attention.gaussian import gaussian_weights
from heed_core.attention.linear import LinearAttention, linear_attention
from heed_core.attention.local import local_attention
from heed_core.attention.long_short import tiled_attention
from heed_core.attention.mixture_of_heads import MixtureOfHeads
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.relative_conv import RelativeConvAttention, depthwise_conv
from heed_core.attention.tensor import tensor_attention_poly
from heed_core.head_routing import mixture_gates
from heed_core.key_selection import keep_most

pytestmark = pytest.mark.bad_input

X = torch.randn(2, 7, 12)
REAL = torch.ones(2, 7, dtype=torch.bool)
MODULES = {
    "multi_head": lambda: MultiHeadAttention(12, heads=3),
    "window": lambda: MultiHeadAttention(12, heads=3, causal=True, window=3),
    "mixture": lambda: MixtureOfHeads(12, heads=3, shared=1, active=1),
    "complex": lambda: ComplexAttention(12, heads=3),
    "relative_conv": lambda: RelativeConvAttention(12, heads=3),
    "dynamic_mask": lambda: DynamicMaskAttention(12, heads=3, keep=2),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_mask_is_looked_at_beside_a_padding_mask(name: str) -> None:
    module = MODULES[name]()
    for padding in (None, REAL):
        with pytest.raises(TypeError, match=r"mask must be boolean .*got torch.float32"):
            module(X, mask=torch.ones(7, 7), padding_mask=padding)
        with pytest.raises(ValueError, match=r"mask must be broadcastable .*\(5, 5\)"):
            module(X, mask=torch.ones(5, 5, dtype=torch.bool), padding_mask=padding)
    with pytest.raises(ValueError, match="padding_mask must be"):
        module(X, padding_mask=torch.ones(2, 100, dtype=torch.bool))


@pytest.mark.parametrize(
    "module", [MultiHeadAttention, DynamicMaskAttention, MixtureOfHeads, LinearAttention]
)
def test_a_context_has_channels(module: type) -> None:
    options = {
        DynamicMaskAttention: {"keep": 2, "causal": False},
        MixtureOfHeads: {"shared": 1, "active": 1},
    }
    for width in (0, -1):
        with pytest.raises(ValueError, match=f"context_dim must be at least 1, got {width}"):
            module(12, heads=3, context_dim=width, **options.get(module, {}))


def heads(n: int = 6, g: int = 2, d: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, g, n, d).to(dtype)


WRONG = {
    "values of fewer keys": (
        lambda: dynamic_mask_attention(heads(), heads(), heads(5), torch.rand(2, 2, 6), keep=3),
        ValueError,
        "value must have",
    ),
    "half a key": (
        lambda: DynamicMaskAttention(12, heads=3, keep=2.5),  # type: ignore[arg-type]
        ValueError,
        "keep must be at least 1 and whole, got 2.5",
    ),
    "no key": (
        lambda: keep_most(torch.rand(1, 1, 3), torch.ones(1, 1, 3, 3, dtype=torch.bool), 0),
        ValueError,
        "keep must be at least 1",
    ),
    "other score weights": (
        lambda: dynamic_scores(heads(), torch.rand(2, 7), None, torch.rand(2)),
        ValueError,
        "weight must be",
    ),
    "form": (
        lambda: dynamic_scores(
            heads(),
            torch.rand(2, 8),
            None,
            torch.rand(2),
            form="expo",  # type: ignore[arg-type]
        ),
        ValueError,
        "form must be one of",
    ),
    "a key that is none": (
        lambda: gathered_attention(
            heads(), heads(5), heads(5), torch.full((2, 2, 6, 1), 5, dtype=torch.int64)
        ),
        ValueError,
        "indices must be from 0 to 4",
    ),
    "keys of fewer heads": (
        lambda: gathered_attention(
            heads(), heads(g=1), heads(g=1), torch.zeros(2, 2, 6, 1, dtype=torch.int64)
        ),
        ValueError,
        "key must have the batch and heads",
    ),
    "a region that is none": (
        lambda: routed_attention(
            *[heads(g=3)] * 3, torch.full((2, 3, 1), 3, dtype=torch.int64), heads=2
        ),
        ValueError,
        "routes must be from 0 to 2",
    ),
    "routes that are no numbers": (
        lambda: routed_attention(*[heads(g=3)] * 3, torch.zeros(2, 3, 1), heads=2),
        TypeError,
        "routes must be int64",
    ),
    "heads of regions": (
        lambda: routed_attention(
            *[heads(g=3)] * 3, torch.zeros(2, 3, 1, dtype=torch.int64), heads=3
        ),
        ValueError,
        "heads must divide",
    ),
    "weights as padding": (
        lambda: tensor_attention_poly(*[heads(d=2)] * 5, real1=torch.full((2, 6), 0.5)),
        TypeError,
        "real1 must be boolean",
    ),
    "whole numbers": (
        lambda: linear_attention(*[heads(dtype=torch.int64)] * 3),
        TypeError,
        "query must be floating point",
    ),
    "two types": (
        lambda: delta_rule(heads(), heads(dtype=torch.float64), heads(), torch.rand(2, 2, 6)),
        TypeError,
        "key must have the type of query",
    ),
    "short values": (
        lambda: local_attention(heads(), heads(), heads(5), window=2),
        ValueError,
        "value must have",
    ),
    "float padding": (
        lambda: tiled_attention(*[heads()] * 5, window=2, padding_mask=torch.ones(2, 6)),
        TypeError,
        "padding_mask must be boolean",
    ),
    "an axis that is none": (
        lambda: gaussian_weights(X, torch.zeros(2), torch.ones(2), axis=7),
        ValueError,
        "axis must be one of the 3 axes",
    ),
    "a class without tokens": (
        lambda: class_attention(X[0], X, X, heads=3),
        ValueError,
        "query must be",
    ),
    "memory": (
        lambda: CausalLongShortAttention(12, heads=3, memory=-1),
        ValueError,
        "memory must be",
    ),
    "an even centred kernel": (
        lambda: depthwise_conv(heads(), torch.rand(4, 2), causal=False),
        ValueError,
        "odd number of taps",
    ),
    "too much before": (
        lambda: depthwise_conv(heads(), torch.rand(4, 3), before=heads(3)),
        ValueError,
        "before must be",
    ),
    "gating": (
        lambda: gates(gating="papr"),
        ValueError,
        "gating must be one of",
    ),
    "more active heads than there are": (
        lambda: gates(active=9),
        ValueError,
        "active from 0 to the 4",
    ),
    "other shared heads": (lambda: gates(shared=3), ValueError, "shared_weight must be"),
}


def gates(**options: object) -> object:
    given = {"shared": 2, "active": 2} | options
    return mixture_gates(X, torch.rand(4, 12), torch.rand(2, 12), torch.rand(2, 12), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


def test_the_phase_has_no_gradient_at_zero() -> None:
    from heed_core.attention.complex import polar

    x = torch.zeros(4, requires_grad=True)
    (slope,) = torch.autograd.grad(polar(x)[1].sum(), x)
    assert torch.equal(slope, torch.zeros(4))


def test_no_tokens_are_none() -> None:
    for causal in (False, True):
        module = MixtureOfHeads(12, heads=3, shared=1, active=1, skip=True, causal=causal)
        assert module(X[:, :0]).output.shape == (2, 0, 12)
    assert LinearAttention(12, heads=3, form="parallel", causal=True)(X[:, :0]).shape == (2, 0, 12)


def test_nystrom_is_exact_for_few_real_tokens_in_a_padded_batch() -> None:
    from heed_core.attention.nystrom import nystrom_attention

    torch.manual_seed(0)
    rows = [torch.randn(2, 3, 40, 4, dtype=torch.float64) for _ in range(3)]
    real = torch.arange(40) < torch.tensor([[6], [40]])
    found = nystrom_attention(*rows, landmarks=8, padding_mask=real)
    alone = nystrom_attention(*[x[:1, :, :6] for x in rows], landmarks=8)
    torch.testing.assert_close(found[:1, :, :6], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("side", "kernel"), [(11, 15), (13, 15), (25, 29), (37, 39)])
def test_a_map_smaller_than_the_window_is_enlarged_to_it(side: int, kernel: int) -> None:
    from heed_core.attention.context_mixing import ContextMixing

    module = ContextMixing(8, context_dim=4, heads=2, kernel=kernel, small_kernel=3).eval()
    x, context = torch.randn(1, 8, side, side), torch.randn(1, 4, 2, 2)
    assert module(x, context, x).shape == x.shape


def test_heads_are_gated_for_each_query() -> None:
    from heed_core import edits
    from heed_core.sites import steer

    module, factors = MultiHeadAttention(12, heads=3).double(), torch.rand(2, 3, 7).double()
    outputs = {}
    for name, given in {"each": factors, "first": factors[:, :, 0]}.items():
        with steer(module, edits.gate_heads(given), at="output"):
            outputs[name] = module(X.double())
    torch.testing.assert_close(outputs["each"][:, 0], outputs["first"][:, 0])
    assert not torch.allclose(outputs["each"][:, 1], outputs["first"][:, 1])
    with (
        pytest.raises(ValueError, match=r"gates must be .*\(2, 3, 7\)"),
        steer(module, edits.gate_heads(torch.rand(2, 3, 6)), at="output"),
    ):
        module(X.double())


@pytest.mark.compile
def test_a_cross_attention_is_exported_for_any_number_of_queries() -> None:
    module = MultiHeadAttention(12, heads=3, context_dim=12).eval()
    given = {"x": X, "context": torch.randn(2, 10, 12)}
    sizes = {"x": {1: torch.export.Dim("n")}, "context": None}
    program = torch.export.export(module, (), kwargs=given, dynamic_shapes=sizes).module()
    for n in (1, 10, 13):
        fresh = given | {"x": torch.randn(2, n, 12)}
        torch.testing.assert_close(program(**fresh), module(**fresh))
