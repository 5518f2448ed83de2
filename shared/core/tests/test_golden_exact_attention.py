"""A sequence that processes share against stored float64 numbers: blocks, rows, bytes."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heed_core import attend, context_parallel
from heed_core.backends.reference import scores as all_scores
from heed_core.context_parallel import (
    CommCounter,
    context_parallel_attention,
    global_positions,
    shard_sequence,
    unshard_sequence,
)
from heed_core.testing.processes import run_together

FOLDER = Path(__file__).parent / "golden" / "exact_attention"
META = json.loads((FOLDER / "meta.json").read_text())
WINDOW = META["config"]["window"]
BYTES = {(row["world"], row["kv_heads"]): row for row in META["expected_bytes_float64_even_length"]}

CASES = {
    "full": ({}, None),
    "causal": ({"causal": True}, None),
    "padded": ({}, "real_token"),
    "causal_padded": ({"causal": True}, "real_token"),
    "causal_window": (
        {"causal": True, "mask_fn": lambda i, j: (i - j).abs() < WINDOW},
        None,
    ),
    "causal_left_padded": ({"causal": True}, "left_padded"),
}


def load() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(FOLDER / "fixture.safetensors")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    pytest.importorskip("safetensors.torch", reason="reads the stored tensors")
    return load()


def check(found: Tensor, stored: Tensor, tolerance: float) -> None:
    """Without torch.testing, which imports all of torch's distributed tensors: seconds."""
    assert found.shape == stored.shape
    assert torch.equal(found.isneginf(), stored.isneginf())
    error = (found.double() - stored.double()).detach().nan_to_num().abs().max()
    assert float(error) <= tolerance, float(error)


def bytes_agree(world: int, groups: int, method: str, forwards: int, backwards: int) -> None:
    stored = BYTES[world, groups]
    wanted = stored[f"{method}_forward_received_bytes_per_rank"]
    assert wanted is None or forwards == wanted, (method, forwards, wanted)
    if method == "allgather":
        assert backwards == stored["allgather_backward_reduce_scatter_bytes_per_rank"]


def case_agrees(
    golden: dict[str, Tensor], kind: str, case: str, world: int, method: str, layout: str
) -> None:
    """Outputs, log-sum-exp, gradients and, where nothing is padded, bytes of a stored case."""
    size = kind.split(".")[1]
    options, mask = CASES[case]
    leaves = [golden[f"input.{kind}.{name}"].double() for name in "qkv"]
    length, groups = leaves[0].shape[2], leaves[1].shape[1]
    own = [shard_sequence(x, None, layout=layout, dim=2).requires_grad_() for x in leaves]
    options = {**options, "method": method, "layout": layout}
    if mask is not None:
        real = golden[f"input.{size}.{mask}"]
        options["padding_mask"] = shard_sequence(real, None, layout=layout, dim=1)
    probe = golden[f"input.{kind}.loss_weight"].double()
    with CommCounter() as forwards:
        out, lse = context_parallel_attention(*own, return_lse=True, **options)
    with CommCounter() as backwards:
        part = shard_sequence(probe, None, layout=layout, dim=2)
        gradients = torch.autograd.grad((out * part).sum(), own)
    if case == "causal" and method != "ulysses":  # whose log-sum-exp travels too
        bytes_agree(world, groups, method, forwards.received, backwards.received)
    if case == "causal" and method == "ulysses":
        with CommCounter() as forwards:
            context_parallel_attention(*own, **options)
        bytes_agree(world, groups, method, forwards.received, 0)
    stored = f"{kind}.{case}"
    found = {
        f"output64.{stored}.out": out,
        f"output64.{stored}.lse": lse,
        **{f"grad.{stored}.{n}": g for n, g in zip("qkv", gradients, strict=True)},
    }
    for name, ours in found.items():
        if name in golden:  # some cases have no gradients
            whole = unshard_sequence(ours, None, layout=layout, dim=2, length=length)
            single = golden[name].dtype == torch.float32
            check(whole, golden[name], 2e-5 if single else 1e-10)


def shared_as_stored(world: int) -> None:
    golden, context_parallel.TILE = load(), 5
    names = sorted(name.split(".") for name in golden if name.startswith("output64.G"))
    cases = sorted({(f"{group}.{size}", case) for _, group, size, case, _ in names})
    assert len(cases) == 16
    for kind, case in cases:
        for method in ("ring", "allgather", "ulysses"):
            for layout in ("contiguous", "zigzag"):
                case_agrees(golden, kind, case, world, method, layout)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_the_stored_cases(world: int) -> None:
    pytest.importorskip("safetensors.torch", reason="reads the stored tensors")
    run_together(world, shared_as_stored)


def plan(world: int, length: int) -> context_parallel._Plan:
    return context_parallel._Plan(
        group=None,
        layout="contiguous",
        causal=True,
        mask_fn=None,
        scale=META["config"]["d"] ** -0.5,
        world=world,
        count=length // world,
        real=None,
    )


def test_blocks_of_the_ring_and_their_sums(golden) -> None:
    """What each block of keys gives alone, and all that a block of queries sees together."""
    world, length, groups = max(META["config"]["world"]), META["config"]["n"], "G2.even"
    whole = [golden[f"input.{groups}.{name}"].double() for name in "qkv"]
    call = plan(world, length)
    blocks = [[x[:, :, call.tokens(process)] for x in whole] for process in range(world)]
    for asking, (query, _, _) in enumerate(blocks):
        merged = context_parallel._nothing_yet(query, *blocks[asking][1:])
        for source in reversed(range(asking + 1)):  # as they come round
            key, value = blocks[source][1:]
            alone = context_parallel._nothing_yet(query, key, value)
            context_parallel._absorb(alone, key, value, call, asking, source)
            stored = f"output64.ring.q{asking}_k{source}"
            check(alone.out.flatten(1, 2), golden[f"{stored}.out"], 1e-10)
            check(alone.lse.flatten(1, 2)[..., 0], golden[f"{stored}.lse"], 1e-10)
            context_parallel._absorb(merged, key, value, call, asking, source)
        stored = f"output64.{groups}.causal"
        rows = call.tokens(asking)
        check(merged.out.flatten(1, 2), golden[f"{stored}.out"][:, :, rows], 1e-10)
        check(merged.lse.flatten(1, 2)[..., 0], golden[f"{stored}.lse"][:, :, rows], 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_causality_of_fewer_queries_is_aligned_to_the_last_key(golden, dtype, tolerance) -> None:
    query, key, value = (golden[f"input.G2.even.{name}"].to(dtype) for name in "qkv")
    query = query[:, :, : META["config"]["n_q_short"]]
    out = attend(query, key, value, causal=True)
    n, m = query.shape[2], key.shape[2]
    seen = torch.arange(m) <= torch.arange(n)[:, None] + m - n
    products = all_scores(query, key, scale=query.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
    check(out, golden["output64.bottom_right_causal.out"], tolerance)
    check(products.logsumexp(-1), golden["output64.bottom_right_causal.lse"], tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_padded_start_gives_nothing(golden, dtype) -> None:
    """The first rows see no real key: output 0, and no gradient from them."""
    leaves = [golden[f"input.G2.even.{n}"].to(dtype).requires_grad_() for n in "qkv"]
    out = attend(*leaves, mask=golden["input.even.left_padded"][:, None, None], causal=True)
    stored = golden["output64.G2.even.causal_left_padded.out"]
    empty = golden["output64.G2.even.causal_left_padded.lse"].isneginf()
    assert bool(empty.any())
    assert not bool(out[empty].any())
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    check(out, stored, tolerance)
    probe = golden["input.G2.even.loss_weight"].to(dtype)
    for name, ours in zip("qkv", torch.autograd.grad((out * probe).sum(), leaves), strict=True):
        check(ours, golden[f"grad.G2.even.causal_left_padded.{name}"], 10 * tolerance)


@pytest.mark.parametrize("world", META["config"]["world"])
def test_zigzag_holds_the_stored_chunks_and_shares_the_work(world: int) -> None:
    length = META["config"]["n"]
    size, stored = length // (2 * world), META["zigzag"][str(world)]
    pairs: dict[str, list[int]] = {"zigzag": [], "contiguous": []}
    for rank in range(world):
        for layout, found in pairs.items():
            found.append(int((global_positions(rank, world, length, layout) + 1).sum()))
        chunks = global_positions(rank, world, length, "zigzag")[::size] // size
        assert chunks.tolist() == stored["owner_chunks"][rank]
    assert pairs["zigzag"] == stored["permitted_pairs_per_rank_causal"]
    assert pairs["contiguous"] == stored["permitted_pairs_per_rank_contiguous"]
