"""Class attention: stored numbers, the loop that it is, what it leaves alone."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heed_core import observe
from heed_core.attention.class_attention import (
    ClassAttentionBlock,
    class_attention,
    class_block_from_spectformer,
    with_mean_token,
)
from heed_core.testing.golden_fixtures import GoldenFixture

GOLDEN = Path(__file__).parent / "golden" / "spectformer" / "class_block"
DTYPES = [torch.float64, torch.float32]


def official(golden: GoldenFixture, dtype: torch.dtype) -> ClassAttentionBlock:
    block = ClassAttentionBlock(32, heads=4, hidden=64)
    block.load_state_dict(class_block_from_spectformer(golden.weights("post_network.0.")))
    return block.to(dtype)


def read_out(golden: GoldenFixture, tokens: Tensor) -> Tensor:
    """What follows in the network: the class token and the best of the others."""
    head, others = golden.weights("head."), golden.weights("aux_head.")
    ours, theirs = ({k: x.to(tokens) for k, x in state.items()} for state in (head, others))
    return F.linear(tokens[:, 0], **ours) + 0.5 * F.linear(tokens[:, 1:], **theirs).amax(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_block_and_gradient(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN)
    block = official(golden, dtype)
    kind = "output64" if dtype == torch.float64 else "output"
    x = golden.tensors[f"{kind}.block4"].to(dtype)
    y = block(with_mean_token(x))
    golden.check("class_block", y)
    norm = {k: w.to(y) for k, w in golden.weights("norm4.").items()}
    tokens = F.layer_norm(y, (32,), norm["weight"], norm["bias"], 1e-6)
    golden.check("tokens", tokens)
    logits = read_out(golden, tokens)
    golden.check("y", logits)
    golden.loss(logits).backward()
    parts = (block.attention.key.weight.grad, block.attention.value.weight.grad)
    golden.check("grad.weights.post_network.0.attn.kv.weight", torch.cat(parts))


def test_golden_notices_a_class_token_that_does_not_see_itself() -> None:
    golden = GoldenFixture.load(GOLDEN)
    block = official(golden, torch.float64)
    x = with_mean_token(golden.tensors["output64.block4"])
    real = torch.arange(x.shape[1])[None] > 0
    with pytest.raises(AssertionError, match="off"):
        golden.check("class_block", block(x, padding_mask=real))


def test_every_class_token_is_a_mean_of_values() -> None:
    query, key = torch.randn(2, 3, 6).double(), torch.randn(2, 5, 6).double()
    value = torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.rand(2, 5) > 0.3
    mask[:, 0] = True
    found = class_attention(query, key, value, heads=2, mask=mask, scale=0.7)
    for b in range(2):
        seen = [j for j in range(5) if mask[b, j]]
        for k in range(3):
            for h in range(2):
                at, to = slice(3 * h, 3 * h + 3), slice(2 * h, 2 * h + 2)
                scores = torch.stack([0.7 * query[b, k, at] @ key[b, j, at] for j in seen])
                weights = scores.softmax(0)
                wanted = sum(w * value[b, j, to] for w, j in zip(weights, seen, strict=True))
                torch.testing.assert_close(found[b, k, to], wanted)


def test_the_other_tokens_stay_and_their_order_does_not_matter() -> None:
    block = ClassAttentionBlock(12, heads=3, layer_scale=0.3).double().eval()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    y = block(x)
    assert torch.equal(y[:, 1:], x[:, 1:])
    assert not torch.equal(y[:, 0], x[:, 0])
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(6)])
    torch.testing.assert_close(block(x[:, order])[:, 0], y[:, 0])


def test_the_functional_form_is_what_the_block_computes() -> None:
    block = ClassAttentionBlock(12, heads=3).double().eval()
    x, real = torch.randn(2, 7, 12).double(), torch.arange(7) < torch.tensor([[7], [4]])
    tokens, layers = block.norm(x), block.attention
    seen = class_attention(
        layers.query(tokens[:, :1]), layers.key(tokens), layers.value(tokens), heads=3, mask=real
    )
    first = x[:, :1] + layers.out(seen)
    first = first + block.ffn(block.ffn_norm(first))
    torch.testing.assert_close(block(x, padding_mask=real)[:, :1], first)
    with observe(block) as record:
        block(x, padding_mask=real)
    weights = record["attention.attend"]
    assert weights.shape == (2, 3, 1, 7)
    assert not weights[1, :, :, 4:].any()


def test_scales_of_zero_are_the_identity() -> None:
    block = ClassAttentionBlock(12, heads=3, layer_scale=0.0)
    x = torch.randn(2, 7, 12)
    assert torch.equal(block(x), x)
    assert block.scales.numel() == 24


def test_number_of_parameters_of_the_published_block() -> None:
    """SpectFormer-H-S: 448 channels and an MLP of 4 times."""
    block = ClassAttentionBlock(448, heads=14)
    linear = 4 * (448 * 448 + 448) + 2 * 4 * 448 * 448 + 5 * 448
    assert sum(p.numel() for p in block.parameters()) == linear + 4 * 448


def test_the_mean_token_comes_first() -> None:
    x = torch.randn(2, 5, 3)
    y = with_mean_token(x)
    assert torch.equal(y[:, 1:], x)
    torch.testing.assert_close(y[:, 0], sum(x[:, i] for i in range(5)) / 5)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ClassAttentionBlock(10, heads=3), "heads must divide"),
        (lambda: ClassAttentionBlock(9, heads=3)(torch.zeros(1, 4, 8)), "x must be"),
        (lambda: ClassAttentionBlock(9, heads=3)(torch.zeros(1, 0, 9)), "at least one token"),
        (lambda: with_mean_token(torch.zeros(1, 0, 9)), "at least one token"),
        (lambda: class_attention(*torch.zeros(3, 1, 2, 4), heads=3), "heads must divide"),
        (lambda: class_block_from_spectformer({"attn.q.weight": torch.zeros(1)}), "names that"),
    ],
)
def test_wrong_arguments_are_named(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
