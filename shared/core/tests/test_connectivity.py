"""Predicted connectivity: golden masks and numbers, the two paths, how the predictor learns."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from heed_core import attend, observe
from heed_core.attention.connectivity import (
    ConnectivityAttention,
    LowRankConnectivity,
    connectivity_attention,
    connectivity_attention_from_sparsifiner,
    connectivity_scores,
    gathered_attention,
    topk_mask,
)
from heed_core.testing.golden_fixtures import GoldenFixture

GOLDEN = Path(__file__).parent / "golden" / "sparsifiner"
DTYPES = [torch.float64, torch.float32]


@pytest.fixture(scope="module")
def golden() -> GoldenFixture:
    return GoldenFixture.load(GOLDEN)


def official(golden: GoldenFixture, dtype: torch.dtype, **options: object) -> ConnectivityAttention:
    module = ConnectivityAttention(
        32, heads=4, tokens=21, keep=0.4, rank=7, top_coefficients=3, prune_rows=True, **options
    )
    module.load_state_dict(connectivity_attention_from_sparsifiner(golden.weights()))
    return module.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_masks_weights_outputs_and_gradients(golden, dtype: torch.dtype) -> None:
    module = official(golden, dtype)
    x = golden.input("x", dtype)
    with observe(module) as maps:
        y = module(x)
    golden.check("y", y)
    golden.check("masked_attn", maps["attend"])
    query, key, _ = module._projected(x)
    scores = module.connectivity(query, key)
    golden.check("approx_attn", scores)
    assert torch.equal(module.mask(scores).float(), golden.tensors["output.attn_mask"])
    golden.loss(y).backward()
    golden.check("grad.input.x", x.grad)
    golden.check("grad.weights.proj.weight", module.out.weight.grad)
    parts = (module.query, module.key, module.value)
    golden.check("grad.weights.qkv.weight", torch.cat([part.weight.grad for part in parts]))
    assert all(parameter.grad is None for parameter in module.connectivity.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_pruned_tokens(golden, dtype: torch.dtype) -> None:
    module = official(golden, dtype)
    x = golden.input("x", dtype)
    kept = torch.nn.functional.pad(golden.tensors["input.token_mask"], (1, 0), value=True)
    with observe(module) as maps:
        y = module(x, kept=kept)
    golden.check("y.pruned", y)
    golden.check("masked_attn.pruned", maps["attend"])
    query, key, _ = module._projected(x)
    mask = module.mask(module.connectivity(query, key, kept=kept), kept)
    assert torch.equal(mask.float(), golden.tensors["output.attn_mask.pruned"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_reconstruction(golden, dtype: torch.dtype) -> None:
    module = official(golden, dtype)
    x = golden.input("x", dtype)
    y, scores = module.reconstruct(x)
    golden.check("y.reconstruct", y)
    golden.check("approx_attn.reconstruct", scores)
    query, key, _ = module._projected(x)
    golden.check("basis_coef.reconstruct", module.connectivity.coefficients(query, key))


def test_golden_notices_another_scale(golden) -> None:
    module = official(golden, torch.float32)
    module.connectivity.scale = 8**-0.5
    query, key, _ = module._projected(golden.tensors["input.x"])
    with pytest.raises(AssertionError, match="off"):
        golden.check("approx_attn", module.connectivity(query, key))


@pytest.mark.parametrize("prune_rows", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_the_gathered_path_equals_the_masked_one_with_all_gradients(
    golden, pruned: bool, prune_rows: bool
) -> None:
    kept = torch.ones(2, 21, dtype=torch.bool)
    if pruned:
        kept[0, 3:17] = kept[1, 2:6] = False
    found = {}
    for path in ("mask", "gather"):
        module = official(golden, torch.float64, path=path)
        module.prune_rows = prune_rows
        x = golden.input("x", torch.float64)
        y = module(x, kept=kept if pruned else None)
        golden.loss(y).backward()
        found[path] = [y, x.grad, module.query.weight.grad, module.value.weight.grad]
    for masked, gathered in zip(found["mask"], found["gather"], strict=True):
        torch.testing.assert_close(gathered, masked)


def test_gathered_attention_is_masked_attention() -> None:
    query, key, value = torch.randn(3, 2, 3, 6, 4, dtype=torch.float64)
    mask = topk_mask(torch.randn(2, 3, 6, 6), 3)
    indices = mask.nonzero()[:, 3].reshape(2, 3, 6, 3)
    found = gathered_attention(query, key, value, indices)
    torch.testing.assert_close(found, attend(query, key, value, mask=mask))
    first_two = torch.tensor([True, True, False]).expand(2, 3, 6, 3)
    fewer = mask & ~torch.zeros_like(mask).scatter(-1, indices[..., 2:], True)
    found = gathered_attention(query, key, value, indices, mask=first_two)
    torch.testing.assert_close(found, attend(query, key, value, mask=fewer))


def test_new_weights_are_small_and_cut_and_biases_nothing() -> None:
    guess = LowRankConnectivity(64, tokens=200, rank=32, heads=2)
    for weight in (guess.query.weight, guess.key.weight, guess.down, guess.up):
        spread = float(weight.detach().std())
        ten_errors = 10 / (2 * weight.numel()) ** 0.5  # of a standard deviation
        assert spread == pytest.approx(0.02, rel=ten_errors)
    assert not guess.query.bias.any()
    assert not guess.key.bias.any()


@pytest.mark.parametrize("shared_basis", [False, True])
def test_scores_of_the_coefficients_above_a_threshold(shared_basis: bool) -> None:
    guess = LowRankConnectivity(
        8,
        tokens=9,
        rank=12,
        heads=2,
        threshold=0.3,
        coefficient_threshold=0.08,
        shared_basis=shared_basis,
    ).double()
    for weight in (guess.query.weight, guess.key.weight, guess.down):
        nn.init.normal_(weight, std=0.5)
    query, key = torch.randn(2, 1, 2, 9, 8, dtype=torch.float64)
    shares = guess.coefficients(query, key)
    basis = guess.down if guess.up is None else nn.init.normal_(guess.up)
    found = guess(query, key)
    wanted = torch.zeros_like(found)
    for h, i, j in itertools.product(range(2), range(8), range(9)):
        for r in range(12):
            large = shares[0, h, i, r] > 0.08 and basis[j, r].abs() > 0.3
            wanted[0, h, i, j] += shares[0, h, i, r] * basis[j, r].abs() if large else 0.0
    torch.testing.assert_close(found, wanted)
    kept = (shares > 0.08).sum(-1)
    assert kept.min() < kept.max()  # not a number of coefficients


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("dense", [False, True])
def test_scores_are_their_formula_with_gradients(dense: bool) -> None:
    query, key, down, up = draw(2, 3, 9, 4), draw(2, 3, 9, 4), draw(9, 6), draw(9, 6)
    kept = torch.ones(2, 9, dtype=torch.bool)
    kept[1, 5:] = False
    q, k = (x * kept[:, None, :, None] for x in (query, key))
    shares = (q[:, :, 1:] @ (k.mT @ down) / 3**0.5).softmax(-1)
    basis = up
    if not dense:
        least = shares.detach().sort(-1).values[..., -2:].amin(-1, keepdim=True)
        shares = shares * (shares >= least)
        basis = up.abs() * (up.abs() > 0.5)
    found = connectivity_scores(
        query, key, down, up, threshold=0.5, top_coefficients=2, kept=kept, dense=dense
    )
    wanted = shares @ basis.T
    leaves = [query, key, down, up]
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1, :, :4], wanted[1, :, :4])  # equal shares of what is pruned
    grads = (torch.autograd.grad(y[0].sin().sum(), leaves) for y in (found, wanted))
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("path", ["mask", "gather"])
@pytest.mark.parametrize("prune_rows", [True, False])
def test_attention_is_its_formula_with_gradients(path: str, prune_rows: bool) -> None:
    query, key, value, scores = (
        draw(2, 3, 9, 4),
        draw(2, 3, 9, 4),
        draw(2, 3, 9, 4),
        draw(2, 3, 8, 9),
    )
    kept = torch.ones(2, 9, dtype=torch.bool)
    kept[1, 2:8] = False
    q, k, v = (x * kept[:, None, :, None] for x in (query, key, value))
    mask = torch.zeros(2, 3, 9, 9, dtype=torch.bool)
    mask[:, :, 0] = True
    for b, h, i in itertools.product(range(2), range(3), range(8)):
        order = sorted((j for j in range(9) if kept[b, j]), key=lambda j: -scores[b, h, i, j])
        if kept[b, i + 1] or not prune_rows:
            mask[b, h, i + 1, order[: min(4, kept[b, 1:].sum())]] = True
    products = (q @ k.mT / 2).masked_fill(~mask, -torch.inf)
    wanted = products.softmax(-1).nan_to_num() @ v
    found = connectivity_attention(
        query, key, value, scores, keys=4, kept=kept, prune_rows=prune_rows, path=path
    )
    torch.testing.assert_close(found, wanted)
    leaves = [query, key, value]
    real = kept[:, None, :, None] | (not prune_rows)
    grads = (
        torch.autograd.grad((y.sin() * real).sum(), leaves)
        for y in (found, attend(q, k, v, mask=mask))
    )
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs)


def test_the_functions_of_projected_tokens_are_the_module() -> None:
    module = ConnectivityAttention(12, heads=3, tokens=9, keep=0.5, rank=4).double()
    for parameter in module.connectivity.parameters():
        nn.init.normal_(parameter)
    module.out, guess = nn.Identity(), module.connectivity
    x, kept = torch.randn(2, 9, 12).double(), torch.arange(9) < torch.tensor([[9], [6]])
    query, key, value = module._projected(x)
    scores = connectivity_scores(
        guess.query(query), guess.key(key), guess.down, guess.up, kept=kept
    )
    mixed = connectivity_attention(query, key, value, scores, keys=5, kept=kept)
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), module(x, kept=kept))


@pytest.mark.bad_input
def test_the_functions_name_what_does_not_fit() -> None:
    rows, basis = torch.randn(2, 3, 9, 4), torch.randn(9, 6)
    guess = {"query": rows, "key": rows, "down": basis, "up": basis}
    mixing = {"query": rows, "key": rows, "value": rows, "scores": rows[:, :, 1:] @ rows.mT}
    mixing["keys"] = 4
    connectivity_scores(**guess)
    connectivity_attention(**mixing)
    for run, good, changed, said in (
        (connectivity_scores, guess, {"key": rows[:, :, 1:]}, "key must have the batch, heads"),
        (connectivity_scores, guess, {"down": basis[1:]}, r"down must be \(9, any\)"),
        (connectivity_scores, guess, {"up": basis[:, 1:]}, r"up must be \(9, 6\)"),
        (connectivity_scores, guess, {"top_coefficients": 7}, "top_coefficients must be between"),
        (
            connectivity_scores,
            guess,
            {"top_coefficients": 2, "coefficient_threshold": 0.1},
            "give top_coefficients or coefficient_threshold",
        ),
        (connectivity_scores, guess, {"kept": torch.ones(2, 8).bool()}, r"kept must be \(2, 9\)"),
        (connectivity_attention, mixing, {"query": rows[0]}, "query must be"),
        (connectivity_attention, mixing, {"value": rows[:, :, 1:]}, "value must have the batch"),
        (
            connectivity_attention,
            mixing,
            {"scores": rows @ rows.mT},
            r"scores must be \(2, 3, 8, 9\)",
        ),
        (connectivity_attention, mixing, {"keys": 0}, "keys must be at least 1"),
        (connectivity_attention, mixing, {"keys": 10}, "keys must be at most 9"),
        (connectivity_attention, mixing, {"path": "fast"}, "path must be"),
        (
            connectivity_attention,
            mixing,
            {"kept": torch.ones(2, 8).bool()},
            r"kept must be \(2, 9\)",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            run(**good | changed)
    with pytest.raises(TypeError, match="kept must be boolean"):
        connectivity_attention(**mixing, kept=torch.ones(2, 9))


def test_topk_mask_prefers_low_indices_and_takes_a_number_per_row() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert topk_mask(scores, 3).tolist() == [[True, True, True, False]] * 2
    numbers = torch.tensor([1, 0])
    assert topk_mask(scores, numbers).tolist() == [[False, True, False, False], [False] * 4]


@pytest.mark.parametrize("values", [3, 50, 10_000])
def test_the_largest_are_those_of_a_stable_sort(values: int) -> None:
    scores = torch.randint(0, values, (2, 3, 20, 60), generator=torch.manual_seed(values)).float()
    for k in (0, 1, 7, 59, 60):
        order = scores.argsort(dim=-1, descending=True, stable=True)
        expected = torch.zeros(scores.shape, dtype=torch.bool).scatter(-1, order[..., :k], True)
        assert torch.equal(topk_mask(scores, k), expected)


def test_keeping_everything_is_plain_attention() -> None:
    module = ConnectivityAttention(8, heads=2, tokens=9, keep=1.0, rank=4).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    heads = [
        layer(x).unflatten(-1, (2, 4)).transpose(1, 2)
        for layer in (module.query, module.key, module.value)
    ]
    plain = module.out(attend(*heads).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), plain)


def test_each_row_but_the_first_keeps_its_number_and_depends_on_the_input() -> None:
    module = ConnectivityAttention(8, heads=2, tokens=21, keep=0.3, rank=4)
    for parameter in module.connectivity.parameters():
        torch.nn.init.normal_(parameter)
    masks = []
    for _ in range(2):
        query, key, _ = module._projected(torch.randn(1, 21, 8))
        masks.append(module.mask(module.connectivity(query, key)))
    assert (masks[0][:, :, 1:].sum(-1) == 7).all()
    assert masks[0][:, :, 0].all()
    assert not torch.equal(*masks)


def test_the_predictor_learns_by_reconstruction() -> None:
    module = ConnectivityAttention(16, heads=2, tokens=13, rank=8)
    x = torch.randn(4, 13, 16)
    with observe(module) as maps:
        module.reconstruct(x)
    teacher = maps["attend"][:, :, 1:]
    steps = torch.optim.Adam(module.connectivity.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        loss = (module.reconstruct(x)[1] - teacher).square().sum()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_published_numbers_of_parameters() -> None:
    def count(rank: int, **options: bool) -> int:
        module = LowRankConnectivity(64, tokens=197, rank=rank, heads=6, **options)
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(32) == 16_768
    assert count(24) == 2 * (64 * 32 + 32) + 2 * 197 * 24
    assert count(32, shared_basis=True) == 2 * (64 * 32 + 32) + 197 * 32


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ConnectivityAttention(8, heads=2, tokens=9, keep=0.0), "keep must be"),
        (lambda: ConnectivityAttention(8, heads=2, tokens=9, path="fast"), "path must be"),
        (lambda: ConnectivityAttention(8, heads=2, tokens=9)(torch.zeros(1, 8, 8)), "x must be"),
        (
            lambda: LowRankConnectivity(8, tokens=9, rank=4, heads=2, top_coefficients=5),
            "top_coefficients must be",
        ),
        (
            lambda: LowRankConnectivity(
                8, tokens=9, rank=4, heads=2, top_coefficients=2, coefficient_threshold=0.05
            ),
            "give top_coefficients or coefficient_threshold",
        ),
        (
            lambda: LowRankConnectivity(8, tokens=9, rank=4, heads=2, coefficient_threshold=1.0),
            "coefficient_threshold must be in",
        ),
        (lambda: LowRankConnectivity(9, tokens=9, rank=4, heads=2), "reduction must divide"),
        (lambda: topk_mask(torch.zeros(2, 3), 4), "k must be between"),
        (
            lambda: gathered_attention(
                *torch.zeros(3, 1, 2, 3, 4), torch.zeros(1, 3, 2, dtype=torch.long)
            ),
            "indices must be",
        ),
        (lambda: connectivity_attention_from_sparsifiner({"cls": torch.zeros(1)}), "no weight of"),
    ],
)
def test_wrong_arguments_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
