"""Heads that processes share: equal to one process, bytes as the formula says."""

import pytest
import torch
import torch.distributed as dist

from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.exchange import CommCounter
from heed_core.head_parallel import HeadParallelAttention
from heed_core.relative import AlibiBias, RotaryPositions
from heed_core.sites import observe
from heed_core.testing.processes import run_together

BATCH, LENGTH, DIM = 2, 7, 12


def build(heads: int, kv_heads: int, **options) -> MultiHeadAttention:
    torch.manual_seed(5)
    return MultiHeadAttention(DIM, heads=heads, kv_heads=kv_heads, head_dim=4, **options)


def close(found: torch.Tensor, wanted: torch.Tensor, budget: float) -> None:
    # torch.testing imports all of torch's distributed tensors here: seconds.
    assert found.shape == wanted.shape
    error = float((found - wanted).detach().abs().max())
    assert error <= budget, error


def equal_to_one_process(heads: int, kv_heads: int, dtype: torch.dtype, options: dict) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    budget = 1e-12 if dtype == torch.float64 else 2e-6
    whole = build(heads, kv_heads, **options).to(dtype)
    shared = HeadParallelAttention(whole)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=dtype, requires_grad=True)
    probe = torch.randn(BATCH, LENGTH, DIM, dtype=dtype)
    given = {
        "padding_mask": torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 2]]),
        "mask": torch.rand(BATCH, heads, LENGTH, LENGTH) > 0.2,
        "bias": torch.randn(heads, LENGTH, LENGTH, dtype=dtype, requires_grad=True),
    }
    wanted = whole(x, **given)
    leaves = [x, given["bias"], *whole.parameters()]
    gradients = torch.autograd.grad((wanted * probe).sum(), leaves)

    with CommCounter() as forwards:
        found = shared(x, **given)
    with CommCounter() as backwards:
        to_x, to_bias = torch.autograd.grad(
            (found * probe).sum(), [x, given["bias"]], retain_graph=True
        )
    close(found, wanted, budget)
    close(to_x, gradients[0], budget)
    close(to_bias, gradients[1], budget)
    e = x.element_size()
    share = -(-BATCH * LENGTH * DIM // world)
    of_bias = -(-heads * LENGTH * LENGTH // world)
    assert forwards.received == 2 * (world - 1) * share * e
    assert backwards.received == 2 * (world - 1) * (share + of_bias) * e
    if BATCH * LENGTH * DIM % world == 0:
        assert forwards.received == 2 * (world - 1) * BATCH * LENGTH * DIM * e // world

    copies = [torch.empty_like(found) for _ in range(world)]
    dist.all_gather(copies, found.detach().contiguous())
    assert all(torch.equal(copy, copies[0]) for copy in copies)
    assert torch.equal(found, shared(x, **given)), "two runs differ"

    wanted_of = dict(zip([n for n, _ in whole.named_parameters()], gradients[2:], strict=True))
    own = dict(shared.named_parameters())
    found_of = dict(zip(own, torch.autograd.grad((found * probe).sum(), own.values()), strict=True))
    groups = shared.shares
    first, served = sum(groups[:rank]), heads // kv_heads
    rows = slice(first * 4, (first + groups[rank]) * 4)
    asking = slice(rows.start * served, rows.stop * served)
    for kind in ("weight", "bias") if options.get("qkv_bias", True) else ("weight",):
        close(found_of[f"own.query.{kind}"], wanted_of[f"query.{kind}"][asking], budget)
        close(found_of[f"own.key.{kind}"], wanted_of[f"key.{kind}"][rows], budget)
        close(found_of[f"own.value.{kind}"], wanted_of[f"value.{kind}"][rows], budget)
    close(found_of["own.out.weight"], wanted_of["out.weight"][:, asking], budget)
    if "out_bias" in found_of:
        close(found_of["out_bias"], wanted_of["out.bias"], budget)
    state = shared.whole_state()
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(state[name], x) for name, x in whole.state_dict().items())


def cross_attention_reads_one_context() -> None:
    whole = build(4, 4, context_dim=5, qkv_bias=False, out_bias=False).double()
    shared = HeadParallelAttention(whole)
    x, context = torch.randn(BATCH, 3, DIM).double(), torch.randn(BATCH, 6, 5).double()
    context.requires_grad_()
    wanted, found = whole(x, context), shared(x, context)
    close(found, wanted, 1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), context)[0] for y in (found, wanted)]
    close(gradients[0], gradients[1], 1e-11)


def decoding_and_maps_are_those_of_the_own_heads() -> None:
    whole = build(4, 4, causal=True, rotary=RotaryPositions(4)).double().eval()
    shared = HeadParallelAttention(whole)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    with torch.no_grad():
        with observe(whole) as maps:
            wanted = whole(x)
        with observe(shared) as own_maps:
            shared(x)
        close(own_maps["own.attend"], maps["attend"][:, shared.own_heads], 1e-12)
        cache = shared.new_cache(BATCH, LENGTH)
        parts = [shared(x[:, :4], cache=cache)]
        parts += [shared(x[:, t : t + 1], cache=cache) for t in range(4, LENGTH)]
        close(torch.cat(parts, 1), wanted, 1e-12)


def a_stack_trains_as_in_one_process() -> None:
    """Two steps of two layers: what all hold stays the same on all."""
    torch.manual_seed(6)
    layers = [build(4, 2, causal=True).double() for _ in range(2)]
    shared = [HeadParallelAttention(layer) for layer in layers]
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    results = []
    for stack in (layers, shared):
        optimizer = torch.optim.SGD([p for layer in stack for p in layer.parameters()], lr=0.1)
        for _ in range(2):
            y = x
            for layer in stack:
                y = y + layer(y)
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
        results.append(y.detach())
    close(results[1], results[0], 1e-12)
    for layer, own in zip(layers, shared, strict=True):
        for name, tensor in own.whole_state().items():
            close(tensor, layer.state_dict()[name], 1e-12)


def other_lengths_raise_everywhere() -> None:
    shared = HeadParallelAttention(build(4, 4))
    last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.raises(ValueError, match=r"must make the same call; process 0: x \(1, 4, 12\)"):
        shared(torch.randn(1, 4 + last, DIM))


@torch.no_grad()
def a_wrong_call_of_one_raises_everywhere() -> None:
    """A fault that only the last process sees; the cache of the others stays as it was."""
    shared = HeadParallelAttention(build(4, 4, causal=True))
    last = dist.get_rank() == dist.get_world_size() - 1
    x, cache = torch.randn(1, 4, DIM), shared.new_cache(1, 8)
    mask = torch.ones(4, 4, dtype=torch.float32 if last else torch.bool)
    with pytest.raises(TypeError if last else ValueError, match="mask must be boolean"):
        shared(x, mask=mask, cache=cache)
    assert cache.length == 0
    with pytest.raises(ValueError, match="x must be"):
        shared(x[..., 1:] if last else x)


def more_processes_than_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_heads must be at least the number of processes"):
        HeadParallelAttention(build(4, 1))


def quick(world: int) -> None:
    for dtype in (torch.float64, torch.float32):
        equal_to_one_process(4, 4, dtype, {"causal": True, "rotary": RotaryPositions(4)})
    equal_to_one_process(6, 3, torch.float64, {"qkv_bias": False, "out_bias": False})
    cross_attention_reads_one_context()
    decoding_and_maps_are_those_of_the_own_heads()
    a_stack_trains_as_in_one_process()
    other_lengths_raise_everywhere()
    a_wrong_call_of_one_raises_everywhere()
    more_processes_than_groups_are_refused()


def thorough(world: int) -> None:
    for dtype in (torch.float64, torch.float32):
        for heads, kv_heads in ((4, 4), (8, 4), (5, 5), (12, 6)):
            for options in ({}, {"causal": True, "window": 3}, {"scale": 0.7, "out_bias": False}):
                equal_to_one_process(heads, kv_heads, dtype, options)
    a_part_of_the_processes_shares_heads()
    cross_attention_reads_one_context()
    if world > 1:
        other_lengths_raise_everywhere()


def a_part_of_the_processes_shares_heads() -> None:
    """A group of the last processes, beside which the first do nothing."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world < 3:
        return
    group = dist.new_group(list(range(world - 2, world)))
    if rank < world - 2:
        return
    whole = build(4, 4).double()
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    close(HeadParallelAttention(whole, group=group)(x), whole(x), 1e-12)


def test_two_processes() -> None:
    run_together(2, quick)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3, 4])
def test_more_processes_and_heads(world: int) -> None:
    run_together(world, thorough)


UNSHARED = (
    ({"dropout": 0.1}, "dropout must be 0"),
    ({"qk_norm": "rms"}, "qk_norm and relative_bias must be None"),
    ({"relative_bias": AlibiBias(4)}, "qk_norm and relative_bias must be None"),
)


def wrong_options(world: int) -> None:
    for options, said in UNSHARED:
        with pytest.raises(ValueError, match=said):
            HeadParallelAttention(build(4, 4, **options))


@pytest.mark.bad_input
def test_options_that_cannot_be_shared_are_refused() -> None:
    run_together(1, wrong_options)


def wrong_shapes(world: int) -> None:
    shared = HeadParallelAttention(build(4, 4))
    x = torch.randn(1, 3, DIM)
    with pytest.raises(ValueError, match="x must be"):
        shared(x[..., 1:])
    with pytest.raises(ValueError, match="broadcastable to"):
        shared(x, bias=torch.zeros(3, 3, 3))


@pytest.mark.bad_input
def test_wrong_shapes_are_named() -> None:
    run_together(1, wrong_shapes)
