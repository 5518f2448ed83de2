"""Dynamic mask attention against stored outputs of the published kernels and language model."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from heed_core import observe
from heed_core.attention.dynamic_mask import (
    DynamicMaskAttention,
    dynamic_mask_attention,
    dynamic_mask_from_doge,
    dynamic_scores,
)
from heed_core.key_selection import keep_blocks, keep_most
from heed_core.relative import RotaryPositions

GOLDEN = Path(__file__).parent / "golden" / "dma" / "fixture.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def doge(golden: dict[str, Tensor], dtype: torch.dtype, prefix: str = "weights.", **options):
    module = DynamicMaskAttention(
        48, heads=4, kv_heads=2, keep=5, rotary=RotaryPositions(12), **options
    )
    names = ("A", "dt_proj", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    state = {
        n.removeprefix(prefix): x
        for n, x in golden.items()
        if n.startswith(prefix) and n.removeprefix(prefix).split(".")[0] in names
    }
    module.load_state_dict(dynamic_mask_from_doge(state))
    return module.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_of_the_language_model(golden, dtype) -> None:
    module = doge(golden, dtype)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5  # the stored rotary table is float32
    x = golden["input.hidden_states"].to(dtype).requires_grad_()
    mask = golden["input.may_attend"]
    value = module.value(x).unflatten(-1, (2, 12)).transpose(1, 2)
    scores = dynamic_scores(value, module.score.weight, None, module.strength)
    assert torch.equal(keep_most(scores, mask, 5), golden["output.doge.keep"])
    with observe(module) as record:
        out = module(x, mask=mask)
    for ours, name in ((scores, "delta"), (record["attend"], "weights"), (out, "out")):
        stored = golden[f"output64.doge.{name}"]
        torch.testing.assert_close(ours.double(), stored, rtol=0, atol=tolerance)
    leaves = {
        "hidden_states": x,
        "A": module.strength,
        "dt_proj.weight": module.score.weight,
        "q_norm.weight": module.query_norm.weight,
    }
    loss = (out * golden["input.loss_weight"]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    for name, gradient in zip(leaves, found, strict=True):
        stored = golden[f"grad.doge.{name}"]
        torch.testing.assert_close(gradient.float(), stored, rtol=0, atol=2e-4)


def test_the_layer_notices_scores_without_the_exponential(golden) -> None:
    module = doge(golden, torch.float64, form="linear")
    out = module(golden["input.hidden_states"].double(), mask=golden["input.may_attend"])
    assert float((out - golden["output64.doge.out"]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_function_of_the_kernels(golden, dtype) -> None:
    query, key, value = (
        golden[f"input.ref.{n}"].to(dtype).requires_grad_() for n in ("q", "k", "v")
    )
    scores = golden["input.ref.bias_row"][:, :, 0].to(dtype).requires_grad_()
    for options in ({"causal": True}, {"mask": golden["input.ref.may_attend"]}):
        out = dynamic_mask_attention(query, key, value, scores, keep=5, **options)
        stored = golden["output64.ref.per_query.out"].transpose(1, 2)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(out.double(), stored, rtol=0, atol=tolerance)
        loss = (out.transpose(1, 2) * golden["input.ref.loss_weight"]).sum()
        gradients = torch.autograd.grad(loss, (query, key, value, scores))
        for name, gradient in zip(("q", "k", "v"), gradients[:3], strict=True):
            torch.testing.assert_close(
                gradient.double(), golden[f"grad.ref.{name}"], rtol=0, atol=10 * tolerance
            )
        pairs = golden["grad.ref.bias"].sum(2)  # stored per pair of query and key
        torch.testing.assert_close(gradients[3].double(), pairs, rtol=0, atol=10 * tolerance)
    out = dynamic_mask_attention(query, key, value, scores, keep=5)
    stored = golden["output.ref.global_noncausal.out"].transpose(1, 2)
    torch.testing.assert_close(out.float(), stored, rtol=0, atol=1e-5)


def test_sets_of_kept_keys(golden) -> None:
    scores = golden["input.ref.bias_row"][:, :, 0]
    causal = golden["input.ref.may_attend"]
    per_query = golden["output.mask.per_query_causal"]
    assert torch.equal(keep_most(scores, causal, 5), per_query)
    assert torch.equal(per_query, golden["output.mask.row_bias_4d_causal"])
    everything = torch.ones(1, 1, 1, 11, dtype=torch.bool)
    found = keep_most(scores, everything, 5)
    assert torch.equal(found, golden["output.mask.row_bias_no_mask_global"])
    blocks = keep_blocks(golden["input.ref.block_mask_in"], 4)
    assert torch.equal(blocks, golden["output.mask.block_smooth"])
    stored = golden["output.mask.per_query_causal_block"]
    assert torch.equal(keep_blocks(per_query, 4), stored)


def lm(golden: dict[str, Tensor], tokens: Tensor, caches=None) -> Tensor:
    """The two-layer language model around our attention."""
    model = "weights.lm.model."

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (48,), golden[f"{model}{name}.weight"], 1e-6)

    x = golden[f"{model}embed_tokens.weight"][tokens]
    for layer in range(2):
        start = f"layers.{layer}."
        attention = doge(golden, torch.float32, f"{model}{start}self_attn.")
        cache = None if caches is None else caches[layer]
        inner = norm(x, f"{start}input_layernorm")
        x = golden[f"{model}{start}input_residual"] * x + attention(inner, cache=cache)
        inner = norm(x, f"{start}post_attention_layernorm")
        gate, up, down = (
            golden[f"{model}{start}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        feed = (F.silu(inner @ gate.T) * (inner @ up.T)) @ down.T
        x = golden[f"{model}{start}post_attention_residual"] * x + feed
    return norm(x, "norm") @ golden[f"{model}embed_tokens.weight"].T


def test_the_language_model_and_its_decoding(golden) -> None:
    tokens = golden["input.lm.input_ids"]
    with torch.no_grad():
        logits = lm(golden, tokens)
        torch.testing.assert_close(logits, golden["output.lm.logits"], rtol=0, atol=2e-5)
        caches = [doge(golden, torch.float32).new_cache(2, 11) for _ in range(2)]
        steps = [lm(golden, tokens[:, t : t + 1], caches) for t in range(11)]
    stored = golden["output.lm.logits_cached"]
    torch.testing.assert_close(torch.cat(steps, 1), stored, rtol=0, atol=2e-5)


@pytest.mark.bad_input
def test_the_importer_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"'wq\.weight' is no weight of"):
        dynamic_mask_from_doge({"wq.weight": torch.ones(1)})
