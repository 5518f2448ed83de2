"""Mixture of heads: what gates and loss must be, and that skipping heads changes no number."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from heed_core import observe, steer
from heed_core.attention.cosine_mixture import CosineMixture, PooledCosineMixture
from heed_core.attention.mixture_of_heads import MixtureOfHeads, moh_attention
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.head_routing import balance_loss, choose_heads, mixture_gates, norm_gates
from heed_core.head_skipping import alike
from heed_core.relative import AlibiBias, RotaryPositions
from heed_core.testing.oracle import naive_attention
from heed_core.testing.processes import run_together


def pair(**options) -> tuple[MixtureOfHeads, MixtureOfHeads]:
    """The same mixture, skipping heads and not, in float64."""
    settings = {"heads": 6, "shared": 2, "active": 2, "head_dim": 4} | options
    skipping = MixtureOfHeads(12, **settings, skip=True).double().eval()
    dense = MixtureOfHeads(12, **settings, skip=False).double().eval()
    dense.load_state_dict(skipping.state_dict())
    return skipping, dense


def weights(*widths: int) -> list[Tensor]:
    return [torch.randn(width, 12, dtype=torch.float64) for width in widths]


def gates_of(x: Tensor, routed, shared, kind, *, s: int, k: int, gating: str = "code"):
    return mixture_gates(x, routed, shared, kind, shared=s, active=k, gating=gating)


@pytest.mark.parametrize("gating", ["code", "paper"])
def test_gates_are_those_of_the_formula(gating: str) -> None:
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    route, share, kind = weights(5, 3, 2)
    found = gates_of(x, route, share, kind, s=3, k=2, gating=gating).gates
    for b in range(2):
        for t in range(7):
            p, s, a = ((w @ x[b, t]).softmax(0) for w in (route, share, kind))
            top = p.topk(2).indices
            expected = torch.zeros(8, dtype=torch.float64)
            if gating == "paper":
                expected[:3] = a[0] * s
                expected[3 + top] = a[1] * p[top]
            else:
                expected[:3] = 2 * a[0] * 3 * s
                expected[3 + top] = 2 * a[1] * 2 * p[top] / p[top].sum()
            torch.testing.assert_close(found[b, t], expected)


def test_the_sum_of_gates_is_twice_the_shares_of_both_kinds() -> None:
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    route, share, kind = weights(5, 3, 2)
    total = gates_of(x, route, share, kind, s=3, k=2).gates.sum(-1)
    a = (x @ kind.T).softmax(-1)
    torch.testing.assert_close(total, 2 * (3 * a[..., 0] + 2 * a[..., 1]))


def test_all_routed_heads_and_no_shared_one() -> None:
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    (route,) = weights(5)
    found = gates_of(x, route, None, None, s=0, k=5)
    torch.testing.assert_close(found.gates, 5 * found.probabilities)
    tied = gates_of(x, torch.zeros_like(route), None, None, s=0, k=3)
    torch.testing.assert_close(tied.gates[0, 0], torch.tensor([1.0, 1, 1, 0, 0]).double())


def test_one_shared_head_has_no_router_of_its_own() -> None:
    module = MixtureOfHeads(12, heads=4, shared=1, active=2, head_dim=4)
    assert module.share is None
    gates = module(torch.randn(1, 5, 12)).gates
    kinds = module.kind(torch.zeros(1, 5, 12)).softmax(-1)
    assert gates.shape == (1, 5, 4)
    assert kinds.shape == (1, 5, 2)
    assert bool((gates[..., 0] > 0).all())


@pytest.mark.parametrize("router", ["learned", "norm"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": "rms", "scale": 0.4}, {"qk_norm": "layer"}])
def test_idle_routers_that_choose_every_head_are_plain_attention(router: str, options) -> None:
    plain = MultiHeadAttention(12, heads=6, head_dim=4, kv_heads=3, causal=True, **options).double()
    for norm in (plain.query_norm, plain.key_norm):
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
    mixture = MixtureOfHeads.from_attention(plain, shared=2, active=4, router=router)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    found = mixture(x)
    assert torch.equal(found.gates, torch.ones(2, 9, 6).double())
    assert torch.equal(found.output, plain(x))
    bias = torch.randn(6, 9, 9, dtype=torch.float64)
    assert torch.equal(mixture(x, bias=bias).output, plain(x, bias=bias))


def test_the_norm_router_sees_queries_before_they_are_normed() -> None:
    """Behind the norm all are as long: nothing could be chosen."""
    normed, plain = (
        MixtureOfHeads(12, heads=6, shared=2, active=1, head_dim=4, router="norm", qk_norm=norm)
        for norm in ("rms", None)
    )
    plain.load_state_dict(normed.state_dict(), strict=False)
    x = torch.randn(2, 9, 12)
    assert torch.equal(normed(x).gates, plain(x).gates)


def test_equal_scores_go_to_the_first_heads() -> None:
    scores = torch.tensor([[[0.2, 0.5, 0.5, 0.5, 0.1]]])
    assert choose_heads(scores, 2).tolist() == [[[False, True, True, False, False]]]


def test_the_norm_router_takes_the_longest_queries_and_survives_equal_ones() -> None:
    query = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    found = norm_gates(query, shared=2, active=2)
    lengths = query[:, 2:].norm(dim=-1).transpose(1, 2)
    best = lengths.topk(2, dim=-1).indices.sort(-1).values
    assert torch.equal(found.chosen.nonzero()[:, 2].reshape(2, 5, 2), best)
    assert torch.equal(found.gates[..., :2], torch.ones(2, 5, 2).double())
    same = torch.ones(1, 6, 3, 4, requires_grad=True)
    tied = norm_gates(same, shared=2, active=2, straight_through=True)
    assert bool(tied.probabilities.isfinite().all())
    (gradient,) = torch.autograd.grad(tied.gates.sum() + tied.probabilities[..., 0].sum(), same)
    assert bool(gradient.isfinite().all())


def test_straight_through_gates_are_hard_and_have_the_gradient_of_the_probabilities() -> None:
    query = torch.randn(1, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    soft = norm_gates(query, shared=2, active=2, straight_through=True)
    torch.testing.assert_close(soft.gates, soft.gates.round())
    pick = torch.randn(1, 5, 4, dtype=torch.float64)
    (through,) = torch.autograd.grad((soft.gates[..., 2:] * pick).sum(), query)
    hard = norm_gates(query, shared=2, active=2)
    (wanted,) = torch.autograd.grad((hard.probabilities * hard.chosen * pick).sum(), query)
    torch.testing.assert_close(through, wanted)
    assert not hard.gates.requires_grad


def moh_inputs(kv_heads: int) -> tuple[list[Tensor], Tensor]:
    """Query, key and value of 6 heads, and gates of which two of three are 0; head 3 has none."""
    sizes = ((2, 6, 9, 4), (2, kv_heads, 11, 4), (2, kv_heads, 11, 5))
    rows = [torch.randn(size, dtype=torch.float64) for size in sizes]
    gates = torch.rand(2, 9, 6, dtype=torch.float64) * (torch.rand(2, 9, 6) < 0.34)
    gates[..., 3] = 0.0
    return rows, gates


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [None, (2, 6, 9, 11), (6, 1, 11), (9, 11)])
def test_the_function_is_attention_times_the_gates(skip, kv_heads, causal, masked, biased) -> None:
    rows, gates = moh_inputs(kv_heads)
    leaves = [x.requires_grad_() for x in (*rows, gates)]
    bias = None
    if biased is not None:
        leaves.append(bias := torch.randn(biased, dtype=torch.float64, requires_grad=True))
    mask = torch.rand(2, 6, 9, 11) < 0.7 if masked else None
    options = {"mask": mask, "bias": bias, "causal": causal, "scale": 0.3}
    found = moh_attention(*rows, gates, skip=skip, **options)
    plain = naive_attention(*rows, **options)
    wanted = plain * gates.mT[..., None]
    torch.testing.assert_close(found, wanted)
    probe = torch.randn_like(wanted)
    ours, theirs = (
        torch.autograd.grad((y * probe).sum(), leaves, retain_graph=True) for y in (found, wanted)
    )
    chosen = gates.detach() != 0  # a gate of a skipped head has no gradient, as in the module
    if skip:
        theirs = (*theirs[:3], theirs[3] * chosen, *theirs[4:])
    torch.testing.assert_close(ours, theirs)


def test_the_function_skips_what_no_token_uses() -> None:
    rows, gates = moh_inputs(6)
    with FlopCounterMode(display=False) as counter:
        moh_attention(*rows, torch.zeros_like(gates), skip=True)
    assert counter.get_total_flops() == 0


def test_the_function_with_gates_of_a_router_is_what_the_module_mixes() -> None:
    module = pair()[1]
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    layers = (module.query, module.key, module.value)
    rows = [layer(x).view(2, 9, 6, 4).transpose(1, 2) for layer in layers]
    found = module(x)
    mixed = moh_attention(*rows, found.gates, skip=True)
    torch.testing.assert_close(module.out(mixed.transpose(1, 2).flatten(2)), found.output)


@pytest.mark.bad_input
def test_gates_of_another_size_are_refused() -> None:
    rows, gates = moh_inputs(6)
    with pytest.raises(ValueError, match=r"gates must be \(batch, tokens, heads\) \(2, 9, 6\)"):
        moh_attention(*rows, gates.mT)


OPTIONS = {
    "plain": {},
    "grouped": {"kv_heads": 3},
    "one-key-head": {"kv_heads": 1, "shared": 3},
    "causal": {"causal": True},
    "causal-rotary": {"causal": True, "rotary": RotaryPositions(4)},
    "norm": {"router": "norm", "rotary": RotaryPositions(4)},
    "none-shared": {"shared": 0, "active": 2},
    "no-biases": {"qkv_bias": False, "out_bias": False},
    "normed-rotary": {"qk_norm": "rms", "scale": 0.7, "rotary": RotaryPositions(4)},
    "normed-norm": {"qk_norm": "layer", "router": "norm"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("masked", ["none", "padding", "rows", "heads", "bias"])
def test_skipping_changes_no_number(options, masked: str) -> None:
    skipping, dense = pair(**options)
    x = torch.randn(3, 19, 12, dtype=torch.float64)
    given = {}
    if masked == "padding":
        given["padding_mask"] = torch.arange(19) < torch.tensor([[19], [14], [3]])
    elif masked == "bias":
        given["bias"] = torch.randn(6, 19, 19, dtype=torch.float64, requires_grad=True)
    elif masked != "none":
        shape = (3, 1, 19, 19) if masked == "rows" else (1, 6, 1, 19)
        given["mask"] = (torch.rand(shape) < 0.6) | torch.eye(19, dtype=torch.bool)
    results = []
    for module in (skipping, dense):
        leaf = x.clone().requires_grad_()
        found = module(leaf, **given)
        leaves = [leaf, *module.parameters(), *([given["bias"]] if masked == "bias" else [])]
        loss = found.output.sin().sum() + found.balance_loss
        results.append([*found, *torch.autograd.grad(loss, leaves)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_skipping_in_cross_attention() -> None:
    skipping, dense = pair(context_dim=5)
    x, context = torch.randn(2, 9, 12).double(), torch.randn(2, 6, 5).double()
    real = torch.arange(6) < torch.tensor([[6], [4]])
    torch.testing.assert_close(
        skipping(x, context, padding_mask=real).output, dense(x, context, padding_mask=real).output
    )


@pytest.mark.parametrize("skip", [False, True])
def test_a_context_of_a_causal_mixture_is_aligned_bottom_right(skip: bool) -> None:
    """The last 9 of 13 tokens stand at the places of those that ask, as in plain attention."""
    plain = MultiHeadAttention(12, heads=6, head_dim=4, causal=True).double()
    mixture = MixtureOfHeads.from_attention(plain, shared=2, active=4, skip=skip)
    x, context = torch.randn(2, 9, 12).double(), torch.randn(2, 13, 12).double()
    torch.testing.assert_close(mixture(x, context).output, plain(x, context))
    later = context.clone()
    later[:, -1] += 1.0
    changed = (mixture(x, later).output - mixture(x, context).output).abs().amax((0, 2)) > 1e-12
    assert changed.tolist() == [False] * 8 + [True]


def test_a_head_that_nobody_chooses_is_skipped_whole() -> None:
    skipping, dense = pair(active=1)
    with torch.no_grad():
        skipping.route.weight.zero_()
    dense.load_state_dict(skipping.state_dict())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    gates = skipping(x).gates
    assert bool((gates[..., 3:] == 0).all())
    torch.testing.assert_close(skipping(x).output, dense(x).output)


def test_heads_that_are_chosen_as_often_run_in_one_call() -> None:
    """Gates of 8 tokens: heads 1 to 3 for half of them, head 4 for one, head 5 for none."""
    gates = torch.zeros(1, 8, 6)
    gates[:, ::2, 1:4], gates[:, 3, 4] = 1.0, 1.0
    assert alike(gates, 1, None, single=False) == [([1, 2, 3], 4), ([4], 1)]
    alone = [([1], 4), ([2], 4), ([3], 4), ([4], 1)]
    assert alike(gates, 1, None, single=True) == alone
    assert alike(gates, 1, 5, single=False) == [([1, 2, 3, 4, 5], 5)]


def test_operations_fall_with_the_share_of_heads_in_use() -> None:
    """What is left: keys and values whole, the rest in the share (S + K) / H of heads."""
    n, c, heads = 64, 96, 12
    x = torch.randn(1, n, c)
    for shared, active in ((2, 1), (3, 3), (4, 6)):
        module = MixtureOfHeads(c, heads=heads, shared=shared, active=active, skip=True)
        module.attend.impl = "reference"  # whose operations are counted
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        share = (shared + active) / heads
        rows = 4 * n * c * c + share * (4 * n * c * c + 4 * n * n * c)
        routers = 2 * n * c * (heads + 2)
        least = rows + routers  # heads that are computed together are filled up to the most used
        assert 0.999 * least < counter.get_total_flops() < 1.03 * least


def test_watched_calls_compute_all_heads_and_edits_reach_them() -> None:
    skipping, _ = pair()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    plain = skipping(x).output
    with observe(skipping) as record:
        torch.testing.assert_close(skipping(x).output, plain)
    assert record["attend"].shape == (2, 6, 9, 9)
    with steer(skipping, lambda w, call: w * 0.0):
        torch.testing.assert_close(skipping(x).output, skipping.out.bias.expand(2, 9, 12))


def test_balance_loss_of_a_collapsed_and_of_a_uniform_router() -> None:
    heads, active = 5, 2
    collapsed = torch.zeros(3, 4, heads)
    collapsed[..., :active] = 1 / active
    assert float(balance_loss(collapsed, collapsed > 0)) == pytest.approx(heads)
    uniform = torch.full((1, heads, heads), 1 / heads)
    turns = torch.stack([torch.arange(heads).roll(i) < active for i in range(heads)])[None]
    assert float(balance_loss(uniform, turns)) == pytest.approx(active)


def test_balance_loss_pushes_the_overused_head_down() -> None:
    logits = torch.tensor([3.0, 1.0, 0.0, -1.0]).expand(2, 6, 4).clone().requires_grad_()
    probabilities = logits.softmax(-1)
    loss = balance_loss(probabilities, choose_heads(probabilities, 1))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool((gradient[..., 0] > 0).all())
    assert bool((gradient[..., 1:] < 0).all())


def test_padding_changes_neither_loss_nor_real_tokens() -> None:
    module = MixtureOfHeads(12, heads=6, shared=2, active=2, head_dim=4).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    real = (torch.arange(9) < 6).expand(2, 9)
    loud = x.masked_fill(~real[..., None], 1e4)
    first, second = module(x, padding_mask=real), module(loud, padding_mask=real)
    assert torch.equal(first.balance_loss, second.balance_loss)
    assert torch.equal(first.output[:, :6], second.output[:, :6])
    assert bool((second.gates[:, 6:, 2:] == 0).all())
    torch.testing.assert_close(first.balance_loss, module(x[:, :6]).balance_loss)


@pytest.mark.parametrize("router", ["learned", "norm"])
@pytest.mark.parametrize("skip", [False, True])
def test_decoding_token_by_token_equals_one_forward(router: str, skip: bool) -> None:
    module = MixtureOfHeads(
        12,
        heads=6,
        shared=2,
        active=2,
        head_dim=4,
        kv_heads=3,
        causal=True,
        rotary=RotaryPositions(4),
        router=router,
        skip=skip,
    ).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = module(x).output
        cache = module.new_cache(2, 9)
        parts = [module(x[:, :4], cache=cache).output]
        parts += [module(x[:, t : t + 1], cache=cache).output for t in range(4, 9)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        cache.crop(6)
        torch.testing.assert_close(module(x[:, 6:], cache=cache).output, whole[:, 6:])


def test_a_stage_of_the_published_vit_has_its_number_of_parameters() -> None:
    """Routers add C (E + S + 2) weights to attention; none with the norm router."""
    plain = sum(p.numel() for p in MultiHeadAttention(32, heads=8).parameters())
    learned = MixtureOfHeads(32, heads=8, shared=2, active=3)
    assert sum(p.numel() for p in learned.parameters()) == plain + 32 * (6 + 2 + 2)
    norm = MixtureOfHeads(32, heads=8, shared=2, active=3, router="norm")
    assert sum(p.numel() for p in norm.parameters()) == plain
    whole = MixtureOfHeads(32, heads=8, shared=8, active=0)
    assert sum(p.numel() for p in whole.parameters()) == plain + 32 * 8


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def stage(dim: int, heads: int, shared: int, active: int, *, pooled: bool) -> torch.nn.Module:
    options = {"heads": heads, "shared": shared, "active": active}
    with torch.device("meta"):
        if pooled:
            return PooledCosineMixture(dim, pool=2, **options)
        return CosineMixture(dim, **options)


@pytest.mark.parametrize(
    ("dim", "heads", "shared", "active", "pooled", "published"),
    [(288, 12, 3, 6, True, 431_568), (576, 24, 8, 12, False, 1_358_832)],
    ids=["third-stage", "fourth-stage"],
)
def test_a_stage_of_the_vision_model_has_its_number_of_parameters(
    dim: int, heads: int, shared: int, active: int, pooled: bool, published: int
) -> None:
    assert parameters(stage(dim, heads, shared, active, pooled=pooled)) == published


VISION = {  # depths, heads, shared, active, published
    "B-75": ((5, 5, 23, 5), (4, 8, 16, 32), (4, 8, 4, 5), (0, 0, 8, 16), 90_020_632),
    "B-50": ((5, 5, 23, 5), (4, 8, 16, 32), (2, 2, 2, 4), (2, 4, 6, 8), 90_023_512),
    "S-80": ((5, 5, 22, 5), (3, 6, 12, 24), (3, 6, 3, 8), (0, 0, 6, 12), 49_910_548),
    "S-75": ((5, 5, 22, 5), (3, 6, 12, 24), (3, 6, 3, 4), (0, 0, 6, 12), 49_910_548),
}


@pytest.mark.parametrize("name", VISION)
def test_vision_models_have_their_numbers_of_parameters(name: str) -> None:
    """All attentions are ours; the rest of a vision model by its list."""
    depths, heads, shared, active, published = VISION[name]
    total, last = 0, 3
    for place, (depth, h, s, k) in enumerate(zip(depths, heads, shared, active, strict=True)):
        dim, side = 24 * h, 7 if place == 0 else 3
        hidden = int(2 * dim * (8 if place < 2 else 4) / 3)
        mlp = dim * 2 * hidden + 2 * hidden + 9 * hidden + hidden + hidden * dim + dim
        attention = parameters(stage(dim, h, s, k, pooled=place < 3))
        total += last * dim * side * side + dim + 2 * dim  # patches, their norm
        total += depth * (attention + mlp + 4 * dim) + 2 * dim  # two norms, one at the end
        last = dim
    assert total + 1000 * last + 1000 == published


def in_turn(*parts: tuple[int, int]) -> list[int]:
    return [value for value, times in parts for _ in range(times)]


SMALL, BASE = (384, in_turn((6, 12))), (768, in_turn((12, 12)))
LARGE = (1024, in_turn((8, 8), (16, 8), (24, 8)))
XL = (1152, in_turn((8, 9), (16, 10), (24, 9)))
DIFFUSION = {
    "S-90": (*SMALL, 64, in_turn((3, 8), (6, 4)), in_turn((2, 8), (0, 4)), 32_997_152),
    "S-75": (*SMALL, 64, in_turn((2, 2), (3, 8), (6, 2)), in_turn((1, 6), (2, 4), (0, 2)),
             32_998_688),
    "B-90": (*BASE, 64, in_turn((6, 5), (7, 5), (12, 2)), in_turn((4, 10), (0, 2)), 130_638_368),
    "B-75": (*BASE, 64, in_turn((4, 2), (6, 8), (12, 2)), in_turn((2, 2), (3, 8), (0, 2)),
             130_638_368),
    "L-90": (*LARGE, 64, in_turn((8, 8), (16, 16)),
             in_turn((0, 16), (3, 8)), 458_512_416),
    "L-75": (*LARGE, 64, in_turn((8, 16), (12, 8)),
             in_turn((0, 8), (4, 16)), 458_528_800),
    "XL-90": (*XL, 72, in_turn((8, 9), (16, 19)), in_turn((0, 19), (3, 9)), 675_666_464),
    "XL-75": (*XL, 72, in_turn((8, 9), (10, 10), (14, 9)), in_turn((0, 9), (2, 19)),
              675_689_504),
}  # fmt: skip


TRAINABLE = {
    "S-90": 32_898_848, "S-75": 32_900_384, "B-90": 130_441_760, "B-75": 130_441_760,
    "L-90": 458_250_272, "L-75": 458_266_656, "XL-90": 675_371_552, "XL-75": 675_394_592,
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_transformers_have_their_numbers_of_parameters(name: str) -> None:
    """All attentions are ours, one per layer; the rest of a diffusion transformer by its list."""
    dim, heads, head_dim, shared, active, published = DIFFUSION[name]
    total = 0
    with torch.device("meta"):
        for h, s, k in zip(heads, shared, active, strict=True):
            total += parameters(MixtureOfHeads(dim, heads=h, shared=s, active=k, head_dim=head_dim))
            total += 8 * dim * dim + 5 * dim  # two linear maps to and from 4 dim
            total += 6 * dim * dim + 6 * dim  # modulation
    total += 16 * dim + dim + 256 * dim  # patches of 2 x 2 x 4, their places
    total += 256 * dim + dim + dim * dim + dim + 1001 * dim  # time, labels
    total += 2 * dim * dim + 2 * dim + 32 * dim + 32  # last modulation, output
    assert total == published
    assert total - 256 * dim == TRAINABLE[name]  # without the places of 16 x 16 patches


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "rotary": RotaryPositions(4)},
        {"router": "norm", "kv_heads": 3},
        {"qk_norm": "rms"},
    ],
    ids=["plain", "causal-rotary", "norm-grouped", "normed"],
)
def test_graphs_with_a_capacity_drop_no_token(options) -> None:
    """One graph serves calls that fit, calls in which all tokens want the same heads, lengths."""
    settings = {"heads": 6, "shared": 2, "active": 2, "head_dim": 4} | options
    module = MixtureOfHeads(12, **settings, capacity=1.25).eval()
    torch._dynamo.reset()
    graph = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    spread = torch.randn(2, 41, 12)
    same = torch.randn(12).repeat(2, 41, 1)
    with torch.no_grad():
        for x in (spread, same, spread[:, :23].clone()):
            torch.testing.assert_close(graph(x), module(x), rtol=1e-5, atol=1e-6)
        sizes = {0: torch.export.Dim("b"), 1: torch.export.Dim("n")}
        exported = torch.export.export(module, (spread,), dynamic_shapes={"x": sizes}).module()
        for x in (spread, same, spread[:, :23].clone(), spread[:1, :1].clone()):
            torch.testing.assert_close(exported(x)[0], module(x).output, rtol=1e-5, atol=1e-6)


@pytest.mark.compile
def test_graphs_with_a_capacity_compute_so_many_rows() -> None:
    n, c, heads, shared, active = 64, 48, 6, 2, 2
    module = MixtureOfHeads(c, heads=heads, shared=shared, active=active, capacity=1.25)
    module.eval().requires_grad_(False)
    module.attend.impl = "reference"  # whose operations are counted
    graph = torch.export.export(module, (torch.randn(1, n, c),)).graph_module
    (choice,) = (node for node in graph.graph.nodes if "cond" in str(node.target))
    given = [getattr(x, "meta", {}).get("val", x) for x in choice.args[3]]
    counts = []
    for branch in choice.args[1:3]:
        with FlopCounterMode(display=False) as counter:
            getattr(graph, branch.target)(*given)
        counts.append(counter.get_total_flops())
    routed, width = heads - shared, c // heads
    rows = 2 + n * 5 * active // (4 * routed)
    each = 4 * c * width + 4 * n * width  # of a row of one head: projections, products
    assert counts == [each * (shared * n + routed * rows), each * heads * n]
    assert counts[0] < 0.8 * counts[1]


def balance_of_all_tokens_on_every_process(world: int) -> None:
    """Processes with other numbers of samples and padding: as one process that has them all."""
    rank = dist.get_rank()
    torch.manual_seed(1)
    module = MixtureOfHeads(12, heads=6, shared=2, active=2, head_dim=4).double()
    x = torch.randn(5, 9, 12, dtype=torch.float64)
    real = torch.arange(9) < torch.tensor([9, 4, 7, 1, 9])[:, None]
    whole = module(x, padding_mask=real).balance_loss
    wanted = torch.autograd.grad(whole, module.route.weight)[0]
    own = slice(0, 2) if rank == 0 else slice(2, 5)
    errors = {}
    for sync in (True, False):
        module.sync_balance = sync
        loss = module(x[own], padding_mask=real[own]).balance_loss
        found = torch.autograd.grad(loss, module.route.weight)[0]
        dist.all_reduce(found)
        errors[sync] = [float((loss - whole).abs().detach())]
        errors[sync].append(float((found / world - wanted).abs().max()))
    assert max(errors[True]) < 1e-12, errors
    assert min(errors[False]) > 1e-4, errors


def test_balance_loss_over_processes_is_that_of_one_process() -> None:
    run_together(2, balance_of_all_tokens_on_every_process)


def test_one_process_is_all_processes() -> None:
    x = torch.randn(2, 7, 12)
    module = MixtureOfHeads(12, heads=6, shared=2, active=2, head_dim=4, sync_balance=True)
    together = module(x).balance_loss
    module.sync_balance = False
    assert torch.equal(together, module(x).balance_loss)


def test_without_routed_heads_the_loss_is_zero() -> None:
    found = MixtureOfHeads(12, heads=3, shared=3, active=0)(torch.randn(1, 4, 12))
    assert found.balance_loss.shape == ()
    assert float(found.balance_loss.detach()) == 0.0


@pytest.mark.bad_input
def test_wrong_options_are_named() -> None:
    for options, said in (
        ({"shared": 7, "active": 0}, "shared must be from 0 to heads=6"),
        ({"shared": -1, "active": 2}, "shared must be"),
        ({"shared": 2, "active": 5}, "active must be from 0 to the 4 heads"),
        ({"shared": 2, "active": 0}, "without use"),
        ({"shared": 2, "active": 2, "router": "random"}, "router must be one of"),
        ({"shared": 2, "active": 2, "gating": "soft"}, "gating must be one of"),
        ({"shared": 2, "active": 2, "router": "norm", "gating": "paper"}, "no effect"),
        ({"shared": 2, "active": 2, "straight_through": True}, "no effect"),
        ({"shared": 2, "active": 2, "capacity": 0.9}, "capacity must be at least 1"),
        ({"shared": 2, "active": 2, "capacity": 1.5, "skip": False}, "no effect"),
        ({"shared": 6, "active": 0, "capacity": 1.5}, "no effect without routed heads"),
    ):
        with pytest.raises(ValueError, match=said):
            MixtureOfHeads(12, heads=6, head_dim=4, **options)
    module = MixtureOfHeads(12, heads=6, head_dim=4, shared=2, active=2)
    with pytest.raises(ValueError, match="positions have no effect"):
        module(torch.randn(1, 3, 12), positions=torch.arange(3))
    with pytest.raises(ValueError, match="causal self-attention only"):
        module(torch.randn(1, 3, 12), cache=module.new_cache(1, 4))
    with pytest.raises(ValueError, match="bias must be broadcastable"):
        module(torch.randn(1, 3, 12), bias=torch.zeros(6, 3, 4))
    with pytest.raises(TypeError, match="bias must be floating point"):
        module(torch.randn(1, 3, 12), bias=torch.ones(3, 3, dtype=torch.bool))
    for name, option in (("window", 2), ("relative_bias", AlibiBias(3))):
        other = MultiHeadAttention(12, heads=3, causal=True, **{name: option})
        with pytest.raises(ValueError, match=f"attention must have no {name}"):
            MixtureOfHeads.from_attention(other, shared=1, active=1)
