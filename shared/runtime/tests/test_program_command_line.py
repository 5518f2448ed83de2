import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import yaml
from pydantic import Field

from heed_runtime.app import VERBS, App, about
from heed_runtime.arguments import parse
from heed_runtime.errors import UsageError
from heed_runtime.options import SystemOptions
from heed_runtime.settings import PLAIN_NAMES, TrainerSettings, load_settings
from heed_runtime.testing import APP

HEAVY = ("torch", "lightning", "tyro", "pydantic", "rich", "matplotlib", "numpy", "yaml")


def call(argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = APP.call(argv.split())
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("argv", [["--help"], ["--version"], [], ["nothing"]])
def test_help_and_version_import_nothing_heavy(argv: list[str]) -> None:
    program = (
        "import sys\n"
        "from heed_runtime.testing import APP\n"
        f"code = APP.call({argv!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"[] {2 if argv == ['nothing'] else 0}"


def test_help_names_every_verb_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call("--help", capsys)
    assert (code, err) == (0, "")
    for verb in VERBS:
        line_of_verb = about(f"heed_runtime.commands.{verb}")
        assert line_of_verb, verb
        assert any(
            line.startswith(f"  {verb} ") and line.endswith(line_of_verb)
            for line in out.splitlines()
        ), verb
    assert max(map(len, out.splitlines())) <= 140
    assert "systems: tokens" in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(f"{verb} --help", capsys)
    assert (code, err) == (0, "")
    assert f"usage: heed-example {verb}" in out
    assert about(f"heed_runtime.commands.{verb}")[:40] in out
    for flag in ("--json", "--quiet", "--debug"):
        assert flag in out


def test_help_of_a_system_shows_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call("train tokens --help", capsys)
    usage = " ".join(out.split("\n\n")[0].split())
    assert "SYSTEM" in usage
    assert "Attention over marked tokens; by the tests of the program" in out
    assert "an example, not for any use" in out
    for flag in ("--data PATH", "--data.on-error", "--model.width", "--seed INT", "--workers"):
        assert flag in out, flag
    assert "--trainer.seed" not in out
    assert "Channels of a token inside the network. (default: 16)" in " ".join(
        out.replace("\u2502", " ").split()
    )


COMMON = {"--json", "--quiet", "--debug"}
SYSTEM = COMMON | {"--config", "--preset"}
USE = COMMON | {"--device", "--precision", "--impl"}
TRAINER = {
    f"--trainer.{item.name.replace('_', '-')}"
    for item in dataclasses.fields(TrainerSettings)
    if item.name not in PLAIN_NAMES
} | {f"--{name}" for name in PLAIN_NAMES}
FLAGS = {
    "list": COMMON,
    "info": SYSTEM | TRAINER,
    "sample": COMMON | {"--seed", "--overwrite"},
    "check": SYSTEM,
    "train": SYSTEM | TRAINER | {"--data", "--out", "--resume", "--init", "--impl", "--overwrite"},
    "evaluate": USE | {"--data", "--split", "--workers", "--devices"},
    "predict": USE | {"--out", "--overwrite", "--resume", "--workers", "--devices"},
    "explain": USE | {"--out", "--overwrite"},
    "export": COMMON | {"--out", "--format", "--overwrite"},
    "doctor": COMMON,
}


@pytest.mark.parametrize("verb", FLAGS)
def test_the_flags_of_a_verb_are_these_and_no_others(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    system = "tokens " if "--preset" in FLAGS[verb] else ""
    _, out, _ = call(f"{verb} {system}--help", capsys)
    words = out.replace("\u2502", " ").replace(",", " ").split()
    found = {word for word in words if word.startswith("--") and word.strip("-")} - {"--help"}
    of_the_system = {
        flag for flag in found if flag.startswith(("--model.", "--data.", "--training."))
    }
    assert found - of_the_system == FLAGS[verb]
    assert bool(of_the_system) == bool(system)


def settings_of(argv: str) -> object:
    from heed_runtime.commands.train import Options

    return parse(APP, "train", Options, "", argv.split()).settings


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("model: {width: 8, heads: 4}\ntrainer: {seed: 5, batch: 2}\n")
    settings = settings_of(f"tokens --config {file} --model.heads 1 --seed 6 --data X")
    defaults = load_settings(APP.recipe("tokens"))
    assert settings.model == dataclasses.replace(defaults.model, width=8, heads=1)
    assert settings.trainer == dataclasses.replace(defaults.trainer, seed=6, batch=2)
    assert settings.data == defaults.data
    assert settings_of(f"--seed 6 --config={file} --model.heads=1 tokens") == settings


def test_a_flag_may_repair_what_the_file_says_wrongly_only_with_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("model: {width: 9}\n")
    with pytest.raises(ValueError, match="multiple of heads"):
        settings_of(f"tokens --config {file}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounded:
    depth: Annotated[int, Field(ge=1)] = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundedSettings:
    model: Bounded = dataclasses.field(default_factory=Bounded)


def test_a_flag_is_validated_like_the_file() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(SystemOptions):
        groups = ("model",)

    recipe = SimpleNamespace(card=SimpleNamespace(name="toy"), presets={"only": BoundedSettings})
    app = SimpleNamespace(name="heed-y", systems={"toy": ""}, recipe=lambda name: recipe)
    assert parse(app, "info", Options, "", ["toy"]).settings == BoundedSettings()
    with pytest.raises(UsageError, match=r"--model\.depth: got 0, .*greater than or equal to 1"):
        parse(app, "info", Options, "", ["toy", "--model.depth", "0"])


def test_data_and_data_settings_stand_side_by_side() -> None:
    from heed_runtime.commands.train import Options

    words = ["tokens", "--data.on-error", "skip", "--data", "some/where", "--data.tokens", "4"]
    parsed = parse(APP, "train", Options, "", words)
    assert parsed.options.data == Path("some/where")
    assert (parsed.settings.data.on_error, parsed.settings.data.tokens) == ("skip", 4)


def test_extra_arguments_of_the_engine_are_names_and_values() -> None:
    extra = settings_of("tokens --trainer.extra deterministic=true limit_val_batches=0.5").trainer
    assert extra.extra == {"deterministic": True, "limit_val_batches": 0.5}


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("trian", "heed-example has no verb 'trian'; did you mean 'train'?"),
        ("tokens train", "a verb comes first: heed-example train tokens"),
        ("--nope", "heed-example has no verb '--nope'; allowed: list, info,"),
        ("info", "info needs a SYSTEM; one of: tokens"),
        ("info --json", "info needs a SYSTEM; one of: tokens"),
        ("info token", "heed-example has no system 'token'; did you mean 'tokens'?"),
        ("info tokens --preset x", "tokens has no preset 'x'; allowed: "),
        ("info tokens --model.widht 3", "unknown flag --model.widht; did you mean --model.width?"),
        ("info tokens --trainer.seed 3", "unknown flag --trainer.seed; did you mean --seed?"),
        ("info tokens more", "unexpected: more"),
        ("info tokens --model.width", "Missing value for argument '--model.width'."),
        ("info tokens --model.width x", "--model.width: invalid literal for int()"),
        ("info tokens --model.width 3", "model: width must be a multiple of heads=2, got 3"),
        ("info tokens --device tpu", "invalid choice 'tpu' for argument '--device'. Expected one"),
        ("info tokens --seed -1", "trainer: seed must not be negative, got -1"),
        ("info tokens --trainer.extra a", "--trainer.extra: expected NAME=VALUE, got 'a'"),
        ("info tokens --config no.yaml", "no.yaml: no such file; check the path"),
        ("check tokens", "missing: DATA"),
        ("check tokens " + "x" * 300, "file name too long"),
        ("check tokens no/where", "no/where: no such file or folder; check the path"),
        ("sample tokens", "missing: DIR"),
        ("sample tokens D --seed -1", "seed must not be negative, got -1"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    argv: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(argv, capsys)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("heed-example: error: ")
    assert line in err


def test_list_info_and_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = call("list --json", capsys)
    assert [row["system"] for row in json.loads(out)["systems"]] == ["tokens"]
    assert err == ""
    _, out, _ = call("--json info tokens --model.width 32", capsys)
    facts = json.loads(out)
    assert facts["settings"]["model"]["width"] == 32
    assert facts["card"]["layout"]
    _, out, _ = call("doctor --json", capsys)
    facts = json.loads(out)
    assert {row["device"] for row in facts["devices"]} >= {"cpu"}
    names = {row["name"] for row in facts["versions"]}
    assert {"python", "torch", "heed-core", "heed-runtime"} <= names
    per_call = {row["call"]: 0 for row in facts["attention_back_ends"]}
    for row in facts["attention_back_ends"]:
        assert row["why"]
        per_call[row["call"]] += row["used"] == "yes"
    assert set(per_call.values()) == {1}


def test_info_counts_parameters_and_operations() -> None:
    import torch
    from torch import nn

    from heed_runtime.commands.info import measure
    from heed_runtime.recipe import Exportable

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(6, 8)
            self.tied = self.query
            self.query.bias.requires_grad_(False)
            self.row = nn.Parameter(torch.zeros(8))
            self.view_of_a_parameter = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.query(x) + self.view_of_a_parameter(self.row.expand(2, 1, 1, 8))
            return nn.functional.scaled_dot_product_attention(q, q, q)

    sizes = measure(
        Exportable(
            model=Net(),
            examples=[(torch.zeros(2, 1, 5, 6),)],
            dynamic_shapes=({},),
            input_names=["x"],
            output_names=["y"],
        )
    )
    assert sizes["parameters"] == 6 * 8 + 8 + 8
    assert sizes["trainable"] == 6 * 8 + 8
    assert sizes["input"] == "2x1x5x6"
    projection, products = 2 * 5 * 6 * 8, 2 * (2 * 5 * 5 * 8)
    assert sizes["gflops"] == pytest.approx(2 * (projection + products) / 1e9)


def test_sample_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    code, out, _ = call(f"sample tokens {folder}", capsys)
    assert code == 0
    assert out.splitlines()[-1] == f"wrote {folder}"
    code, out, err = call(f"check tokens {folder} --json --quiet", capsys)
    found = json.loads(out)
    assert (code, err, found["ok"], found["problems"]) == (0, "", True, [])
    assert found["counts"]
    for path in folder.rglob("*/*.csv"):
        path.write_text("no,table\n1\n")
    code, out, _ = call(f"check tokens {folder} --json", capsys)
    problems = json.loads(out)["problems"]
    assert code == 1
    assert len(problems) > 1
    code, out, _ = call(f"check tokens {folder}", capsys)
    assert code == 1
    assert out.count("problem: ") == min(50, len(problems))


def test_check_shows_fifty_problems_and_counts_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from heed_runtime.recipe import Check

    many = Check(counts=[{"cases": 60}], problems=[f"f{n}: broken" for n in range(60)])
    monkeypatch.setattr(type(APP.recipe("tokens")), "check", lambda *_: many)
    code, out, _ = call(f"check tokens {tmp_path}", capsys)
    assert code == 1
    assert out.splitlines()[0] == f"{tmp_path}: 60 problems"
    assert "problem: f49: broken" in out
    assert "f50" not in out
    assert "... and 10 more problems (--json lists all)" in out


def test_the_same_seed_writes_the_same_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call(f"sample tokens {tmp_path / name} --seed {seed}", capsys)[0] == 0
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c


def test_a_sample_replaces_a_sample_on_request_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    call(f"sample tokens {folder}", capsys)
    code, _, err = call(f"sample tokens {folder}", capsys)
    assert code == 2
    assert "is not empty; choose another folder or add --overwrite" in err
    assert call(f"sample tokens {folder} --overwrite", capsys)[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    code, _, err = call(f"sample tokens {tmp_path / 'mine'} --overwrite", capsys)
    assert code == 2
    assert "holds files that are no sample" in err
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_sample_that_fails_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, out: Path, *, seed: int) -> None:
        (out / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(APP.recipe("tokens")), "sample", fail)
    code, out, err = call(f"sample tokens {tmp_path / 'data'}", capsys)
    assert (code, out) == (2, "")
    assert "cannot write: the disk is full; free some space" in err
    assert list(tmp_path.iterdir()) == []


def test_config_of_one_system_is_refused_by_another(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(yaml.safe_dump({"system": "msga"}))
    with pytest.raises(ValueError, match="is a configuration of 'msga', not of 'tokens'"):
        settings_of(f"tokens --config {tmp_path / 'f.yaml'}")


def test_an_app_finds_recipes_by_class_or_instance_and_only_those_it_knows() -> None:
    assert APP.recipe("tokens").card.name == "tokens"
    other = App(name="heed-y", about="", systems={"t": "heed_runtime.testing:APP"})
    assert other.recipe("t") is APP
    with pytest.raises(UsageError, match="heed-y has no system 'u'"):
        other.recipe("u")


def test_help_of_a_verb_by_either_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("help sample", capsys) == call("sample --help", capsys)


def test_help_breaks_lines_where_the_terminal_does_and_not_where_the_source_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call("train tokens --help", capsys)
    assert "(0.99 to 0.9999)" in out


def test_a_path_at_home_after_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = call("train tokens --data=~/none --out=~/run", capsys)
    assert code == 2
    assert f"{tmp_path}/none: no such file or folder" in err


@pytest.mark.parametrize(
    ("line", "redirected", "exit_code", "err"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", "", 143, "heed-example: stopped\n"),
        ("sys.stdout.write('news')", ">&-", 0, ""),
        ("sys.stderr.write('fault')", "2>&-", 0, ""),
    ],
)
def test_main_is_ended_in_order_and_lives_without_streams(
    line: str, redirected: str, exit_code: int, err: str
) -> None:
    code = (
        "import os, signal, sys; from heed_runtime.app import App; "
        f"App._run = lambda app, argv: ({line}, 0)[1]; "
        "App(name='heed-example', about='', systems={}).main([])"
    )
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {redirected}', sys.executable, code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (exit_code, err)


def test_main_leaves_with_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        APP.main(["nothing"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("heed-example: error: ")
