"""A sequence that processes share: equal to one process, bytes as the formulas say."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from heed_core.backends.reference import run as written_out
from heed_core.context_parallel import (
    CommCounter,
    context_parallel_attention,
    global_positions,
    padded_length,
    shard_sequence,
    unshard_sequence,
)

BATCH, WIDTH = 2, 4


def near(i, j):
    return (i - j).abs() <= 5


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"mask_fn": near},
    "causal window": {"causal": True, "mask_fn": near},
}


def equal_to_one_process(length: int, heads: int, groups: int, method: str, layout: str) -> None:
    world = dist.get_world_size()
    torch.manual_seed(3)
    whole = [
        torch.randn(BATCH, h, length, WIDTH, dtype=torch.float64) for h in (heads, groups, groups)
    ]
    probe = torch.randn(BATCH, heads, length, WIDTH, dtype=torch.float64)
    lengths = torch.tensor([[length], [length - 3]])
    real = torch.arange(length) < lengths
    share = padded_length(length, world, layout) // world
    for options in CASES.values():
        leaves = [x.clone().requires_grad_() for x in whole]
        place = torch.arange(length)
        mask = real[:, None, None]
        if "mask_fn" in options:
            mask = mask & near(place[:, None], place[None])
        exact = written_out(
            *leaves,
            mask=mask,
            bias=None,
            causal=options.get("causal", False),
            scale=WIDTH**-0.5,
            dropout=0.0,
        )
        wanted = torch.autograd.grad((exact * probe).sum(), leaves)
        own = [shard_sequence(x, None, layout=layout, dim=2).requires_grad_() for x in whole]
        with CommCounter() as counter:
            out = context_parallel_attention(
                *own,
                method=method,
                layout=layout,
                padding_mask=shard_sequence(real, None, layout=layout, dim=1),
                **options,
            )
        size = BATCH * share * WIDTH * 8
        bytes_received = {
            "ring": 2 * (world - 1) * groups * size,
            "allgather": 2 * (world - 1) * groups * size,
            "ulysses": (world - 1) * (2 * heads + 2 * groups) * size // world,
        }[method]
        assert counter.received == bytes_received, (method, counter.received, bytes_received)
        part = shard_sequence(probe, None, layout=layout, dim=2)
        found = torch.autograd.grad((out * part).sum(), own)
        for ours, expected in zip((out, *found), (exact, *wanted), strict=True):
            together = unshard_sequence(ours, None, layout=layout, dim=2, length=length)
            # torch.testing imports all of torch's distributed tensors here: seconds.
            error = float((together - expected).detach().abs().max())
            assert error <= 1e-10, (method, layout, options, error)


def other_lengths_raise_everywhere() -> None:
    x = torch.randn(1, 2, 4 + dist.get_rank(), WIDTH)
    with pytest.raises(ValueError, match="one shape on all processes"):
        context_parallel_attention(x, x, x)


def quick(world: int) -> None:
    for method in ("ring", "allgather", "ulysses"):
        for layout in ("contiguous", "zigzag"):
            equal_to_one_process(13, world * 2, world, method, layout)
    other_lengths_raise_everywhere()


def thorough(world: int) -> None:
    for length in (24, 31):
        for method in ("ring", "allgather", "ulysses"):
            for layout in ("contiguous", "zigzag"):
                equal_to_one_process(length, 2 * world, world, method, layout)
                equal_to_one_process(length, world, world, method, layout)


def worker(rank: int, world: int, file: str, job) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        job(world)
    finally:
        dist.destroy_process_group()


def spawn(world: int, job) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "meeting")
        mp.start_processes(worker, args=(world, file, job), nprocs=world, start_method="fork")


def test_two_processes() -> None:
    spawn(2, quick)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_more_processes_lengths_and_heads(world: int) -> None:
    spawn(world, thorough)


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
    with pytest.raises(ValueError, match="query must be"):
        context_parallel_attention(x[0], x, x)
    with pytest.raises(ValueError, match="length must be a multiple"):
        global_positions(0, 2, 5)
