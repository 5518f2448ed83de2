"""Complex attention against stored outputs of the published module."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from heed_core import observe
from heed_core.attention.complex import (
    ComplexAttention,
    adapt_phase,
    complex_attention_from_official,
    polar,
)
from heed_core.relative import RotaryPositions, rotate

GOLDEN = Path(__file__).parent / "golden" / "complexformer" / "fixture.safetensors"
TOLERANCES = [(torch.float64, 1e-9), (torch.float32, 5e-5)]


class StoredFrequencies(RotaryPositions):
    """The published frequencies, which were rounded to float32."""

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__(2 * len(frequencies))
        self.frequencies = frequencies.double()

    def forward(self, x: Tensor, *, positions: Tensor | None = None, offset: int = 0) -> Tensor:
        if positions is None:
            positions = torch.arange(offset, offset + x.shape[2])
        angle = positions.double()[:, None] * self.frequencies
        return rotate(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype))


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def official(golden: dict[str, Tensor], dtype: torch.dtype, **options) -> ComplexAttention:
    module = ComplexAttention(24, heads=3, **options)
    state = {n.removeprefix("weights."): x for n, x in golden.items() if n.startswith("weights.")}
    module.load_state_dict(complex_attention_from_official(state))
    module.rotary = StoredFrequencies(golden["weights.g"])
    return module.to(dtype).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_outputs_weights_and_gradients(golden, dtype, tolerance: float) -> None:
    module = official(golden, dtype)
    x = golden["input.x"].to(dtype).requires_grad_()
    for case, mask in (("full", None), ("causal", golden["input.may_attend"])):
        with observe(module) as record:
            out = module(x, mask=mask)
        for ours, name in ((out, "out"), (record["attend"], "weights")):
            stored = golden[f"output64.{case}.{name}"]
            torch.testing.assert_close(ours.double(), stored, rtol=0, atol=tolerance)
    leaves = {
        "x": x,
        "W_q.weight": module.query.weight,
        "delta_params": module.delta,
        "bias_params": module.phase_bias,
    }
    loss = (out * golden["input.loss_weight"]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    for name, gradient in zip(leaves, found, strict=True):
        stored = golden[f"grad.{name}"]
        torch.testing.assert_close(gradient.double(), stored, rtol=0, atol=20 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_magnitudes_phases_and_scores(golden, dtype, tolerance: float) -> None:
    module = official(golden, dtype)
    x = golden["input.x"].to(dtype)
    query, key = (
        layer(x).unflatten(-1, (3, 8)).transpose(1, 2) for layer in (module.query, module.key)
    )
    for ours, name in zip(polar(query), ("magnitude_q", "phase_q"), strict=True):
        torch.testing.assert_close(
            ours.double(), golden[f"output64.{name}"], rtol=0, atol=tolerance
        )
    query = module.rotary(adapt_phase(query, module.delta, module.phase_bias))
    scores = query @ module.rotary(adapt_phase(key, module.delta)).mT
    torch.testing.assert_close(
        scores.double(), golden["output64.scores"], rtol=0, atol=4 * tolerance
    )


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_decoding_with_a_cache(golden, dtype, tolerance: float) -> None:
    module = official(golden, dtype, causal=True)
    x, stored = golden["input.x"].to(dtype), golden["output64.cached.out"]
    with torch.no_grad():
        cache = module.new_cache(2, 11)
        parts = [module(x[:, :6], cache=cache)]
        parts += [module(x[:, t : t + 1], cache=cache) for t in range(6, 11)]
    torch.testing.assert_close(torch.cat(parts, 1).double(), stored, rtol=0, atol=tolerance)


def test_our_exact_frequencies_are_those_up_to_rounding_but_not_rounded_to_bfloat16(golden) -> None:
    module = official(golden, torch.float64)
    module.rotary = RotaryPositions(8)
    out = module(golden["input.x"].double(), mask=golden["input.may_attend"]).detach()
    assert float((out - golden["output64.causal.out"]).abs().max()) < 1e-5
    rounded = golden["output.bf16_frequencies.causal.out"]
    assert float((out - rounded).abs().max()) > 2e-4


def test_the_numbers_notice_a_scale(golden) -> None:
    module = official(golden, torch.float64, scale=8**-0.5)
    out = module(golden["input.x"].double()).detach()
    assert float((out - golden["output64.full.out"]).abs().max()) > 1e-2


@pytest.mark.bad_input
def test_the_importer_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"'wq\.weight' is no weight of"):
        complex_attention_from_official({"wq.weight": torch.ones(1)})
