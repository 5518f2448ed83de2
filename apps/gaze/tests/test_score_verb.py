"""The verb `score`: the paper's released results, people's times, and faults."""

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from heed_gaze.eccnet.experiments import EXPERIMENTS
from heed_gaze_cli import APP
from heed_runtime.testing.contract import call

STORED = Path(os.environ.get("HEED_GOLDEN", Path(__file__).parents[4] / "shared" / "golden"))


def fault(*words: object) -> str:
    err = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(err):
        code = APP.call([str(word) for word in words])
    (line,) = [line for line in err.getvalue().splitlines() if "error:" in line]
    assert code == 2, err.getvalue()
    return line


@pytest.mark.parametrize("model", ["eccNET", "IVSN", "chance"])
def test_released_results_have_the_published_indices(tmp_path: Path, model: str):
    path = STORED / "eccnet" / "fixture.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path}: set HEED_GOLDEN to the folder of stored numbers")
    wanted = json.loads((path.parent / "meta.json").read_text())["scoring"][model]
    arrays = load_file(path)
    for experiment in EXPERIMENTS:
        for task in experiment.tasks:
            key = f"exp{experiment.number}_{'_'.join(task.name.split('/')[1:])}"
            found = arrays[f"input.scoring.{model}.{key}"]
            table = np.zeros((len(found), experiment.grid**2 + 1), np.uint8)
            table[np.flatnonzero(found >= 0), found[found >= 0]] = 1
            (tmp_path / task.name).parent.mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / f"{task.name}.npy", table)
    scored = call(APP, "score", tmp_path, "--out", tmp_path / "out")
    indices = [row["index"] for row in scored["tables"]["asymmetry"]]
    np.testing.assert_allclose(indices, wanted["asymmetry_index"], atol=1e-9)
    assert scored["metrics"]["asymmetry_index"] == pytest.approx(wanted["mean"], abs=1e-9)
    assert (tmp_path / "out" / "slopes.png").stat().st_size > 1000


def test_peoples_times_give_peoples_indices(tmp_path: Path):
    lines = ["task,set_size,rt_ms"]
    for experiment in EXPERIMENTS:
        for task in experiment.tasks:
            for size in experiment.set_sizes:
                lines.append(f"{task.name},{size},{500 + task.human_slope_ms * size}")
    (tmp_path / "people.csv").write_text("\n".join(lines) + "\n")
    scored = call(APP, "score", tmp_path / "people.csv")
    assert scored["metrics"]["asymmetry_index"] == pytest.approx(0.564, abs=0.0005)
    assert scored["metrics"]["asymmetry_index_human"] == pytest.approx(0.564, abs=0.0005)
    assert "mean_saccades" not in scored["tables"]["tasks"][0]
    assert "no effect" in fault("score", tmp_path / "people.csv", "--ms-per-saccade", "200")


def test_another_line_from_saccades_to_times(tmp_path: Path):
    task = EXPERIMENTS[0].tasks[0].name
    rows = [f"{task},{size},{saccades}" for size, saccades in ((8, 1), (16, 2), (32, 4))]
    (tmp_path / "r.csv").write_text("\n".join(["task,set_size,saccades", *rows]) + "\n")
    scored = call(
        APP, "score", tmp_path / "r.csv", "--ms-per-saccade", "200", "--ms-at-rest", "300"
    )
    times = [row["mean_rt_ms"] for row in scored["tables"]["tasks"]]
    assert times == [500, 700, 1100]
    assert [row["chance"] for row in scored["tables"]["tasks"]] == [18.5] * 3  # of 36 cells
    assert scored["metrics"] == {}  # one task has no index


def test_faults_are_one_line(tmp_path: Path):
    assert "no such file" in fault("score", tmp_path / "none.csv")
    (tmp_path / "r.csv").write_text("task,set_size,rt_ms\na,4,nan\n")
    assert "r.csv, row 2" in fault("score", tmp_path / "r.csv")
    assert "experiment 2" in fault(
        "stimuli", "--out", tmp_path / "s", "--experiments", "1", "--legacy"
    )
