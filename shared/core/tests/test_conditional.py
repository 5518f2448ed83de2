"""Conditional cross-attention: stored numbers, the repeated-query form, conditions apart."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heed_core import attend, masks, observe
from heed_core.attention.conditional import (
    ConditionalCrossAttention,
    ConditionalCrossBlock,
    conditional_block_from_timm,
)
from heed_core.testing.golden_fixtures import GoldenFixture

GOLDEN = Path(__file__).parent / "golden" / "cca"


def official_block(golden: GoldenFixture, dtype: torch.dtype) -> ConditionalCrossBlock:
    block = ConditionalCrossBlock(24, heads=3, conditions=4)
    state = conditional_block_from_timm(
        golden.weights("vit.blocks.2."), golden.weights("cca.cond.")
    )
    block.load_state_dict(state)
    return block.to(dtype).eval()


def embedded(golden: GoldenFixture, y: Tensor) -> Tensor:
    """What follows the block in the network: norm, linear map, unit length."""
    norm, embed = golden.weights("vit.norm."), golden.weights("embed.")
    y = F.layer_norm(y, y.shape[-1:], norm["weight"].to(y), norm["bias"].to(y), 1e-6)
    return F.normalize(F.linear(y, embed["weight"].to(y), embed["bias"].to(y)), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(dtype: torch.dtype):
    golden = GoldenFixture.load(GOLDEN)
    block = official_block(golden, dtype)
    kind = "output64" if dtype == torch.float64 else "output"
    tokens = golden.tensors[f"{kind}.tokens_before_last_block"].to(dtype)
    condition = golden.tensors["input.condition"].long()
    golden.check("condition_embedding", block.attention.condition(condition))
    with observe(block) as record:
        y = embedded(golden, block(tokens, condition))[:, 0]
    golden.check("y", y)
    golden.check("attention", record["attention.attend"][:, :, 0])
    golden.check("all_conditions", embedded(golden, block(tokens)))
    golden.loss(y).backward()
    golden.check("grad.weights.cca.cond.weight", block.attention.condition.linear.weight.grad)
    thirds = [getattr(block.attention, name).weight.grad for name in ("query", "key", "value")]
    golden.check("grad.weights.vit.blocks.2.attn.qkv.weight", torch.cat(thirds))


def test_golden_notices_a_condition_that_skips_the_query_map():
    golden = GoldenFixture.load(GOLDEN)
    block = official_block(golden, torch.float64)
    block.attention.query = nn.Identity()
    tokens = golden.tensors["output64.tokens_before_last_block"]
    y = embedded(golden, block(tokens, golden.tensors["input.condition"].long()))[:, 0]
    with pytest.raises(AssertionError, match="off"):
        golden.check("y", y)


@pytest.mark.parametrize("code", ["onehot", "mask"])
def test_all_conditions_at_once_are_the_single_ones(code: str):
    attention = ConditionalCrossAttention(16, heads=4, conditions=5, code=code).double().eval()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    together = attention(x)
    for c in range(5):
        alone = attention(x, torch.tensor([c, c]))
        torch.testing.assert_close(alone[:, 0], together[:, c], rtol=1e-12, atol=1e-12)
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3


def test_between_its_projections_it_is_attend():
    module = ConditionalCrossAttention(16, heads=4, conditions=5).double()
    x, real = torch.randn(2, 7, 16, dtype=torch.float64), torch.arange(7) < torch.tensor([[7], [4]])
    query = module.query(module.condition(torch.arange(5))).expand(2, -1, -1)
    rows = [t.unflatten(2, (4, 4)).transpose(1, 2) for t in (query, module.key(x), module.value(x))]
    mixed = attend(*rows, mask=masks.keys(real)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module.out(mixed), module(x, padding_mask=real))


def test_a_query_repeated_at_every_place_gives_the_same_at_every_place():
    attention = ConditionalCrossAttention(16, heads=4, conditions=3).double().eval()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    condition = torch.tensor([[2] * 6, [0] * 6])
    repeated = attention(x, condition)
    single = attention(x, condition[:, :1])
    torch.testing.assert_close(repeated, single.expand_as(repeated), rtol=1e-12, atol=1e-12)


def test_parameters_of_a_conditional_vision_transformer():
    """ViT-B/16, 8 conditions, embedding 512: 86,199,296, of which 85,798,656 are the backbone's."""
    block = ConditionalCrossBlock(768, heads=12, conditions=8)
    own = sum(p.numel() for p in block.attention.condition.parameters())
    plain = sum(p.numel() for p in block.parameters()) - own
    assert plain == 12 * 768**2 + 13 * 768  # a block of ViT-B: 7,087,872
    assert 85_798_656 + own + (768 * 512 + 512) == 86_199_296


def test_names_that_are_not_of_a_timm_block_are_refused():
    golden = GoldenFixture.load(GOLDEN)
    block, condition = golden.weights("vit.blocks.2."), golden.weights("cca.cond.")
    with pytest.raises(ValueError, match=r"norm1\.bias"):
        conditional_block_from_timm(
            {k: x for k, x in block.items() if k != "norm1.bias"}, condition
        )


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 3}, "heads must divide"),
        ({"conditions": 0}, "conditions must be at least 1"),
        ({"code": "sine"}, "code must be onehot or mask"),
    ],
)
def test_options_that_do_not_fit(options: dict, said: str):
    with pytest.raises(ValueError, match=said):
        ConditionalCrossAttention(16, **({"heads": 4, "conditions": 2} | options))
