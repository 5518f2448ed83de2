"""Every verb of every system of every app, on its own sample: the contract that all keep."""

import importlib
import io
import json
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from heed_runtime.app import App
from heed_runtime.testing.contract import check_recipe

ROOT = Path(__file__).parents[1]
PICTURES = (
    *("--data.size", "64", "64", "--data.body-size", "32", "32"),
    *("--model.body-widths", "4", "8", "--model.hidden", "8"),
)
VOXELS = ("--model.width", "4", "--model.grid.shape", "60", "45", "8")
SMALL = {
    "oat": (
        *("--model.encoder-depth", "1", "--model.decoder-depth", "1"),
        *("--data.samples", "2"),
    ),
    "medusa": PICTURES,
    "medusa-findings": PICTURES,
    "medusa-body": ("--data.size", "32", "32", "--model.widths", "4", "8"),
    "ivgn": ("--model.dim", "16", "--model.hidden", "16", "--data.beam", "2"),
    "more": ("--model.tower.depth", "1", "--model.text.depth", "1"),
    "more-findings": ("--model.more.tower.depth", "1", "--model.inputs", "xray"),
    "msga": ("--model.width", "8", "--model.scales", "1", "2"),
    "curbnet": VOXELS,
    "curbnet-released": VOXELS,
    "cylinder3d": VOXELS,
    "eccnet": (
        *("--model.widths", "2", "2", "3", "3", "4", "--model.picture", "32"),
        *("--data.tasks", "lightning_dir/top", "--data.most-trials", "1"),
    ),
    "conditioning": (
        *("--data.rules", "delta", "hebb", "--data.capacity-widths", "16"),
        *("--data.capacity-repeats", "1", "--training.validation-episodes", "4"),
    ),
    "classical": ("--training.lowest-steps-m", "0.04", "--training.height-stds-m", "0.02"),
    "icl": (
        *("--data.epoch-sequences", "64", "--data.val-sequences", "64"),
        *("--data.test-sequences", "64", "--data.lengths", "10"),
    ),
}
"""Flags that make a system small enough to run all its verbs in a minute."""
STREET = "sequences/11/velodyne/000000.bin"
PART = {
    "oat": "images/shelf-00.png",
    "curbnet": STREET,
    "curbnet-released": STREET,
    "cylinder3d": STREET,
    "classical": STREET,
    "msga": "imagesTs/phantom_13_0000.nii.gz",
    "acmil": "h5_files/slide_000.h5",
    "conditioning": "03-blocking.yaml",
    "ivgn": "images/test0000",
    "medusa": "test/chest_0000.png",
    "medusa-findings": "valid/patient10000",
    "more": "images/test000.png",
    "more-findings": "images/test000.png",
}
"""What of a large sample is predicted and explained."""
LIKE_ANOTHER = {"curbnet-released"}
"""Systems whose recipe is that of another but for the settings: slow tests."""
LONG_EXPORTS = {"msga", "cylinder3d"}
"""Systems whose graphs torch takes a minute to make and to read; their export is a slow test."""


def apps() -> list[App]:
    scripts = [
        target.split(":")[0]
        for path in sorted(ROOT.glob("apps/*/pyproject.toml"))
        for target in tomllib.loads(path.read_text())["project"]["scripts"].values()
    ]
    return [importlib.import_module(module).APP for module in scripts]


SYSTEMS = [(app, system) for app in apps() for system in app.systems]


def call(app: App, *words: str | Path) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = app.call([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("app", "system", "export"),
    [
        pytest.param(
            *(app, system, export),
            id=f"{app.name}-{system}{'-exported' if system in LONG_EXPORTS and export else ''}",
            marks=[pytest.mark.slow]
            if system in LIKE_ANOTHER or (system in LONG_EXPORTS and export)
            else [],
        )
        for app, system in SYSTEMS
        for export in ([False, True] if system in LONG_EXPORTS else [True])
    ],
)
def test_every_verb_works_on_the_sample(app: App, system: str, export: bool, tmp_path: Path):
    flags, part = SMALL.get(system, ()), PART.get(system, ".")
    check_recipe(app, system, tmp_path, flags=flags, part=part, export=export)


@pytest.mark.parametrize("app", apps(), ids=lambda app: app.name)
def test_help_imports_nothing_heavy(app: App):
    package = importlib.import_module(type(app).__module__).__package__
    assert package == "heed_runtime"
    module = f"{app.name.replace('-', '_')}_cli"
    script = (
        f"import sys, {module} as app; app.APP.call(['--help']); "
        "print(sorted({'torch', 'lightning', 'tyro', 'numpy', 'monai'} & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "train" in finished.stdout
    assert finished.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("app", apps(), ids=lambda app: app.name)
def test_list_is_one_json_document(app: App):
    code, out, _ = call(app, "list", "--json")
    assert code == 0
    assert {row["system"] for row in json.loads(out)["systems"]} == set(app.systems)


@pytest.mark.parametrize(
    ("app", "system"), SYSTEMS, ids=[f"{app.name}-{system}" for app, system in SYSTEMS]
)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "SYSTEM", "no/such/folder"], "no/such/folder"),
        (["train", "SYSTEM", "--data", "no/such/folder", "--out", "run"], "no/such/folder"),
        (["train", "SYSTEM", "--trainer.max-epoch", "3"], "--trainer.max-epochs"),
        (["evaluate", "no/such/run"], "no/such/run"),
        (["trian", "SYSTEM"], "train"),
    ],
)
def test_a_fault_of_the_user_is_one_line_and_exit_code_2(
    app: App,
    system: str,
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(app, *[system if word == "SYSTEM" else word for word in words])
    assert code == 2
    assert out == ""
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
