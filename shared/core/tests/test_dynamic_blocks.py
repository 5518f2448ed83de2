"""Kept blocks of keys for FlexAttention: what each query keeps, which tiles are left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heed_core import observe
from heed_core.attention.dynamic_mask import DynamicMaskAttention, dynamic_mask_attention
from heed_core.dispatch import UnsupportedBackend
from heed_core.kernels.dynamic_blocks import TILE, dynamic_block_mask, kept_blocks
from heed_core.key_selection import keep_blocks, keep_most


def permission(n: int, m: int, real: Tensor, causal: bool) -> Tensor:
    """(b, 1, n, m)."""
    seen = torch.ones(n, m, dtype=torch.bool)
    return real[:, None, None] & (seen.tril(m - n) if causal else seen)


def smooth(m: int, generator: torch.Generator | None = None) -> Tensor:
    """Scores whose neighbours are alike, so that whole blocks are kept."""
    scores = torch.randn(2, 2, m, generator=generator)
    return 3 * torch.nn.functional.avg_pool1d(scores, 9, stride=1, padding=4)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 30),
    more=st.integers(0, 20),
    keep=st.integers(1, 20),
    size=st.sampled_from([1, 2, 4, 8, 128]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_are_those_of_the_map_of_all_pairs(n, more, keep, size, causal, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    m = n + more
    scores = smooth(m, generator).round()
    real = torch.rand(2, m, generator=generator) < 0.8
    found = kept_blocks(scores, real, queries=n, keep=keep, block_size=size, causal=causal)
    seen = torch.arange(m - n, m) + 1 if causal else None
    expected = keep_blocks(keep_most(scores, permission(n, m, real, causal), keep), size, seen)
    keys = found.repeat_interleave(size, dim=-1)[..., :m].expand(-1, -1, n, -1)
    assert torch.equal(keys, expected)


@pytest.mark.parametrize(
    ("n", "m", "size"), [(300, 300, 16), (70, 500, 128), (40, 640, 128), (256, 768, 256)]
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keep", [150, 1000])
def test_a_block_mask_says_of_every_pair_what_is_kept(
    n: int, m: int, size: int, causal: bool, keep: int
) -> None:
    from torch.nn.attention.flex_attention import create_mask

    scores, real = smooth(m), torch.arange(m) < torch.tensor([[m], [m - 145]])
    mask = dynamic_block_mask(
        scores, queries=n, heads=4, keep=keep, block_size=size, causal=causal, padding_mask=real
    )
    allowed = permission(n, m, real, causal)
    seen = torch.arange(m - n, m) + 1 if causal else None
    kept = keep_blocks(keep_most(scores, allowed, keep), size, seen) & allowed
    kept = kept.repeat_interleave(2, 1)
    assert torch.equal(create_mask(mask.mask_mod, 2, 4, n, m, device="cpu"), kept)
    rows, columns = -(-n // TILE), -(-m // TILE)
    computed = torch.zeros(2, 4, rows, columns, dtype=torch.int64)
    whole = torch.zeros_like(computed)
    lists = (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    )
    for at, (count, index) in enumerate(lists):
        for b, h, i in torch.ones_like(count).nonzero().tolist():
            tiles = index[b, h, i, : int(count[b, h, i])].long()
            computed[b, h, i, tiles] += 1
            whole[b, h, i, tiles] += at
    for i in range(rows):
        for j in range(columns):
            tile = kept[..., i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE].flatten(2)
            assert bool((computed[..., i, j] == 1)[tile.any(-1)].all())
            inside = (j + 1) * TILE <= m
            assert torch.equal(whole[..., i, j] == 1, tile.all(-1) & inside)
    assert bool((computed <= 1).all())
    assert bool((computed == 0).any())  # something is left out


@pytest.mark.compile
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_give_what_the_map_of_all_pairs_gives(causal: bool) -> None:
    """Also for queries that keep no block: zeros."""
    query = torch.randn(2, 4, 200, 16)
    key, value = (torch.randn(2, 2, 300, 16) for _ in range(2))
    scores, real = smooth(300), torch.arange(300) < torch.tensor([[300], [120]])
    options = {"keep": 40, "causal": causal, "padding_mask": real, "block_size": 16}
    found = dynamic_mask_attention(query, key, value, scores, gather="flex", **options)
    wanted = dynamic_mask_attention(query, key, value, scores, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    single = dynamic_mask_attention(query, key, value, scores, **{**options, "block_size": None})
    assert float((single - wanted).abs().max()) > 1e-2  # rounding to blocks matters here


@pytest.mark.slow
@pytest.mark.compile
def test_a_module_of_tiles_gathers_while_it_is_watched() -> None:
    options = {"heads": 4, "kv_heads": 2, "keep": 60, "block_size": 8}
    plain = DynamicMaskAttention(32, **options).eval()
    other = DynamicMaskAttention(32, gather="flex", **options).eval()
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 150, 32)
    with torch.no_grad():
        torch.testing.assert_close(other(x), plain(x), rtol=1e-5, atol=1e-5)
        with observe(other) as record:
            torch.testing.assert_close(other(x), plain(x), rtol=1e-5, atol=1e-5)
    assert record["attend"].shape == (2, 4, 150, 150)


@pytest.mark.bad_input
def test_what_flex_attention_cannot_do_is_said() -> None:
    module = DynamicMaskAttention(32, heads=4, keep=6, block_size=8, gather="flex")
    x = torch.randn(2, 15, 32)
    with pytest.raises(UnsupportedBackend, match="no backward pass on the CPU"):
        module(x)
    with pytest.raises(UnsupportedBackend, match=r"does not take torch\.float64"), torch.no_grad():
        module.double()(x.double())
    scores = torch.randn(1, 2, 9)
    for options, said in (
        ({"queries": 9, "heads": 4, "block_size": 48}, "block_size must divide 128"),
        ({"queries": 9, "heads": 3, "block_size": 4}, "do not divide heads=3"),
        ({"queries": 10, "heads": 4, "block_size": 4}, "a key per query"),
    ):
        with pytest.raises(ValueError, match=said):
            dynamic_block_mask(scores, keep=3, causal=True, **options)
