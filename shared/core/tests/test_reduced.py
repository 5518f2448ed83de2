"""Reduced attention: counts of all combinations, exact collapse, convex hull, symmetric scores."""

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from heed_core import attend, observe
from heed_core.attention.reduced import (
    QueryKey,
    ReducedAttention,
    SharedValueStack,
    ValueOut,
    collapse_stack,
)

N = 12
SCORES = {
    "separate": 2 * N**2,
    "collapsed": N**2,
    "symmetric": N**2,
    "cholesky": N * (N + 1) // 2,
    "symmetric-full": N * (N + 1) // 2,
}
VALUES = {"separate": 2 * N**2, "collapsed": N**2, "none": 0}
MATRICES = {"separate": 2, "collapsed": 1, "symmetric": 1, "cholesky": 1, "symmetric-full": 1}
ALL = list(itertools.product(get_args(QueryKey), get_args(ValueOut)))


def random(layer: ReducedAttention) -> ReducedAttention:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    return layer.double().eval()


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(("qk", "vo"), ALL)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_parameters_of_every_combination(qk: QueryKey, vo: ValueOut, bias: bool, heads: int):
    legal = heads == 1 or (qk in ("separate", "symmetric") and vo != "collapsed")
    if not legal:
        with pytest.raises(ValueError, match="need one head, got 3"):
            ReducedAttention(N, heads=heads, qk=qk, vo=vo, bias=bias)
        return
    layer = ReducedAttention(N, heads=heads, qk=qk, vo=vo, bias=bias)
    matrices = MATRICES[qk] + {"separate": 2, "collapsed": 1, "none": 0}[vo]
    wanted = SCORES[qk] + VALUES[vo] + N * matrices * bias
    assert sum(p.numel() for p in layer.parameters()) == wanted


@pytest.mark.parametrize(("qk", "vo"), ALL)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_collapsed_layer_computes_the_same(qk: QueryKey, vo: ValueOut, bias: bool, causal: bool):
    layer = random(ReducedAttention(N, qk=qk, vo=vo, bias=bias, causal=causal))
    small, x = layer.collapse(), tokens(2, 7, N)
    torch.testing.assert_close(small(x), layer(x), rtol=1e-9, atol=1e-9)
    assert small.qk == "collapsed"
    assert small.vo == ("none" if vo == "none" else "collapsed")


@pytest.mark.parametrize(
    ("qk", "vo", "heads"), [*((*both, 1) for both in ALL), ("symmetric", "none", 3)]
)
def test_between_its_matrices_it_is_attend(qk: QueryKey, vo: ValueOut, heads: int):
    layer, x = random(ReducedAttention(N, heads=heads, qk=qk, vo=vo)), tokens(2, 7, N)
    query = layer.query(x)
    key = {"separate": layer.key or layer.query, "symmetric": layer.query, "cholesky": layer.query}
    rows = [query, key[qk](x) if qk in key else x, x if layer.value is None else layer.value(x)]
    rows = [t.unflatten(2, (heads, -1)).transpose(1, 2) for t in rows]
    mixed = attend(*rows).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed if layer.out is None else layer.out(mixed), layer(x))


def test_several_heads_do_not_collapse():
    with pytest.raises(ValueError, match="3 heads cannot be collapsed"):
        ReducedAttention(N, heads=3).collapse()


@pytest.mark.parametrize("qk", ["symmetric", "cholesky"])
def test_scores_are_symmetric_and_their_diagonal_is_not_negative(qk: QueryKey):
    layer = random(ReducedAttention(N, qk=qk))
    matrix, _ = layer.score_matrix()
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-9
    x = tokens(5, N)
    scores = x @ matrix @ x.T
    torch.testing.assert_close(scores, scores.T)
    assert scores.diagonal().min() >= 0


def test_a_free_symmetric_matrix_may_be_indefinite():
    matrix, _ = random(ReducedAttention(N, qk="symmetric-full")).score_matrix()
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() < -0.1


@pytest.mark.parametrize("heads", [1, 3])
def test_without_values_every_output_lies_in_the_hull_of_the_tokens(heads: int):
    layer, x = random(ReducedAttention(N, heads=heads, vo="none")), tokens(2, 6, N)
    with observe(layer) as record:
        y = layer(x)
    weights = record["attend"]
    assert weights.min() >= 0
    slices = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    torch.testing.assert_close((weights @ slices).transpose(1, 2).flatten(2), y)
    assert (y.amax(1) <= x.amax(1) + 1e-12).all()
    assert (y.amin(1) >= x.amin(1) - 1e-12).all()


def test_a_stack_with_one_value_matrix_is_the_explicit_stack():
    kinds = [("separate", "separate"), ("symmetric", "collapsed"), ("cholesky", "none")]
    layers = [random(ReducedAttention(N, qk=qk, vo=vo)) for qk, vo in kinds]
    x = y = tokens(2, 5, N) * 0.5
    for layer in layers:
        y = layer(y)
    stack = collapse_stack(layers)
    torch.testing.assert_close(stack(x), y, rtol=1e-8, atol=1e-8)
    assert sum(p.numel() for p in stack.parameters()) == (len(layers) + 1) * N**2


def test_a_stack_takes_no_biases_and_no_values():
    with pytest.raises(ValueError, match="without biases"):
        collapse_stack([ReducedAttention(N, bias=True)])
    with pytest.raises(ValueError, match='vo="none"'):
        SharedValueStack([ReducedAttention(N)])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"qk": "merged"}, "qk must be one of separate, collapsed"),
        ({"vo": "shared"}, "vo must be one of separate"),
        ({"heads": 5}, "heads must divide dim=12, got 5"),
    ],
)
def test_options_that_do_not_fit(options: dict, said: str):
    with pytest.raises(ValueError, match=said):
        ReducedAttention(N, **options)


@pytest.mark.parametrize(("qk", "vo"), ALL)
@torch.no_grad()
def test_decoding_equals_one_forward(qk: QueryKey, vo: ValueOut) -> None:
    layer, x = random(ReducedAttention(N, qk=qk, vo=vo, bias=True, causal=True)), tokens(2, 9, N)
    real = torch.arange(9) >= torch.tensor([[0], [2]])
    whole, cache = layer(x, padding_mask=real), layer.new_cache(2, 9)
    parts = [
        layer(x[:, start:stop], padding_mask=real[:, :stop], cache=cache)
        for start, stop in ((0, 4), (4, 5), (5, 9))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    cache.crop(5)
    cache.reorder(torch.tensor([1, 1]))
    moved = layer(x[1:, 5:].expand(2, -1, -1), padding_mask=real[1:].expand(2, -1), cache=cache)
    torch.testing.assert_close(moved, whole[1:, 5:].expand(2, -1, -1))


@pytest.mark.bad_input
def test_a_cache_without_causality_is_refused() -> None:
    layer = random(ReducedAttention(N))
    with pytest.raises(ValueError, match="cache serves causal=True only"):
        layer(tokens(2, 3, N), cache=layer.new_cache(2, 3))
