"""Rotary codes and biases of scores, against the formulas."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heed_core.positions import grid_positions
from heed_core.relative import (
    AlibiBias,
    GridRelativeBias,
    RelativeBias,
    RotaryPositions,
    alibi_slopes,
    distance_bucket,
    distances,
    grid_offset_index,
    rotary_table,
    rotate,
)


def rotated_by_complex_numbers(x: list[float], position: float, layout: str) -> list[float]:
    dim = len(x)
    out = [0.0] * dim
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + dim // 2)
        angle = position * 10000.0 ** (-2 * i / dim)
        number = complex(x[a], x[b]) * cmath.exp(1j * angle)
        out[a], out[b] = number.real, number.imag
    return out


@given(
    position=st.integers(0, 100_000),
    half=st.integers(1, 8),
    layout=st.sampled_from(["half", "interleaved"]),
)
@settings(max_examples=40, deadline=None)
def test_rotary_equals_complex_multiplication(position: int, half: int, layout: str) -> None:
    x = torch.randn(1, 1, 1, 2 * half, dtype=torch.float64)
    got = RotaryPositions(2 * half, layout=layout)(x, offset=position)
    want = torch.tensor(rotated_by_complex_numbers(x.flatten().tolist(), position, layout))
    torch.testing.assert_close(got.flatten(), want.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotary_products_depend_on_differences_only(layout: str) -> None:
    rotary = RotaryPositions(8, layout=layout)
    q, k = torch.randn(2, 3, 5, 8).double(), torch.randn(2, 3, 5, 8).double()
    near = rotary(q) @ rotary(k).mT
    far = rotary(q, offset=1000) @ rotary(k, offset=1000).mT
    torch.testing.assert_close(near, far)
    assert not torch.allclose(near, rotary(q) @ rotary(k, offset=1).mT)


def test_rotary_offset_continues_a_row_bit_for_bit() -> None:
    rotary = RotaryPositions(8)
    x = torch.randn(1, 2, 9, 8)
    assert torch.equal(rotary(x)[:, :, 6:], rotary(x[:, :, 6:], offset=6))
    assert torch.equal(rotary(x), rotary(x, positions=torch.arange(9)))


def test_rotary_of_half_precision_is_the_rounded_exact_one() -> None:
    rotary = RotaryPositions(16).bfloat16()
    x = torch.randn(1, 1, 4, 16).bfloat16()
    exact = RotaryPositions(16)(x.double(), offset=70_001)
    assert torch.equal(rotary(x, offset=70_001), exact.float().bfloat16())


def test_rotary_passes_the_rest_and_takes_rows_of_positions() -> None:
    rotary = RotaryPositions(8, rotated=4)
    x = torch.randn(2, 1, 3, 8)
    positions = torch.tensor([[0, 1, 2], [5, 5, 9]])
    out = rotary(x, positions=positions)
    assert torch.equal(out[..., 4:], x[..., 4:])
    for row in range(2):
        alone = rotary(x[row : row + 1], positions=positions[row])
        assert torch.equal(out[row : row + 1], alone)
    torch.testing.assert_close(out[1, :, 0], out[1, :, 0])
    assert not torch.equal(out[..., :4], x[..., :4])


def test_axial_rotary_depends_on_both_differences() -> None:
    rotary = RotaryPositions(12, axes=2, rotated=8)
    shape = (3, 5)
    places = grid_positions(shape)
    q, k = torch.randn(12).double(), torch.randn(12).double()
    every = (1, 1, 15, 12)
    scores = (
        rotary(q.expand(every), positions=places) @ rotary(k.expand(every), positions=places).mT
    )[0, 0]
    by_difference: dict[tuple[int, ...], float] = {}
    for i, a in enumerate(places.tolist()):
        for j, b in enumerate(places.tolist()):
            difference = (b[0] - a[0], b[1] - a[1])
            seen = by_difference.setdefault(difference, scores[i, j].item())
            assert math.isclose(seen, scores[i, j].item(), abs_tol=1e-9)
    assert len({round(value, 6) for value in by_difference.values()}) == len(by_difference)


def test_distances_are_aligned_bottom_right() -> None:
    assert distances(2, 4).tolist() == [[-2, -1, 0, 1], [-3, -2, -1, 0]]


def bucket_by_rule(distance: int, buckets: int, most: int, bidirectional: bool) -> int:
    start = 0
    if bidirectional:
        buckets //= 2
        start = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(0, -distance)
    exact = buckets // 2
    if distance < exact:
        return start + distance
    far = exact + int(math.log(distance / exact) / math.log(most / exact) * (buckets - exact))
    return start + min(far, buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20)])
def test_buckets_follow_the_rule(buckets: int, most: int, bidirectional: bool) -> None:
    away = torch.arange(-200, 201)
    got = distance_bucket(away, buckets=buckets, max_distance=most, bidirectional=bidirectional)
    want = [bucket_by_rule(d, buckets, most, bidirectional) for d in away.tolist()]
    # a border may fall to either side by rounding
    assert sum(g != w for g, w in zip(got.tolist(), want, strict=True)) <= 4
    assert (got - torch.tensor(want)).abs().max() <= 1
    assert set(got.tolist()) <= set(range(buckets))


@pytest.mark.slow
def test_buckets_equal_those_of_transformers() -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    away = torch.arange(-300, 301)
    for bidirectional in (True, False):
        want = t5.T5Attention._relative_position_bucket(away, bidirectional, 32, 128)
        assert torch.equal(distance_bucket(away, bidirectional=bidirectional), want)


@pytest.mark.parametrize("kind", ["bucketed", "clipped"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_is_a_function_of_distance(kind: str, bidirectional: bool) -> None:
    module = RelativeBias(3, kind=kind, buckets=8, max_distance=8, bidirectional=bidirectional)
    full = module(11, 11)
    assert torch.equal(module(4, 11), full[:, -4:])
    assert torch.equal(full[:, 1:, 1:], full[:, :-1, :-1])
    assert torch.equal(full[:, 0, 9], full[:, 0, 10])
    if not bidirectional:
        assert torch.equal(full[:, 0, 1], full[:, 0, 0])
    full.sum().backward()
    used = module.table.grad.abs().sum(dim=1) > 0
    unused = 1 if kind == "bucketed" and bidirectional else 0  # positive distance 0 does not exist
    assert used.sum() == len(used) - unused


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_grid_offsets_are_numbered_without_collision(shape: list[int]) -> None:
    index = grid_offset_index(shape)
    cells = grid_positions(shape).tolist()
    seen: dict[int, tuple[int, ...]] = {}
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            offset = tuple(x - y for x, y in zip(a, b, strict=True))
            assert seen.setdefault(int(index[i, j]), offset) == offset
    assert set(seen) == set(range(math.prod(2 * size - 1 for size in shape)))
    assert sorted(seen) == [number for number, _ in sorted(seen.items(), key=lambda item: item[1])]


def test_grid_bias_of_a_grid_that_is_not_square() -> None:
    module = GridRelativeBias(2, shape=(2, 3))
    bias = module(6, 6)
    assert tuple(bias.shape) == (2, 6, 6)
    # cells (0, 0) -> (0, 1) and (1, 1) -> (1, 2) have one offset, the way back another
    assert torch.equal(bias[:, 0, 1], bias[:, 4, 5])
    assert not torch.equal(bias[:, 0, 1], bias[:, 1, 0])
    # table row of offset (1, -2): (1 + 1) * 5 + (-2 + 2)
    assert torch.equal(bias[:, 3, 2], module.table[10])
    assert set(module.state_dict()) == {"table"}


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    six = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert alibi_slopes(6).tolist() == six
    bias = AlibiBias(8)(2, 4)
    for i in range(2):
        for j in range(4):
            assert bias[2, i, j] == -(2.0**-3) * abs(j - (i + 2))
    assert not AlibiBias(8).state_dict()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: rotary_table(torch.arange(3), 5), "dim must be even"),
        (lambda: rotate(torch.zeros(3, 4), torch.ones(3, 3), torch.ones(3, 3)), "6 channels"),
        (lambda: RotaryPositions(8, axes=2, rotated=6), "multiple of 2 \\* axes"),
        (lambda: RotaryPositions(7), "multiple of 2"),
        (lambda: RotaryPositions(8, layout="x"), "layout"),
        (lambda: RotaryPositions(8, axes=2)(torch.zeros(1, 1, 4, 8)), "positions must be given"),
        (
            lambda: RotaryPositions(8)(torch.zeros(1, 1, 4, 8), positions=torch.arange(3)),
            "positions must be \\(4\\)",
        ),
        (
            lambda: RotaryPositions(8)(
                torch.zeros(1, 1, 4, 8), positions=torch.arange(4), offset=2
            ),
            "no effect",
        ),
        (lambda: RelativeBias(2, kind="log"), "kind must be"),
        (lambda: RelativeBias(2, buckets=2), "buckets must be"),
        (lambda: GridRelativeBias(2, shape=(0, 3)), "shape must"),
        (lambda: GridRelativeBias(2, shape=(2, 3))(5, 6), "6 tokens"),
        (lambda: alibi_slopes(0), "heads"),
    ],
)
def test_bad_arguments_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
