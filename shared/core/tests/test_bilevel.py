"""Bi-level routing: golden numbers, special cases that are other attentions, pieces, padding."""

from pathlib import Path

import pytest
import torch

from heed_core import attend, observe
from heed_core.attention import bilevel
from heed_core.attention.bilevel import (
    BilevelAttention,
    LepeAttention,
    attention_from_biformer,
    from_regions,
    region_affinity,
    region_topk,
    routed_attention,
    routed_block_mask,
    to_regions,
)
from heed_core.attention.multi_axis import PartitionAttention
from heed_core.dispatch import UnsupportedBackend
from heed_core.testing.golden_fixtures import GoldenFixture
from heed_core.testing.memory import Memory

GOLDEN = Path(__file__).parent / "golden" / "biformer"
DTYPES = [torch.float64, torch.float32]


def official(golden: GoldenFixture, dtype: torch.dtype) -> BilevelAttention:
    module = BilevelAttention(32, heads=2, regions=(3, 3), topk=2)
    module.load_state_dict(attention_from_biformer(golden.weights()))
    return module.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_outputs_routes_maps_and_gradients(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN)
    module = official(golden, dtype)
    x = golden.input("x", dtype)
    with observe(module) as maps:
        y = module(x)
    golden.check("y", y)
    golden.check("attention", maps["attend"])
    cells = to_regions(x, (3, 3))
    query, key = module.query(cells), module.key(cells)
    golden.check("region_affinity", region_affinity(query, key))
    routes = region_topk(query, key, topk=2)
    assert torch.equal(routes, golden.tensors["output.routed_regions"])
    golden.loss(y).backward()
    golden.check("grad.input.x", x.grad)
    golden.check("grad.weights.lepe.weight", module.lepe.weight.grad)
    golden.check("grad.weights.wo.weight", module.out.weight.grad)
    parts = (module.query, module.key, module.value)
    packed = torch.cat([part.weight.grad for part in parts])
    golden.check("grad.weights.qkv.qkv.weight", packed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_last_stage(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN / "last_stage")
    module = LepeAttention(32)
    module.load_state_dict(attention_from_biformer(golden.weights()))
    x = golden.input("x", dtype)
    y = module.to(dtype)(x)
    golden.check("y", y)
    golden.check("lepe_of_input", module.lepe(x.movedim(-1, 1)).movedim(1, -1))
    golden.loss(y).backward()
    golden.check("grad.input.x", x.grad)
    golden.check("grad.weights.lepe.weight", module.lepe.weight.grad)
    of_value = LepeAttention(32, lepe_of="value").to(dtype)
    of_value.load_state_dict(module.state_dict())
    with pytest.raises(AssertionError, match="off"):
        golden.check("y", of_value(x))


def test_golden_notices_the_usual_scale() -> None:
    golden = GoldenFixture.load(GOLDEN)
    module = official(golden, torch.float32)
    module.attend.scale = 16**-0.5
    with pytest.raises(AssertionError, match="off"):
        golden.check("y", module(golden.input("x", torch.float32)))


def test_both_published_layouts_give_the_same_weights() -> None:
    weights = GoldenFixture.load(GOLDEN).weights()
    other = {
        name.replace("qkv.qkv", "qkv_linear").replace("wo.", "output_linear."): (
            tensor[..., None, None] if tensor.dim() == 2 else tensor
        )
        for name, tensor in weights.items()
    }
    first, second = attention_from_biformer(weights), attention_from_biformer(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def qkv(regions: int = 6, cells: int = 4) -> torch.Tensor:
    return torch.randn(3, 2, regions, cells, 8, dtype=torch.float64)


def by_head(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, 4)).movedim(-2, 1)


def test_all_regions_are_full_attention() -> None:
    query, key, value = qkv()
    routes = region_topk(query, key, topk=6)
    found = routed_attention(query, key, value, routes, heads=2)
    flat = [by_head(x.flatten(1, 2)) for x in (query, key, value)]
    torch.testing.assert_close(by_head(found.flatten(1, 2)), attend(*flat))


def test_own_region_alone_is_window_attention() -> None:
    query, key, value = qkv()
    routes = torch.arange(6).expand(2, 6)[..., None]
    found = routed_attention(query, key, value, routes, heads=2)
    windows = [by_head(x.flatten(0, 1)) for x in (query, key, value)]
    torch.testing.assert_close(by_head(found.flatten(0, 1)), attend(*windows))


def test_routes_are_the_most_alike_and_do_not_know_the_order_of_cells() -> None:
    query, key, _ = qkv()
    routes = region_topk(query, key, topk=3)
    for b in range(2):
        for r in range(6):
            products = [float(query[b, r].mean(0) @ key[b, s].mean(0)) for s in range(6)]
            best = sorted(range(6), key=lambda s: -products[s])[:3]
            assert routes[b, r].tolist() == best
    order = torch.randperm(4)
    assert torch.equal(region_topk(query[:, :, order], key[:, :, order], topk=3), routes)


def test_regions_are_neighbours() -> None:
    x = torch.arange(4 * 6).reshape(1, 4, 6, 1).float()
    cells = to_regions(x, (2, 3))
    assert cells[0, 1, :, 0].tolist() == [2, 3, 8, 9]
    assert torch.equal(from_regions(cells, (2, 3), (4, 6)), x)


def test_pieces_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = BilevelAttention(8, heads=2, regions=(3, 2), topk=2).double()
    x = torch.randn(2, 9, 8, 8, dtype=torch.float64)
    whole = module(x)
    for size in (1, 2000, 5000):
        monkeypatch.setattr(bilevel, "PIECE_BYTES", size)
        with torch.no_grad():
            torch.testing.assert_close(module(x), whole)
            with observe(module) as maps:
                module(x)
            assert maps["attend"].shape == (2 * 6, 2, 12, 24)


def test_gathered_keys_never_exist_as_a_whole() -> None:
    module = BilevelAttention(64, heads=2, regions=(7, 7), topk=16).eval()
    x = torch.randn(1, 56, 56, 64)
    with torch.no_grad(), Memory() as memory:
        module(x)
    assert memory.largest <= 1.5 * x.numel() * 4


def test_padding_changes_nothing() -> None:
    """A grid that does not divide equals a padded one whose padding is masked."""
    module = BilevelAttention(8, heads=2, regions=(3, 3), topk=2).double()
    x = torch.randn(2, 7, 5, 8, dtype=torch.float64)
    wide = torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 2), value=5.0)
    mask = torch.zeros(2, 9, 6, dtype=torch.bool)
    mask[:, :7, :5] = True
    torch.testing.assert_close(module(x), module(wide, mask=mask)[:, :7, :5])


def test_regions_of_padding_alone_are_not_chosen() -> None:
    module = BilevelAttention(8, heads=2, regions=(7,), topk=4, lepe_kernel=3)
    x = torch.randn(1, 8, 8)  # four regions of two cells, three of padding
    with observe(module) as maps:
        assert module(x).isfinite().all()
    torch.testing.assert_close(maps["attend"][:4].sum(-1), torch.ones(4, 2, 2))
    assert maps["attend"][:4].gt(0).all()


def test_other_numbers_of_axes() -> None:
    module = BilevelAttention(8, heads=2, regions=(2, 1, 3), topk=2, lepe_kernel=3)
    assert module(torch.randn(1, 4, 3, 7, 8)).shape == (1, 4, 3, 7, 8)


def test_routing_has_no_gradient() -> None:
    query, key, _ = qkv()
    assert not region_affinity(query.requires_grad_(), key).requires_grad


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: BilevelAttention(8, heads=2, regions=(3, 3), topk=10), "topk must be between"),
        (lambda: BilevelAttention(8, heads=2, regions=(3, 0), topk=1), "regions must be positive"),
        (lambda: BilevelAttention(8, heads=3, regions=(3, 3), topk=1), "heads must divide"),
        (
            lambda: BilevelAttention(8, heads=2, regions=(3, 3), topk=1, lepe_kernel=4),
            "kernel must be odd",
        ),
        (lambda: LepeAttention(8, lepe_of="key"), "lepe_of must be"),
        (lambda: region_topk(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), topk=1), "query and key"),
        (
            lambda: routed_attention(
                *torch.zeros(3, 1, 2, 3, 4), torch.zeros(1, 3, 1, dtype=torch.long), heads=2
            ),
            "routes must be",
        ),
        (lambda: attention_from_biformer({"norm.weight": torch.zeros(1)}), "no weight of"),
    ],
)
def test_wrong_arguments_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("masked", [False, True])
def test_gathering_by_indices_gives_the_same(masked: bool) -> None:
    plain = BilevelAttention(8, heads=2, regions=(2, 3), topk=2)
    other = BilevelAttention(8, heads=2, regions=(2, 3), topk=2, gather="torch")
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 6, 8)
    mask = torch.rand(2, 5, 6) > 0.4 if masked else None
    found, wanted = (
        [y := module(x, mask=mask), *torch.autograd.grad(y.square().sum(), module.parameters())]
        for module in (other, plain)
    )
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    with observe(other) as record:
        torch.testing.assert_close(other(x, mask=mask), wanted[0], rtol=1e-4, atol=1e-5)
    assert set(record) == {"attend"}


@pytest.mark.bad_input
def test_gathering_by_indices_has_no_dropout() -> None:
    with pytest.raises(ValueError, match="gather='torch' has no dropout"):
        BilevelAttention(8, heads=2, regions=(2, 3), topk=2, gather="torch", dropout=0.1)
    with pytest.raises(ValueError, match="gather must be one of"):
        BilevelAttention(8, heads=2, regions=(2, 3), topk=2, gather="cuda")


def dense_mask(routes: torch.Tensor, cells: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Which cell may attend to which, pair by pair of regions."""
    batch, regions, _ = routes.shape
    allowed = torch.zeros(batch, regions, cells, regions, cells, dtype=torch.bool)
    for b in range(batch):
        for r in range(regions):
            for s in routes[b, r].tolist():
                allowed[b, r, :, s] = True if mask is None else mask[b, s]
    return allowed.flatten(3).flatten(1, 2)


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_mask_says_of_every_pair_what_the_routes_say(masked: bool) -> None:
    from torch.nn.attention.flex_attention import create_mask

    query, key, _ = qkv()
    mask = torch.rand(2, 6, 4) > 0.4 if masked else None
    routes = region_topk(query, key, topk=3)
    blocks = routed_block_mask(routes, 4, mask=mask)
    wanted = dense_mask(routes, 4, mask)
    found = create_mask(blocks.mask_mod, 2, 1, 24, 24, device="cpu")[:, 0]
    assert torch.equal(found, wanted)
    by_region = wanted.unflatten(1, (6, 4)).unflatten(3, (6, 4)).any(4).any(2)
    assert (blocks.to_dense()[:, 0].bool() | ~by_region).all()  # nothing allowed is left out
    assert int(blocks.to_dense().sum()) == 2 * 6 * 3
    assert blocks.BLOCK_SIZE == (4, 4)


@pytest.mark.compile
@pytest.mark.parametrize(("masked", "scale"), [(False, None), (True, -0.5)])
def test_blocks_gathering_and_a_dense_mask_give_the_same(masked: bool, scale: float | None) -> None:
    query, key, value = qkv(cells=16).float()
    mask = torch.rand(2, 6, 16) > 0.4 if masked else None
    routes = region_topk(query, key, topk=2, mask=mask)
    options = {"heads": 2, "mask": mask, "scale": scale}
    found = routed_attention(query, key, value, routes, **options, gather="flex")
    wanted = routed_attention(query, key, value, routes, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    flat = [by_head(x.flatten(1, 2)) for x in (query, key, value)]
    dense = attend(*flat, mask=dense_mask(routes, 16, mask)[:, None], scale=scale)
    torch.testing.assert_close(by_head(found.flatten(1, 2)), dense, rtol=1e-5, atol=1e-5)


def test_a_dense_mask_has_the_gradients_of_gathering() -> None:
    leaves = list(qkv().requires_grad_().unbind(0))
    routes = region_topk(leaves[0], leaves[1], topk=2)
    found = routed_attention(*leaves, routes, heads=2)
    flat = [by_head(x.flatten(1, 2)) for x in leaves]
    dense = attend(*flat, mask=dense_mask(routes, 4, None)[:, None])
    probe = torch.randn_like(found)
    gradients = torch.autograd.grad((found * probe).sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((dense * by_head(probe.flatten(1, 2))).sum(), leaves)
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.slow
@pytest.mark.compile
def test_a_module_of_blocks_is_the_module_that_gathers() -> None:
    """Sizes that do not divide, so that padding is masked; while observed, it gathers."""
    plain = BilevelAttention(8, heads=2, regions=(2, 3), topk=2).eval()
    other = BilevelAttention(8, heads=2, regions=(2, 3), topk=2, gather="flex").eval()
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 7, 12, 8)
    with torch.no_grad():
        torch.testing.assert_close(other(x), plain(x), rtol=1e-5, atol=1e-5)
        with observe(other) as record:
            torch.testing.assert_close(other(x), plain(x), rtol=1e-5, atol=1e-5)
    assert set(record) == {"attend"}
    with pytest.raises(UnsupportedBackend, match="no backward pass on the CPU"):
        other(x)
    with pytest.raises(UnsupportedBackend, match=r"does not take torch\.float64"), torch.no_grad():
        other.double()(x.double())


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.parametrize("cells", [16, 64])
def test_blocks_on_cuda_with_gradients(cells: int) -> None:
    leaves = list(torch.randn(3, 2, 9, cells, 32, device="cuda").requires_grad_().unbind(0))
    routes = region_topk(leaves[0], leaves[1], topk=4)
    results = []
    for gather in ("flex", "auto"):
        y = routed_attention(*leaves, routes, heads=2, gather=gather)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=5e-3, atol=5e-3)


def test_routes_hold_little_more_than_windows() -> None:
    """The first stage of a picture of 448 x 448; with all 49 routes a copy would be 49 times."""
    x = torch.randn(1, 112, 112, 32)
    held = []
    for module in (
        BilevelAttention(32, heads=1, regions=(7, 7), topk=4, lepe_kernel=None),
        PartitionAttention(32, heads=1, size=(16, 16), mode="block"),
    ):
        with torch.no_grad(), Memory() as memory:
            module.eval()(x)
        held.append(memory.peak)
    assert held[0] <= 1.3 * held[1], held
