"""Two processes on the CPU do what one does."""

import filecmp
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from heed_core.testing.processes import run_together
from heed_runtime.distributed import CpuLayerSync, SyncBatchNorm
from heed_runtime.outputs import JOURNAL
from heed_runtime.testing import APP
from heed_runtime.testing.processes import start_ranks, wait

TOLERANCE = 2e-5
"""Largest difference of a weight after training: sums are rounded in another order."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "tokens"
    assert APP.call(["sample", "tokens", str(root), "--quiet"]) == 0
    return root


def words(data, out):
    return [
        *("train", "tokens", "--quiet", "--preset", "batch-norm", "--data", str(data)),
        *("--out", str(out), "--trainer.max-epochs", "2", "--trainer.batch", "8"),
        *("--training.optimizer", "sgd", "--training.lr", "0.1"),
    ]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    assert APP.call(words(data, run)) == 0
    return run


def ranks(argv, log, code=0):
    children = start_ranks(APP, argv, ranks=2, log=log)
    codes = [wait(child) for child in children]
    logs = "".join(path.read_text() for path in sorted(log.parent.glob(f"{log.stem}.*")))
    assert codes == [code, 0], logs
    return logs


def assert_close_runs(one, two):
    for key, value in load_file(one / "model" / "model.safetensors").items():
        other = load_file(two / "model" / "model.safetensors")[key]
        torch.testing.assert_close(other, value, atol=TOLERANCE, rtol=0, msg=key)
    metrics = [json.loads((run / "metrics.json").read_text())["metrics"] for run in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-4)


def test_two_processes_train_to_the_weights_of_one(alone, data, tmp_path):
    """Batch normalisation, shuffling, augmentation, uneven validation (7 cases)."""
    ranks(words(data, tmp_path / "run"), tmp_path / "log.txt")
    assert_close_runs(alone, tmp_path / "run")


def test_two_processes_write_the_files_of_one(alone, data, tmp_path):
    predict = ["predict", str(alone), str(data / "val"), "--quiet", "--device", "cpu", "--out"]
    assert APP.call([*predict, str(tmp_path / "one")]) == 0
    logs = ranks([*predict, str(tmp_path / "two"), "--json"], tmp_path / "log.txt")
    names = sorted(path.name for path in (tmp_path / "one").glob("[!.]*"))
    assert len(names) == 7
    assert sorted(path.name for path in (tmp_path / "two").glob("[!.]*")) == names
    journals = [(tmp_path / out / JOURNAL).read_text().splitlines() for out in ("one", "two")]
    assert sorted(journals[0]) == sorted(journals[1])
    same, *_ = filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)
    texts = [(tmp_path / out / names[0]).read_text() for out in ("one", "two")]
    assert texts[0] == texts[1]
    assert sorted(same) == names
    shown = json.loads(logs[logs.index("{") :])
    assert [row["case"] for row in shown["predictions"]] == [name[:-4] for name in names]


def test_a_fault_of_one_process_ends_all_with_one_line(alone, data, tmp_path):
    import shutil

    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "test" / "001.csv").write_text("no,numbers,at,all\n")  # the second process's first
    argv = ["evaluate", str(alone), "--data", str(broken), "--quiet", "--device", "cpu"]
    logs = ranks(argv, tmp_path / "log.txt", code=2)
    assert logs.count("001.csv") == 1
    for path in (broken / "train").iterdir():
        path.write_text("no,numbers,at,all\n")
    logs = ranks(words(broken, tmp_path / "run"), tmp_path / "second.txt", code=2)
    assert logs.count("is not a table of numbers") == 1


@pytest.mark.slow
def test_lightning_and_torchrun_start_the_processes(alone, data, tmp_path):
    run = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    module = ["-m", "heed_runtime.testing"]
    command = [sys.executable, *module, *words(data, run), "--trainer.devices", "2"]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    assert_close_runs(alone, run)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, *module, *words(data, tmp_path / "second")]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    assert_close_runs(alone, tmp_path / "second")


def halves_normalised(world):
    """Each process normalises its part of a batch as one process does the whole."""
    part = slice(0, 2) if dist.get_rank() == 0 else slice(2, 6)
    for axes, momentum in itertools.product([(), (5,), (3, 4)], [0.1, None]):
        torch.manual_seed(0)
        x = torch.randn(6, 4, *axes, dtype=torch.float64) * 3 + 1
        seed = torch.randn_like(x)
        kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[len(axes)]
        whole = kind(4, momentum=momentum).double()
        whole.weight.data.uniform_()
        layer = kind(4, momentum=momentum).double()
        layer.load_state_dict(whole.state_dict())
        CpuLayerSync().apply(layer)
        assert type(layer) is SyncBatchNorm
        own, reference = x[part].clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = layer(own), whole(reference)
        torch.testing.assert_close(y, expected[part])
        y.backward(seed[part])
        expected.backward(seed)
        torch.testing.assert_close(own.grad, reference.grad[part])
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value)
        CpuLayerSync().revert(layer)
        assert type(layer) is kind


def test_synchronised_batch_norm_equals_torch():
    run_together(2, halves_normalised)
