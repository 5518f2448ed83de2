"""Linear attention and the delta rules against stored outputs of flash-linear-attention."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from heed_core.attention.delta_rule import delta_rule, gated_delta_rule
from heed_core.attention.linear import linear_attention, retention_decay

GOLDEN = Path(__file__).parent / "golden" / "linear_recurrence"
CONFIG = json.loads((GOLDEN / "meta.json").read_text())["config"]
FORMS = [
    {"form": "recurrent"},
    {"form": "parallel"},
    {"form": "chunked"},
    {"form": "chunked", "chunk": 7},
]
TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 2e-5)]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "fixture.safetensors")


def inputs(golden: dict[str, Tensor], dtype: torch.dtype, stop: int | None = None):
    """A function that gives an input, heads first."""

    def get(name: str) -> Tensor:
        x = golden[f"input.{name}"].to(dtype)
        return x if name.endswith("state") else x.transpose(1, 2)[:, :, :stop]

    return get


def check(
    golden: dict[str, Tensor], case: str, found: tuple[Tensor, Tensor], tolerance: float
) -> None:
    stored = {name: golden.get(f"output64.{case}.{name}") for name in ("out", "state")}
    pairs = [(found[0].transpose(1, 2), stored["out"])]
    if stored["state"] is not None:
        pairs.append((found[1], stored["state"]))
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert float(error) < tolerance, f"{case}: {float(error):.1e}"


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_linear_attention(golden, dtype, tolerance: float, options) -> None:
    get = inputs(golden, dtype)
    qkv, state = (get("q"), get("k"), get("v")), get("initial_state")
    options = {**options, "causal": True}
    found = linear_attention(*qkv, state=state, **options)
    check(golden, "linear.recurrent", found, tolerance)
    check(golden, "linear.chunk64", linear_attention(*qkv, **options), tolerance)
    decay = get("log_gate")
    found = linear_attention(*qkv, state=state, log_decay=decay, **options)
    check(golden, "scalar_decay.recurrent", found, tolerance)
    decay = get("log_gate_key")
    found = linear_attention(*qkv, state=state, log_decay=decay, **options)
    check(golden, "key_decay.recurrent", found, tolerance)
    decay = retention_decay(2).to(dtype)[None, :, None]
    check(golden, "retention.parallel", linear_attention(*qkv, log_decay=decay, **options), 2e-5)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_normalised_linear_attention(golden, dtype, tolerance: float, options) -> None:
    get = inputs(golden, dtype)
    sums = golden["input.initial_normaliser"].to(dtype).transpose(1, 2).mT  # (b, h, d, 1)
    out, state = linear_attention(
        get("q_positive"),
        get("k_positive"),
        get("v"),
        state=torch.cat([get("initial_state"), sums], dim=-1),
        causal=True,
        normalise=True,
        **options,
    )
    check(golden, "linear.normalised", (out, state[..., :-1]), tolerance)
    stored = golden["output64.linear.normalised.normaliser"].transpose(1, 2)[:, :, 0]
    torch.testing.assert_close(state[..., -1].double(), stored, rtol=10 * tolerance, atol=0)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_delta_rules(golden, dtype, tolerance: float, options) -> None:
    get = inputs(golden, dtype)
    rows = (get("q"), get("k_unit"), get("v"), get("beta"))
    state, decay = get("initial_state"), get("log_gate")
    check(golden, "delta.recurrent", delta_rule(*rows, state=state, **options), tolerance)
    check(golden, "delta.chunk", delta_rule(*rows, **options), tolerance)
    found = gated_delta_rule(*rows, decay, state=state, **options)
    check(golden, "gated_delta.recurrent", found, tolerance)
    rows = (get("q"), get("k_unit"), get("kda.v"), get("kda.beta"))
    decay, state = get("kda.log_gate_key"), get("kda.initial_state")
    found = gated_delta_rule(*rows, decay, state=state, **options)
    check(golden, "key_decay_delta.recurrent", found, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_a_length_that_chunks_do_not_divide(golden, dtype, tolerance: float) -> None:
    get = inputs(golden, dtype, stop=CONFIG["odd"])
    state, chunk = get("initial_state"), CONFIG["chunk"]
    found = linear_attention(
        get("q"), get("k"), get("v"), log_decay=get("log_gate"), state=state, causal=True,
        chunk=chunk,
    )  # fmt: skip
    check(golden, "scalar_decay.chunk_odd_length", found, tolerance)
    rows = (get("q"), get("k_unit"), get("v"), get("beta"), get("log_gate"))
    found = gated_delta_rule(*rows, state=state, chunk=chunk)
    check(golden, "gated_delta.chunk_odd_length", found, tolerance)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_gradients(golden, options) -> None:
    get = inputs(golden, torch.float64)
    weight = get("loss_weight")
    names = {"linear": ("q", "k", "v"), "gated_delta": ("q", "k", "v", "beta", "log_gate")}
    for case, parts in names.items():
        unit = case == "gated_delta"
        given = {n: get("k_unit" if unit and n == "k" else n).requires_grad_() for n in parts}
        state = get("initial_state").requires_grad_()
        if case == "linear":
            out, _ = linear_attention(*given.values(), state=state, causal=True, **options)
        else:
            out, _ = gated_delta_rule(*given.values(), state=state, **options)
        leaves = {**given, "initial_state": state}
        found = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
        for name, gradient in zip(leaves, found, strict=True):
            stored = golden[f"grad.{case}.{name}"]
            ours = gradient if name == "initial_state" else gradient.transpose(1, 2)
            error = (ours - stored).abs().max() / stored.abs().max()
            assert float(error) < 1e-6, f"{case}.{name}: {float(error):.1e}"  # stored as float32


def test_the_numbers_notice_a_missing_decay_and_a_missing_error(golden) -> None:
    get = inputs(golden, torch.float64)
    rows, state = (get("q"), get("k_unit"), get("v")), get("initial_state")
    stored = golden["output64.gated_delta.recurrent.out"].transpose(1, 2)
    no_decay, _ = delta_rule(*rows, get("beta"), state=state)
    no_error, _ = linear_attention(*rows, log_decay=get("log_gate"), state=state, causal=True)
    for wrong in (no_decay, no_error):
        assert float((wrong - stored).abs().max()) > 1e-2
