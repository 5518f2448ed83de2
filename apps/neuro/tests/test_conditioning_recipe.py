"""Conditioning from the command line: schedules as people type them, and how bad ones are told."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from heed_neuro_cli import APP
from heed_neuro_cli.conditioning_bench import delta_contenders, inputs


def call(*words: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = APP.call([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def refused(*words: object) -> str:
    code, _, err = call(*words)
    lines = [line for line in err.splitlines() if "error:" in line]
    assert code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_a_typed_schedule_gives_the_strengths_of_theory():
    code, out, err = call("simulate", "20 A+ | 20 AB+ | B?", "control: 20 AB+ | B?", "--json")
    assert code == 0, err
    rows = json.loads(out)["experiments"][0]["strengths"]
    found = {(row["group"], row["cue"]): row["strength"] for row in rows}
    assert found["group 1", "B"] == pytest.approx(0.5 * (1 - 0.8**20) * 0.9**20, abs=1e-12)
    assert found["control", "B"] == pytest.approx(0.5 * (1 - 0.8**20), abs=1e-12)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("20 A+ |",), "phase 2"),
        (("20 A+ | | 20 B+",), "phase 2"),
        (("",), "the phase is empty"),
        (("20 A+", "--eta", "0"), "eta must be above 0"),
        (("20 A+", "--eta", "-0.1"), "eta must be above 0"),
        (("20 A+", "--eta", "nan"), "eta must be above 0"),
        (("20 A+", "--d-k", "0"), "d_k must be at least 1"),
        (("20 AB+", "--d-k", "1"), "do not fit in d_k = 1"),
        (("20 AB+", "--cues", "overlap:1.5"), "cannot all have the cosine 1.5"),
        (("20 A+", "--cues", "square"), "cues must be one of"),
        (("20 A+", "--salience", "Z=2"), "unknown cue 'Z' in salience"),
        (("20 A+", "--salience", "A=-1"), "salience of A must be above 0"),
        (("20 A+", "--salience", "A=much"), "expected CUE=FACTOR"),
        (("20 A+food",), "unknown US 'food'"),
        (("5 A+ | ABC+", "--eta", "0.9"), "phase 2, trial 1 (ABC+): eta"),
        (("20 A+ | 5 @+",), "phase 2"),
        (("20 A+", "--layers", "3"), "layers must be 1 or 2"),
        (("20 A+", "--rule", "delta", "delta"), "rule must be different rules"),
        (("missing.yaml",), "no such file"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(words, said: str):
    assert said in refused("simulate", *words)


BROKEN = {
    "groups: {a: 20 A+}\ncues: [B]\n": "unknown cue 'A'",
    "groups: {a: 20 A+food}\nus: {food: [1, 0]}\n": "2 values",
    "groups: {a: '20 A+ | '}\n": "phase 2",
    "groups: {a: 20 A+}\nconditioner: {eta: 0}\n": "eta must be above 0",
    "groups: {a: 20 A+}\nconditioner: {eta: fast}\n": "eta",
    "groups: {a: 20 A+}\nsalience: {Z: 2}\n": "Z",
    "groups: {}\n": "groups",
    "groups: {a: 20 A+}\nexpected: [{rule: delta, group: b, cue: A, value: 1}]\n": "group 'b'",
    "groups: [": "is not valid YAML",
    "": "must hold keys",
}


@pytest.mark.bad_input
@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_broken_experiment_names_its_file(number: int, tmp_path: Path):
    text, said = list(BROKEN.items())[number]
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    line = refused("simulate", path)
    assert str(path) in line
    assert said in line


@pytest.mark.bad_input
def test_check_lists_every_broken_experiment(tmp_path: Path):
    for number, text in enumerate(BROKEN):
        (tmp_path / f"{number}.yaml").write_text(text)
    (tmp_path / "good.yaml").write_text("schedule: 20 A+ | A?\n")
    code, out, _ = call("check", "conditioning", tmp_path, "--json")
    assert code == 1
    found = json.loads(out)
    assert len(found["problems"]) == len(BROKEN)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("capacity", "--d-k", "0"), "must be at least 1"),
        (("capacity", "--loads", "0"), "loads must be above 0"),
        (("depth", "--gain", "0"), "gain must be above 0"),
        (("depth", "--pairs", "1"), "pairs at least 2"),
        (("depth", "--target", "1"), "target must be between 0 and 1"),
    ],
)
def test_curves_that_cannot_be_are_refused(words, said: str):
    assert said in refused(*words)


def test_the_contenders_of_the_benchmark_agree():
    """On 64 of its trials; those that need what is not here say so."""
    torch.manual_seed(0)
    keys, values = (table[:, :, :64] for table in inputs())
    able = {one.name: one.build() for one in delta_contenders() if one.missing is None}
    assert {"heed, chunked", "heed, recurrent"} <= set(able)
    found = [model(keys, values) for model in able.values()]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)


def kept_for_backward(trials: int) -> int:
    """Bytes that the chunked rule keeps for its gradients, each storage counted once."""
    chunked = next(one for one in delta_contenders() if one.name == "heed, chunked")
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = chunked.build()(*(table.requires_grad_() for table in inputs(trials)))
    found.mean().backward()
    return sum(kept.values())


def test_the_memory_of_the_chunked_rule_is_linear_in_the_trials():
    half, whole = kept_for_backward(1024), kept_for_backward(2048)
    assert half > 1024 * 64 * 4  # at least a table of keys
    assert 1.8 < whole / half < 2.1
    names = [one.name for one in delta_contenders()]
    assert "heed, chunked, 2048 trials" in names  # whose peak stands beside that of 4096
