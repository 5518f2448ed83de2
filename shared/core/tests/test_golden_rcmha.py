"""Relative convolutional attention against stored outputs of the published classes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from heed_core import observe
from heed_core.attention.relative_conv import (
    RelativeConvAttention,
    relative_conv_from_official,
    relative_scores,
)

GOLDEN = Path(__file__).parent / "golden" / "rcmha" / "fixture.safetensors"
TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 2e-5)]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def official(golden: dict[str, Tensor], dtype: torch.dtype, prefix: str = "weights.", **options):
    """The stored tables hold the 24 rows on either side of offset 0."""
    settings = {"conv_context": "segment", **options}
    module = RelativeConvAttention(24, heads=3, max_distance=24, **settings)
    state = {
        n.removeprefix(prefix): x
        for n, x in golden.items()
        if n.startswith(prefix) and not n.startswith("weights.lm." if prefix == "weights." else "?")
    }
    module.load_state_dict(relative_conv_from_official(state))
    return module.to(dtype).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_outputs_weights_and_gradients(golden, dtype, tolerance: float) -> None:
    module = official(golden, dtype)
    x = golden["input.x"].to(dtype).requires_grad_()  # time first
    memory = golden["input.memory"].to(dtype).transpose(0, 1)
    with observe(module) as record:
        out = module(x.transpose(0, 1), memory).transpose(0, 1)
    weights = record["attend"].permute(2, 3, 0, 1)
    for ours, name in ((out, "out"), (weights, "weights")):
        torch.testing.assert_close(
            ours.double(), golden[f"output64.{name}"], rtol=0, atol=tolerance
        )
    leaves = {
        "x": x,
        "key_pos_bias_rows": module.offset_bias,
        "query.1.conv.weight": module.query_conv.weight,
        "query_pos_bias": module.query_bias,
    }
    loss = (out * golden["input.loss_weight"]).sum()
    for name, gradient in zip(
        leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True
    ):
        stored = golden[f"grad.{name}"].reshape(gradient.shape)
        torch.testing.assert_close(gradient.double(), stored, rtol=0, atol=20 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_convolutions_and_relative_scores(golden, dtype, tolerance: float) -> None:
    module = official(golden, dtype)
    x, memory = (golden[f"input.{n}"].to(dtype).transpose(0, 1) for n in ("x", "memory"))
    source = torch.cat([memory, x], dim=1)
    rows = {}
    for part, tokens in (("query", x), ("key", source), ("value", source)):
        heads = getattr(module, part)(tokens).unflatten(-1, (3, 8)).transpose(1, 2)
        rows[part] = getattr(module, f"{part}_conv")(heads)
        stored = golden[f"output64.{part[0]}_conv"].permute(1, 2, 0, 3)
        torch.testing.assert_close(rows[part].double(), stored, rtol=0, atol=tolerance)
    found = relative_scores(rows["query"], module.offset_embedding, module.offset_bias, 9)
    stored = golden["output64.rel"].permute(2, 3, 0, 1)
    torch.testing.assert_close(found.double(), stored, rtol=0, atol=tolerance)
    total = (rows["query"] + module.query_bias[:, None]) @ rows["key"].mT + found
    stored = golden["output64.scores_unscaled"].permute(2, 3, 0, 1)
    past = torch.ones(5, 9, dtype=torch.bool).tril(4)
    torch.testing.assert_close(
        total.double().masked_select(past), stored.masked_select(past), rtol=0, atol=4 * tolerance
    )


@pytest.mark.parametrize("with_memory", [True, False])
def test_the_language_model(golden, with_memory: bool) -> None:
    lm = {n.removeprefix("weights.lm."): x for n, x in golden.items() if "weights.lm." in n}
    x = lm["src_embed.weight"][golden["input.lm.tokens"]].transpose(0, 1)

    def norm(tokens: Tensor, name: str) -> Tensor:
        name = f"transformer.{name}"
        return F.layer_norm(tokens, (24,), lm[f"{name}.weight"], lm[f"{name}.bias"])

    for layer in range(2):
        start = f"layers.{layer}."
        if with_memory:
            stored = golden[f"output.lm.new_memory{layer}"].transpose(0, 1)
            torch.testing.assert_close(x, stored, rtol=0, atol=2e-5)
        prefix = f"weights.lm.transformer.{start}self_attn."
        attention = official(golden, torch.float32, prefix)
        memory = None
        if with_memory:
            memory = norm(
                golden[f"input.lm.memory{layer}"].transpose(0, 1), f"{start}norm_self_attn"
            )
        x = x + attention(norm(x, f"{start}norm_self_attn"), memory)
        feed = [lm[f"transformer.{start}feed_forward.layer{i}.weight"] for i in (1, 2)]
        bias = [lm[f"transformer.{start}feed_forward.layer{i}.bias"] for i in (1, 2)]
        inner = F.linear(norm(x, f"{start}norm_ff"), feed[0], bias[0]).relu()
        x = x + F.linear(inner, feed[1], bias[1])
    logits = F.linear(norm(x, "norm"), lm["generator.weight"], lm["generator.bias"])
    name = "output.lm.logits" if with_memory else "output.lm.logits_no_memory"
    torch.testing.assert_close(logits.transpose(0, 1), golden[name], rtol=0, atol=5e-5)


def test_the_numbers_notice_a_query_that_sees_the_memory_in_its_convolution(golden) -> None:
    module = official(golden, torch.float64, conv_context="memory")
    x, memory = (golden[f"input.{n}"].double().transpose(0, 1) for n in ("x", "memory"))
    out = module(x, memory).transpose(0, 1).detach()
    assert float((out - golden["output64.out"]).abs().max()) > 1e-3


@pytest.mark.bad_input
def test_the_importer_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"'wq\.weight' is no weight of"):
        relative_conv_from_official({"wq.weight": torch.ones(1)})
