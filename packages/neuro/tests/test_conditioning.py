"""Conditioning: schedules as text and files, what must hold of the rules, the trained layers."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from heed_core.errors import InputError
from heed_neuro.conditioning import capacity, depth
from heed_neuro.conditioning.conditioner import Conditioner
from heed_neuro.conditioning.designs import Design, Expected, read_design, write_design
from heed_neuro.conditioning.forms import learn
from heed_neuro.conditioning.phenomena import EMERGES, EXTRAS, PHENOMENA, effect_rows, table_rows
from heed_neuro.conditioning.probe import (
    ProbeConfig,
    RecallProbe,
    RecallTask,
    draw_episode,
    mean_error,
    probe_effects,
    recall_error,
    stack_episodes,
)
from heed_neuro.conditioning.rules import Memory
from heed_neuro.conditioning.schedules import parse_schedule
from heed_neuro.conditioning.two_layer import run_two_layers


def events(text: str, seed: int = 0) -> list[str]:
    return [str(placed.event) for placed in parse_schedule(text).placed(seed=seed)]


def test_orders_of_a_phase() -> None:
    assert events("2 A+, B- | C?") == ["A+", "A+", "B-", "C?"]
    assert events("3 A+ / 2 AX-") == ["A+", "AX-", "A+", "AX-", "A+"]
    assert events("alternating: 2 A+, 2 B-") == ["A+", "B-", "A+", "B-"]
    shuffled = events("shuffled 10 A+, 10 A-")
    assert sorted(shuffled) == ["A+"] * 10 + ["A-"] * 10
    assert shuffled != sorted(shuffled)
    assert shuffled == events("shuffled 10 A+, 10 A-")
    assert shuffled != events("shuffled 10 A+, 10 A-", seed=1)


@given(
    st.lists(
        st.lists(
            st.tuples(
                st.integers(1, 30),
                st.sampled_from(
                    ["A+", "AB-", "X:0.5", "(tone)A?", "A>3+", "B>A", "A+food", "US=0", "A:-2shock"]
                ),
            ),
            min_size=1,
            max_size=4,
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([", ", " / "]),
)
def test_what_is_read_is_written_the_same_way(phases, separator) -> None:
    text = " | ".join(separator.join(f"{n} {trial}" for n, trial in phase) for phase in phases)
    schedule = parse_schedule(text)
    again = parse_schedule(str(schedule))
    assert [phase.events for phase in again.phases] == [phase.events for phase in schedule.phases]
    assert list(again.placed()) == list(schedule.placed())
    assert len(schedule) == sum(n for phase in phases for n, _ in phase)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("20 A+ | | B?", "phase 2, position 9: the phase is empty"),
        ("", "phase 1, position 1: the phase is empty"),
        ("20 A+ | 20 AB", "phase 2, position 14: expected an outcome after 'AB', found nothing"),
        ("20 a+", "phase 1, position 4: expected a cue, found 'a'"),
        ("0 A+", "repeated 0 times"),
        ("A+, B- / C?", "mixes ',' and '/'"),
        ("AA+", "phase 1, position 2: the cue 'A' is presented twice"),
        ("A:+", "expected a number after ':'"),
        ("A+ B+", "phase 1, position 4: unexpected 'B' after a trial"),
        ("A>+", "expected what follows after '>'"),
        ("()+", "has no name"),
        ("9999999 A+", "at most 1000000"),
    ],
)
def test_a_schedule_that_cannot_be_read_names_phase_and_position(text: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_schedule(text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_designs_are_read_as_they_were_written(tmp_path: Path) -> None:
    designs = [*(item.design for item in PHENOMENA.values()), *EXTRAS]
    designs.append(
        Design(
            name="all",
            title="everything",
            groups={"one": "A+food"},
            cues=("A", "B"),
            salience={"A": 1.5},
            us={"food": (1.0, -1.0)},
            conditioner={"rule": "trace", "decay": 0.9, "d_v": 2},
            expected=(Expected(group="one", cue="B", value=0.0),),
        )
    )
    for design in designs:
        path = write_design(design, tmp_path / f"{design.name}.yaml")
        found = read_design(path)
        for name in ("groups", "salience", "us", "layers", "conditioner", "expected", "cues"):
            assert getattr(found, name) == getattr(design, name), name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("groups: {a: [20 A+", "is not valid YAML"),
        ("schedule: 20 A+\nschedule: 20 B+", "the key 'schedule' appears twice"),
        ("schedul: 20 A+", "did you mean schedule?"),
        ("schedule: 20 A+ | | B?", "phase 2"),
        ("schedule: 20 Z+\ncues: [A]", "unknown cue 'Z'"),
        ("schedule: 20 A+\nconditioner: {rul: delta}", "did you mean rule?"),
        ("schedule: 20 A+\nconditioner: {rule: detla}", "did you mean delta?"),
        ("schedule: 20 A+\nexpected: [{group: all, cue: B, value: 1}]", "unknown cue 'B'"),
        ("schedule: 20 A+\nexpected: [{group: all, cue: A, value: x}]", "must be a number"),
        ("- 20 A+", "must hold keys"),
        ("schedule: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        read_design(path)
    assert said in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_us_values_and_unknown_names_are_checked() -> None:
    with pytest.raises(InputError, match="'food' has 2 values, not d_v = 1"):
        Conditioner().run("A+food", us={"food": [1.0, 0.0]})
    with pytest.raises(InputError, match="unknown US 'food'"):
        Conditioner().run("A+food")
    with pytest.raises(InputError, match="unknown cue 'B'"):
        Conditioner().run("20 B+", cues="A")
    with pytest.raises(InputError, match="unknown cue 'Z' in salience"):
        Conditioner(salience={"Z": 2.0}).run("20 A+")
    with pytest.raises(InputError, match="do not fit in d_k = 2"):
        Conditioner(d_k=2).run("ABC+")
    for eta in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="eta must be above 0"):
            Conditioner(eta=eta)
    with pytest.raises(ValueError, match="decay has no effect"):
        Conditioner(decay=0.9)
    with pytest.raises(ValueError, match="needs a decay"):
        Conditioner(rule="trace")


def test_a_step_that_would_diverge_names_its_trial() -> None:
    """Three cues at eta = 0.9: 0.9 * 3 = 2.7."""
    with pytest.raises(InputError, match=r"phase 2, trial 3 \(ABC\+\): eta .* = 2.7 is above 2"):
        Conditioner(eta=0.9).run("5 A+ | 2 B+, ABC+")
    Conditioner(eta=0.6).run("50 ABC+")  # 1.8 converges


def test_every_phenomenon_has_its_number() -> None:
    rows = table_rows(("delta", "hebb", "trace", "softmax"))
    assert len(rows) >= 45
    assert max(abs(row["difference"]) for row in rows) < 1e-10
    # figures as the theory's tables print them
    printed = {
        (row["phenomenon"], row["group"], row["cue"]): round(row["ours"], 4)
        for row in rows
        if row["rule"] == "delta"
    }
    assert printed["acquisition", "paired", "A"] == 0.8784
    assert printed["extinction", "extinguished", "A"] == 0.1068
    assert printed["blocking", "blocking", "B"] == 0.0601
    assert printed["overshadowing", "compound", "A"] == 0.4942
    assert printed["conditioned-inhibition", "inhibition", "X"] == -0.7767
    assert printed["overexpectation", "compound", "A"] == 0.5044


def test_only_error_correction_lets_cues_compete() -> None:
    competition = ("blocking", "overshadowing", "conditioned-inhibition", "overexpectation")
    effects = {row["phenomenon"]: row for row in effect_rows(("hebb", "delta", "ph", "softmax"))}
    for name in competition:
        assert effects[name]["delta"] >= EMERGES
        assert effects[name]["hebb"] < EMERGES
    assert effects["latent-inhibition"]["delta"] == pytest.approx(0.0, abs=1e-12)
    assert effects["latent-inhibition"]["ph"] >= EMERGES
    assert effects["revaluation-one-layer"]["softmax"] == pytest.approx(1.0)


def test_two_layers_keep_second_order_responses_when_the_us_loses_its_value() -> None:
    found = run_two_layers(Conditioner(), "20 A+ | 20 B>A | US=0 | A?, B?")
    assert found.strength("A") == 0.0
    assert found.strength("B") > 0.3


def test_hebb_does_not_mind_the_order_of_trials_but_delta_does() -> None:
    text = "shuffled 10 A+, 10 AB-, 10 B:0.5"
    for rule, equal in (("hebb", True), ("delta", False)):
        memories = [Conditioner(rule=rule, seed=seed).run(text).memory.S for seed in (0, 1)]
        assert torch.allclose(*memories, atol=1e-12) == equal


def test_the_delta_rule_is_exact_for_independent_keys_which_hebb_is_not() -> None:
    keys = capacity.cue_vectors("random", 6, 8)
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    _, memory = learn(keys.repeat(4000, 1)[None], values.repeat(4000, 1)[None], rule="delta", eta=1)
    torch.testing.assert_close(keys @ memory[0].mT, values, rtol=0, atol=1e-6)
    assert float((keys @ capacity.hebbian_memory(keys, values).mT - values).abs().max()) > 0.1


def test_orthonormal_keys_are_exact_up_to_their_number() -> None:
    keys = capacity.cue_vectors("orthonormal", 8, 8)
    values = torch.randn(8, 3).double()
    assert torch.equal(keys @ capacity.hebbian_memory(keys, values).mT, values)
    with pytest.raises(InputError, match="9 cues"):
        capacity.cue_vectors("orthonormal", 9, 8)


def test_generalisation_follows_the_cosine() -> None:
    for rho in (-0.2, 0.3, 0.9):
        found = Conditioner(cues=f"overlap:{rho}").run("20 A+ | B?", cues="AB")
        assert found.strength("B") == pytest.approx(rho * found.strength("A"), abs=1e-12)


def test_simulated_capacity_is_that_of_theory() -> None:
    rows = capacity.capacity_rows((64,), repeats=20)
    for row in rows:
        assert row["cosine"] == pytest.approx(row["cosine theory"], abs=0.01)
        assert row["bit error"] == pytest.approx(row["bit error theory"], abs=0.01)
    assert [row["nearest"] for row in rows[:3]] == [1.0] * 3


def test_depth_and_heads_are_as_predicted() -> None:
    for row in depth.depth_rows(64, 16, layers=5, gain=1.1, repeats=300):
        assert row["simulated"] == pytest.approx(row["independent"], rel=0.08)
        assert row["simulated"] < row["worst"] * 1.05
    for row in depth.head_rows(64, 16, (1, 4), repeats=300):
        assert row["mean, simulated"] == pytest.approx(row["mean, theory"], rel=0.1)
        share = row["same width in all, simulated"]
        assert share == pytest.approx(row["same width in all, theory"], rel=0.1)
        assert row["majority wrong, simulated"] <= row["majority wrong, bound"]


def test_a_step_costs_the_same_however_many_came_before() -> None:
    memory = Memory(torch.eye(6).double(), 3, rule="delta", eta=0.5)
    counts = []
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:
            for _ in range(10):
                memory.step(torch.ones(6).double() / 6, torch.ones(3).double())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[2] > 0
    assert (memory.S.shape, memory.stored) == ((3, 6), [])


def test_trained_layers_recall_and_only_delta_layers_show_competition() -> None:
    torch.manual_seed(0)
    task, config = RecallTask(pairs=6), ProbeConfig(kinds=("hebb", "delta"), d_k=8, head_dim=8)
    probe = RecallProbe(config)
    batch = stack_episodes([draw_episode(task, 8, 4, seed=s) for s in range(32)])
    optimizer = torch.optim.Adam(probe.parameters(), 1e-2)
    errors = []
    for _ in range(25):
        answers = probe(batch.keys, batch.told)
        losses = torch.stack([recall_error(one, batch) for one in answers])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        errors.append(losses.detach())
    assert bool((errors[-1] < errors[0]).all())
    assert float(errors[-1][1]) < 0.6
    assert mean_error(task) == pytest.approx(0.25 * (1 + 1 / 2 + 1 / 3) / 3)
    effects = {row["phenomenon"]: row for row in probe_effects(probe)}
    for name in ("blocking", "overshadowing", "conditioned-inhibition", "overexpectation"):
        assert effects[name]["delta"] >= EMERGES, name
        assert effects[name]["hebb"] < EMERGES, name


def test_an_answer_knows_nothing_of_its_own_or_later_values() -> None:
    probe = RecallProbe(ProbeConfig()).double().eval()
    keys, values = torch.randn(1, 9, 16).double(), torch.randn(1, 9, 4).double()
    changed = values.clone()
    changed[:, 5:] += 1.0
    for before, after in zip(probe(keys, values), probe(keys, changed), strict=True):
        assert torch.equal(before[:, :6], after[:, :6])
        assert not torch.allclose(before[:, 6:], after[:, 6:])
