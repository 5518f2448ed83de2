"""A sequence that processes share: equal to one process, bytes as the formulas say."""

import math
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from heed_core import context_parallel
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.backends.reference import run as written_out
from heed_core.backends.reference import scores as all_scores
from heed_core.context_parallel import (
    CommCounter,
    context_parallel_attention,
    global_positions,
    padded_length,
    shard_sequence,
    unshard_sequence,
)
from heed_core.context_parallel_attention import ContextParallelAttention
from heed_core.exchange import head_shares
from heed_core.relative import AlibiBias, RotaryPositions
from heed_core.sites import Attend, observe, steer
from heed_core.testing.memory import Memory
from heed_core.testing.processes import run_together

BATCH, WIDTH = 2, 4


def near(i, j):
    return (i - j).abs() <= 5


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"mask_fn": near},
    "causal window": {"causal": True, "mask_fn": near},
}


def expected_bytes(method: str, heads: int, groups: int, token_bytes: int) -> tuple[int, int]:
    """Forwards and backwards, of the formulas; `token_bytes` of one head of this process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return 0, 0
    around = 2 * (world - 1) * groups * token_bytes
    if method == "ring":  # backwards k and v again, and P times their gradients
        return around, around + 2 * world * groups * token_bytes
    if method == "allgather":
        return around, around
    shared = groups
    if groups % world:
        shared = heads if heads % world else math.lcm(groups, world)
    own, own_shared = head_shares(heads, world)[rank], head_shares(shared, world)[rank]
    gathered = (world - 1) * (own + 2 * own_shared) + heads - own
    returned = (world - 1) * own + heads - own + 2 * (shared - own_shared)
    if heads % world == 0:  # (P - 1) / P (2 H + 2 G)
        assert gathered == returned == (world - 1) * (2 * heads + 2 * shared) // world
    return gathered * token_bytes, returned * token_bytes


def equal_to_one_process(
    length: int,
    heads: int,
    groups: int,
    method: str,
    layout: str,
    dtype=torch.float64,
    *,
    width: int = WIDTH,
    hidden: int = 3,
) -> None:
    """All cases; `hidden` tokens at the end of the second sample are padding of its own."""
    world = dist.get_world_size()
    torch.manual_seed(3)
    whole = [torch.randn(BATCH, h, length, width, dtype=dtype) for h in (heads, groups, groups)]
    probe = torch.randn(BATCH, heads, length, width, dtype=dtype)
    real = torch.arange(length) < torch.tensor([[length], [length - hidden]])
    share = padded_length(length, world, layout) // world
    token_bytes = BATCH * share * width * whole[0].element_size()
    for options in CASES.values():
        leaves = [x.clone().requires_grad_() for x in whole]
        place = torch.arange(length)
        mask = real[:, None, None]
        if "mask_fn" in options:
            mask = mask & near(place[:, None], place[None])
        causal = options.get("causal", False)
        given = {"bias": None, "causal": causal, "scale": width**-0.5, "dropout": 0.0}
        exact = written_out(*leaves, mask=mask, **given)
        wanted = torch.autograd.grad((exact * probe).sum(), leaves)
        seen = mask & (place <= place[:, None]) if causal else mask
        products = all_scores(*leaves[:2], scale=width**-0.5).masked_fill(~seen, -torch.inf)
        wanted_lse = products.detach().logsumexp(-1)
        own = [shard_sequence(x, None, layout=layout, dim=2).requires_grad_() for x in whole]
        part = shard_sequence(probe, None, layout=layout, dim=2)
        options = {
            "method": method,
            "layout": layout,
            "padding_mask": shard_sequence(real, None, layout=layout, dim=1),
            **options,
        }
        if bool(real.all()) and share * world == length:
            del options["padding_mask"]
        with CommCounter() as forwards:
            out = context_parallel_attention(*own, **options)
        with CommCounter() as backwards:
            found = torch.autograd.grad((out * part).sum(), own)
        bytes_received = expected_bytes(method, heads, groups, token_bytes)
        assert (forwards.received, backwards.received) == bytes_received, (method, bytes_received)
        again, lse = context_parallel_attention(*own, return_lse=True, **options)
        repeated = torch.autograd.grad((again * part).sum(), own)
        for one, other in zip((out, *found), (again, *repeated), strict=True):
            assert torch.equal(one, other), "two runs differ"
        budget = 1e-10 if dtype == torch.float64 else 2e-5
        pairs = zip((out, lse, *found), (exact, wanted_lse, *wanted), strict=True)
        for ours, expected in pairs:
            together = unshard_sequence(ours, None, layout=layout, dim=2, length=length)
            assert torch.equal(together.isneginf(), expected.isneginf())
            # torch.testing imports all of torch's distributed tensors here: seconds.
            error = float((together - expected).detach().nan_to_num().abs().max())
            assert error <= budget, (method, layout, options, error)


def other_lengths_raise_everywhere() -> None:
    x = torch.randn(1, 2, 4 + dist.get_rank(), WIDTH)
    with pytest.raises(ValueError, match=r"same call; process 0: query \(1, 2, 4"):
        context_parallel_attention(x, x, x)


def a_wrong_call_of_one_raises_everywhere() -> None:
    """Nobody waits for a process that finds its own call wrong, and all say what it found."""
    last = dist.get_rank() == dist.get_world_size() - 1
    x = torch.randn(1, 2, 4, WIDTH)
    real = torch.ones(1, 4, dtype=torch.float32 if last else torch.bool)
    wrong = (
        (x[:, :, : 4 - last], {"layout": "zigzag"}, "even number of tokens, got 3", ValueError),
        (x, {"padding_mask": real}, "padding_mask must be boolean", TypeError),
        (x, {"mask_fn": (lambda i, j: i + j) if last else near}, "must give booleans", TypeError),
        (x, {"method": "star" if last else "ring"}, "method must be one of", ValueError),
        (x.long() if last else x, {}, "query must be one of", TypeError),
    )
    for tokens, options, said, kind in wrong:
        with pytest.raises(kind if last else ValueError, match=said) as found:
            context_parallel_attention(tokens, tokens, tokens, **options)
        assert last or f"process {dist.get_world_size() - 1}: " in str(found.value)
    other = (
        {"method": "ulysses" if last else "ring"},
        {"causal": last},
        {"layout": "zigzag" if last else "contiguous"},
    )
    for options in other:
        with pytest.raises(ValueError, match="must make the same call"):
            context_parallel_attention(x, x, x, **options)
    half = x.bfloat16() if last else x
    with pytest.raises(ValueError, match="must make the same call"):
        context_parallel_attention(half, half, half)


def can_be_watched(method: str, layout: str) -> None:
    """The maps that a site shows are those of one process, and edits act."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(4)
    query, key, value = (torch.randn(1, 4, 8 * world, WIDTH).double() for _ in range(3))
    site = Attend()
    exact_site = Attend(causal=True)
    with observe(exact_site) as exact:
        exact_site(query * 2.0, key, value)
    own = [shard_sequence(x, None, layout=layout, dim=2) for x in (query, key, value)]
    options = {"method": method, "layout": layout, "causal": True, "scale": 2 * WIDTH**-0.5}
    plain = context_parallel_attention(*own, site=site, **options)
    with observe(site) as record:
        watched = context_parallel_attention(*own, site=site, **options)
    with steer(site, lambda weights, call: weights * 0.0):
        nothing = context_parallel_attention(*own, site=site, **options)
    places = global_positions(rank, world, 8 * world, layout)
    shown, wanted = record[""], exact[""]
    heads = torch.arange(4).split(head_shares(4, world))[rank]
    wanted = wanted[:, heads] if method == "ulysses" else wanted[:, :, places]
    assert float((shown - wanted).abs().max()) < 1e-12
    assert float((watched - plain).abs().max()) < 1e-12
    assert not bool(nothing.any())


def zigzag_shares_the_work(method: str) -> None:
    world = dist.get_world_size()
    work = {}
    for layout in ("contiguous", "zigzag"):
        x = torch.randn(1, 2, 12, WIDTH)
        with FlopCounterMode(display=False) as counter:
            context_parallel_attention(x, x, x, method=method, layout=layout, causal=True)
        flops = torch.tensor([counter.get_total_flops()])
        parts = [torch.empty_like(flops) for _ in range(world)]
        dist.all_gather(parts, flops)
        work[layout] = [int(part) for part in parts]
    assert len(set(work["zigzag"])) == 1, work
    assert work["contiguous"][0] < work["zigzag"][0] < work["contiguous"][-1], work


MODULES = (
    {"causal": True, "kv_heads": 2, "rotary": RotaryPositions(4), "qk_norm": "rms"},
    {"causal": True, "window": 4, "scale": 0.7},
    {"qkv_bias": False, "out_bias": False},
)


def module_equals_one_process(method: str, layout: str, options: dict, *, hidden: int = 3) -> None:
    """Outputs, and gradients of tokens and, summed, of weights."""
    torch.manual_seed(6)
    whole = MultiHeadAttention(12, heads=4, head_dim=4, **options).double()
    tokens, probe = torch.randn(2, BATCH, 13, 12, dtype=torch.float64)
    real = torch.arange(13) < torch.tensor([[13], [13 - hidden]])
    leaf = tokens.requires_grad_()
    wanted = whole(leaf, padding_mask=real)
    leaves = [leaf, *whole.parameters()]
    exact = torch.autograd.grad((wanted * probe).sum(), leaves)
    own, part, mask = (
        shard_sequence(x.detach(), None, layout=layout, dim=1) for x in (tokens, probe, real)
    )
    attention = ContextParallelAttention(whole, method=method, layout=layout)
    found = attention(own.requires_grad_(), padding_mask=mask)
    to_tokens, *to_weights = torch.autograd.grad((found * part).sum(), [own, *whole.parameters()])
    for gradient in to_weights:
        dist.all_reduce(gradient)
    pairs = [(found, wanted), (to_tokens, exact[0])]
    pairs = [(unshard_sequence(x, None, layout=layout, dim=1, length=13), y) for x, y in pairs]
    for ours, expected in (*pairs, *zip(to_weights, exact[1:], strict=True)):
        error = float((ours - expected).detach().abs().max())
        assert error <= 1e-10, (method, layout, options, error)


def a_wrong_token_of_one_raises_everywhere() -> None:
    last = dist.get_rank() == dist.get_world_size() - 1
    attention = ContextParallelAttention(MultiHeadAttention(12, heads=4), layout="zigzag")
    x = torch.randn(1, 4, 12)
    for wrong in (x[..., 1:], x.double(), x[:, :3]):
        with pytest.raises((ValueError, TypeError)) as found:
            attention(wrong if last else x)
        assert last or f"process {dist.get_world_size() - 1}: " in str(found.value)


def quick(world: int) -> None:
    context_parallel.TILE = 4
    for method in ("ring", "allgather", "ulysses"):
        for layout in ("contiguous", "zigzag"):
            equal_to_one_process(13, world * 2, world, method, layout)
    equal_to_one_process(13, 2 * world, 1, "ulysses", "zigzag")
    equal_to_one_process(13, 2 * world + 1, 1, "ulysses", "contiguous")
    equal_to_one_process(13, 1, 1, "ulysses", "contiguous")
    can_be_watched("allgather", "zigzag")
    can_be_watched("ulysses", "zigzag")
    half_precision_does_not_drift(world)
    zigzag_shares_the_work("ring")
    zigzag_shares_the_work("allgather")
    other_lengths_raise_everywhere()
    a_wrong_call_of_one_raises_everywhere()
    for method in ("ring", "allgather", "ulysses"):
        for options in MODULES:
            module_equals_one_process(method, "zigzag", options)
    a_wrong_token_of_one_raises_everywhere()


def thorough(world: int) -> None:
    for tile in (5, 512):
        context_parallel.TILE = tile
        for length in (24, 31):
            for method in ("ring", "allgather", "ulysses"):
                for layout in ("contiguous", "zigzag"):
                    equal_to_one_process(length, 2 * world, world, method, layout)
                    equal_to_one_process(length, world, world, method, layout, torch.float32)
    for method in ("allgather", "ulysses"):
        for layout in ("contiguous", "zigzag"):
            can_be_watched(method, layout)


def one_other_length_raises_everywhere(world: int) -> None:
    for method in ("ring", "allgather", "ulysses"):
        x = torch.randn(1, world, 4 + (dist.get_rank() == world - 1), WIDTH)
        with pytest.raises(ValueError, match="must make the same call"):
            context_parallel_attention(x, x, x, method=method)


def half_precision_does_not_drift(world: int) -> None:
    """Sums are kept in float32: no farther off than twice what one process is in bfloat16."""
    torch.manual_seed(8)
    length = 24 * world
    whole = [torch.randn(1, 4, length, 8).bfloat16() for _ in range(3)]
    probe = torch.randn(1, 4, length, 8).bfloat16()
    results = {}
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [x.to(dtype).requires_grad_() for x in whole]
        out = written_out(*leaves, mask=None, bias=None, causal=True, scale=8**-0.5, dropout=0.0)
        results[dtype] = [out, *torch.autograd.grad((out * probe.to(dtype)).sum(), leaves)]
    for method in ("ring", "allgather", "ulysses"):
        own = [shard_sequence(x, None, dim=2).requires_grad_() for x in whole]
        out = context_parallel_attention(*own, method=method, causal=True)
        part = shard_sequence(probe, None, dim=2)
        found = [out, *torch.autograd.grad((out * part).sum(), own)]
        for ours, plain, exact in zip(found, *reversed(results.values()), strict=True):
            assert ours.dtype == torch.bfloat16
            together = unshard_sequence(ours, None, dim=2, length=length).double()
            off, allowed = ((x - exact).detach().abs().max() for x in (together, plain.double()))
            rounding = float(exact.detach().abs().max()) * 2**-8
            assert float(off) <= 2 * float(allowed) + rounding, (method, float(off))


def wide(world: int) -> None:
    """Sequences of many blocks, that the processes divide and that they do not."""
    for length, hidden in ((96, 0), (97, 3)):
        for groups in (4, 2):
            for method in ("ring", "allgather", "ulysses"):
                for layout in ("contiguous", "zigzag"):
                    for dtype in (torch.float64, torch.float32):
                        equal_to_one_process(
                            length, 4, groups, method, layout, dtype, width=8, hidden=hidden
                        )
    half_precision_does_not_drift(world)
    if world > 1:
        one_other_length_raises_everywhere(world)


def note_memory(folder: str, cases: list[tuple[str, int]], world: int) -> None:
    context_parallel.TILE = 8
    for method, tokens in cases:
        own = [torch.randn(1, 2, tokens, WIDTH).requires_grad_() for _ in range(3)]
        with Memory() as counted:
            context_parallel_attention(
                *own, method=method, causal=True, layout="zigzag"
            ).sum().backward()
        (Path(folder) / f"{method}-{tokens}-{dist.get_rank()}").write_text(str(counted.peak))


def memory(world: int, *cases: tuple[str, int]) -> list[int]:
    """By method and tokens of a process: of the process that holds most."""
    with tempfile.TemporaryDirectory() as folder:
        run_together(world, partial(note_memory, folder, cases))
        return [
            max(int(path.read_text()) for path in Path(folder).glob(f"{method}-{tokens}-*"))
            for method, tokens in cases
        ]


def test_two_processes() -> None:
    run_together(2, quick)


def test_a_longer_sequence_of_more_processes_needs_no_more_memory() -> None:
    three, four = (memory(world, ("ring", 32), ("allgather", 32)) for world in (3, 4))
    assert four[0] <= 1.05 * three[0]  # 96 and 128 tokens
    assert four[1] > 1.1 * three[1]


def test_no_map_of_all_pairs_is_held() -> None:
    methods = ("ring", "allgather", "ulysses")
    cases = [(method, tokens) for method in methods for tokens in (24, 48)]
    found = dict(zip(cases, memory(2, *cases), strict=True))
    for method in methods:
        assert found[method, 48] <= 2.2 * found[method, 24], method  # a map: 4 times


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_more_processes_lengths_and_heads(world: int) -> None:
    run_together(world, thorough)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_long_sequences_of_more_processes(world: int) -> None:
    run_together(world, wide)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_zigzag_shares_the_work_of_a_causal_map(world: int) -> None:
    length = 6 * world
    work = [int((global_positions(r, world, length, "zigzag") + 1).sum()) for r in range(world)]
    assert max(work) == min(work)
    held = torch.cat([global_positions(r, world, length, "zigzag") for r in range(world)])
    assert torch.equal(held.sort().values, torch.arange(length))


@pytest.mark.bad_input
def test_wrong_arguments_are_named() -> None:
    x = torch.randn(1, 2, 5, 4)
    for options, said in (
        ({"method": "star"}, "method must be one of"),
        ({"layout": "striped"}, "layout must be one of"),
        ({"layout": "zigzag"}, "even number of tokens"),
        ({"dropout": 0.1}, "dropout must be 0"),
        ({"padding_mask": torch.ones(1, 4, dtype=torch.bool)}, "padding_mask must be"),
    ):
        with pytest.raises(ValueError, match=said):
            context_parallel_attention(x, x, x, **options)
    with pytest.raises(TypeError, match="padding_mask must be boolean"):
        context_parallel_attention(x, x, x, padding_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="site must have dropout 0"):
        context_parallel_attention(x, x, x, site=Attend(dropout=0.1))
    site = Attend()
    with observe(site), pytest.raises(ValueError, match="never holds a row of weights"):
        context_parallel_attention(x, x, x, site=site)
    with observe(site), pytest.raises(ValueError, match="return_lse=True is not for"):
        context_parallel_attention(x, x, x, site=site, method="allgather", return_lse=True)
    with pytest.raises(ValueError, match="query must be"):
        context_parallel_attention(x[0], x, x)
    with pytest.raises(ValueError, match="length must be a multiple"):
        global_positions(0, 2, 5)


@pytest.mark.bad_input
def test_modules_that_no_part_of_the_tokens_can_run_are_refused() -> None:
    for options, said in (
        ({"dropout": 0.1}, "dropout must be 0"),
        ({"context_dim": 5}, "context_dim and relative_bias must be None"),
        ({"relative_bias": AlibiBias(4)}, "context_dim and relative_bias must be None"),
    ):
        with pytest.raises(ValueError, match=said):
            ContextParallelAttention(MultiHeadAttention(12, heads=4, **options))
    whole = MultiHeadAttention(12, heads=4)
    with pytest.raises(ValueError, match="method must be one of"):
        ContextParallelAttention(whole, method="star")
    with pytest.raises(ValueError, match="layout must be one of"):
        ContextParallelAttention(whole, layout="striped")
