"""Conditioning against numbers that were computed apart from this code, in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from heed_neuro.conditioning import capacity, depth
from heed_neuro.conditioning.conditioner import Conditioner
from heed_neuro.conditioning.forms import learn, recall_exemplars
from heed_neuro.conditioning.rules import Memory
from heed_neuro.conditioning.theory import partial_variance
from heed_neuro.conditioning.two_layer import run_two_layers

GOLDEN = Path(__file__).parent / "golden" / "conditioning"
META = json.loads((GOLDEN / "meta.json").read_text())
PHENOMENA = [
    "acquisition", "blocking", "extinction", "inhibition", "latent_inhibition", "overexpectation",
    "overshadowing", "recovery",
]  # fmt: skip
SCHEDULES = {
    "acquisition": "20 A+",
    "extinction": "20 A+ | 20 A-",
    "blocking": "20 A+ | 20 AB+",
    "overshadowing": "20 AB+",
    "inhibition": "40 A+ / 40 AX-",
    "overexpectation": "20 A+, 20 B+ | 20 AB+",
    "latent_inhibition": "20 A- | 20 A+",
    "recovery": "20 AB+ | 20 A-",
}
LEARNERS = {
    "delta": {"rule": "delta"},
    "hebb": {"rule": "hebb"},
    "trace_memory": {"rule": "trace", "mode": "memory", "decay": 0.95},
    "gated_delta": {"rule": "gated-delta", "decay": 0.97},
    "oja": {"rule": "oja"},
    "ph": {"rule": "ph", "mixing": 0.3},
}
GENERIC = {
    "delta": {"rule": "delta"},
    "hebb": {"rule": "hebb"},
    "trace_memory": {"rule": "trace", "mode": "memory", "decay": 0.9},
    "trace_cs": {"rule": "trace", "mode": "cs", "decay": 0.9},
    "gated_delta": {"rule": "gated-delta", "decay": 0.9},
    "oja": {"rule": "oja", "eta": 0.05},
    "ph": {"rule": "ph", "mixing": 0.4},
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "fixture.safetensors")


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def follow(memory: Memory, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Responses before each step, and the memory after each; every axis is a cue."""
    responses, states = [], []
    for key, value in zip(keys, values, strict=True):
        responses.append(memory.answer(key))
        memory.step(key, value)
        states.append(memory.S)
    return torch.stack(responses), torch.stack(states)


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("name", PHENOMENA)
def test_phenomena_trial_by_trial(golden, name: str, learner: str) -> None:
    memory = Memory(torch.eye(3).double(), 1, eta=0.1, **LEARNERS[learner])
    keys, values = golden[f"input.{name}.keys"], golden[f"input.{name}.values"]
    responses, states = follow(memory, keys, values)
    stored = f"output.{name}.{learner}"
    close(responses[:, 0], golden[f"{stored}.response_before_update"])
    close(states[-1], golden[f"{stored}.final_S"])
    if learner == "ph":
        close(memory.associability, golden[f"{stored}.final_associability"])


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_as_text_are_those_trials(golden, name: str) -> None:
    found = Conditioner(rule="delta", eta=0.1).run(SCHEDULES[name], cues="ABX")
    stored = golden[f"output.{name}.delta.response_before_update"]
    close(torch.tensor(found.curves["response"].to_numpy()), stored)
    for cue, value in META["learned_weights"][name]["delta"].items():
        assert found.strength(cue) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("learner", GENERIC)
def test_random_keys_and_vector_outcomes(golden, learner: str) -> None:
    memory = Memory(torch.eye(6).double(), 3, **{"eta": 0.6, **GENERIC[learner]})
    responses, states = follow(memory, golden["input.generic.keys"], golden["input.generic.values"])
    stored = f"output.generic.{learner}"
    close(responses, golden[f"{stored}.response_before_update"])
    close(states, golden[f"{stored}.S_each_step"])
    close(memory.answer(golden["input.generic.queries"]), golden[f"{stored}.query_response"])


@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunked"])
@pytest.mark.parametrize("learner", ["hebb", "trace_memory", "delta", "gated_delta"])
def test_forms_of_the_core_give_the_same_with_gradients(golden, learner: str, form: str) -> None:
    names = ("keys", "values", "queries")
    leaves = [golden[f"input.generic.{name}"].clone().requires_grad_() for name in names]
    keys, values, queries = leaves
    options = GENERIC[learner]
    before, memory = learn(
        keys[None], values[None], rule=options["rule"], eta=0.6, decay=options.get("decay"),
        form=form,
    )  # fmt: skip
    stored = f"output.generic.{learner}"
    close(before[0], golden[f"{stored}.response_before_update"])
    close(memory[0], golden[f"{stored}.S_each_step"][-1])
    answers = queries @ memory[0].mT
    weights = torch.cos(0.7 * torch.arange(answers.numel()).double()).view_as(answers)
    found = torch.autograd.grad((answers * weights).sum(), leaves)
    for name, gradient in zip(names, found, strict=True):
        close(gradient, golden[f"grad.generic.{learner}.{name}"])


def test_gradients_of_learning_step_by_step(golden) -> None:
    keys = golden["input.generic.keys"].clone().requires_grad_()
    memory = Memory(torch.eye(6).double(), 3, rule="delta", eta=0.6)
    follow(memory, keys, golden["input.generic.values"])
    answers = memory.answer(golden["input.generic.queries"])
    weights = torch.cos(0.7 * torch.arange(answers.numel()).double()).view_as(answers)
    (found,) = torch.autograd.grad((answers * weights).sum(), keys)
    close(found, golden["grad.generic.delta.keys"])


def test_exemplars(golden) -> None:
    keys, values, queries = (golden[f"input.generic.{n}"] for n in ("keys", "values", "queries"))
    memory = Memory(torch.eye(6).double(), 3, rule="softmax", beta=2.5)
    follow(memory, keys, values)
    wanted = golden["output.generic.softmax.query_response"]
    close(memory.answer(queries), wanted)
    close(recall_exemplars(queries[None], keys[None], values[None], beta=2.5)[0], wanted)


def test_the_delta_rule_repeated_converges_to_least_squares(golden) -> None:
    """More equations than channels: rates fall, and a turn of them ends near the solution."""
    keys, values = golden["input.generic.keys"], golden["input.generic.values"]
    wanted = golden["output.generic.minimum_norm_least_squares_S"]
    errors = []
    for rate in (0.2, 0.02):
        turns = int(60 / rate)
        _, memory = learn(
            keys.repeat(turns, 1)[None], values.repeat(turns, 1)[None], rule="delta", eta=rate
        )
        errors.append(float((memory[0] - wanted).abs().max()))
    assert errors[1] < 0.2 * errors[0]  # what is left is of the order of the rate
    assert errors[1] < 0.05


@pytest.mark.parametrize("rule", ["delta", "hebb"])
def test_unequal_salience(golden, rule: str) -> None:
    conditioner = Conditioner(rule=rule, eta=0.1, salience={"A": 1.5, "B": 0.5}, d_k=3)
    found = conditioner.run("20 AB+", cues="ABX")
    close(found.memory.S, golden[f"output.unequal_salience.{rule}.final_S"])


def test_trace_conditioning(golden) -> None:
    options = {"rule": "trace", "eta": 0.1, "decay": 0.8, "d_k": 3}
    reset = Conditioner(**options).run("20 A>3+", cues="ABX")
    close(reset.memory.S, golden["output.trace.reset_each_trial.final_S"])
    assert Conditioner(rule="delta").run("20 A>3+").strength("A") == 0.0
    # kept over trials of 6 steps: the trace of earlier ones is there too
    memory = Memory(torch.eye(3).double(), 1, rule="trace", eta=0.1, decay=0.8)
    _, states = follow(memory, golden["input.trace.keys"], golden["input.trace.values"])
    close(states[-1], golden["output.trace.kept.final_S"])


def test_second_order_conditioning_needs_two_layers() -> None:
    stored = META["learned_weights"]["second_order"]
    two = run_two_layers(Conditioner(), "20 A+ | 20 B>A")
    assert two.strength("A") == pytest.approx(stored["V_A"], abs=1e-12)
    assert two.strength("B") == pytest.approx(stored["V_B_two_layer"], abs=1e-12)
    assert Conditioner().run("20 A+ | 20 B>A").strength("B") == 0.0


def test_partial_reinforcement(golden) -> None:
    rewards = golden["input.partial.rewards"]
    memory = Memory(torch.eye(1).double(), 1, rule="delta", eta=0.1)
    key = torch.ones(1).double()
    _, states = follow(memory, key.expand(len(rewards), 1), rewards[:, None])
    close(states[:, 0, 0], golden["output.partial.delta_V"])
    stored = META["partial_reinforcement"]
    assert partial_variance(0.1, stored["p"]) == pytest.approx(stored["variance"], abs=1e-12)


def test_capacity(golden) -> None:
    keys, values = golden["input.capacity.keys"], golden["input.capacity.values"]
    close(capacity.hebbian_memory(keys, values), golden["output.capacity.S"])
    found = capacity.recall_scores(keys, values)
    for name, stored in (
        ("bit_error", "sign_error_rate"),
        ("nearest", "nearest_pattern_accuracy"),
        ("coherence", "max_coherence"),
    ):
        assert found[name] == pytest.approx(float(golden[f"output.capacity.{stored}"]), abs=1e-12)
    assert found["cosine"] == pytest.approx(float(golden["output.capacity.cosine_each"].mean()))


def test_closed_forms_of_capacity_and_depth() -> None:
    stored = META["capacity_closed_forms"]
    for name, values in stored.items():
        if name == "capacity_average":
            for key, value in values.items():
                d_k, cosine = key.removeprefix("d").split("_cos")
                assert capacity.capacity_average(int(d_k), float(cosine)) == pytest.approx(value)
        else:
            d_k, count = (int(part) for part in name.removeprefix("d").split("_N"))
            assert capacity.expected_cosine(count, d_k) == pytest.approx(values["cosine"])
            assert capacity.expected_bit_error(count, d_k) == pytest.approx(values["bit_error"])
    deep = META["depth"]
    layers, gain, error = deep["L"], deep["a"], deep["e"]
    heads, wrong = deep["H"], deep["p"]
    for found, name in (
        (depth.error_independent(error, layers, gain), "E_independent"),
        (depth.error_worst(error, layers, gain), "E_worst"),
        (depth.error_of_heads(error, heads), "e_after_heads"),
        (depth.majority_bound(wrong, heads), "majority_bound"),
        (depth.stack_right_bound(wrong, heads, layers), "stack_right_bound"),
        (depth.heads_needed(wrong, layers, deep["delta"]), "H_needed"),
    ):
        assert found == pytest.approx(deep[name], rel=1e-12), name
