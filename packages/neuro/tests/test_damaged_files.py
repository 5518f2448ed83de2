"""Files with wrong bytes in them: every reader reads one or says in one line that it cannot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heed_core.errors import InputError
from heed_core.testing.damage import check_readers
from heed_neuro.brain_encoder.arrays import read_array, read_mapping
from heed_neuro.brain_encoder.backbones import read_image
from heed_neuro.brain_encoder.subject import read_ceiling, read_rois
from heed_neuro.conditioning.designs import read_design
from heed_neuro.haxby import read_blocks
from heed_neuro.icl.files import read_sequences, read_task, write_task
from heed_neuro.icl.tasks import LinearTask

DESIGN = """\
title: blocking
groups:
  blocked: [10 A+, 10 AB+]
  control: [10 AB+]
salience: {A: 0.4, B: 0.5}
us: {magnitude: 1.0}
"""


def test_arrays_of_a_subject(tmp_path: Path):
    np.save(tmp_path / "responses.npy", np.ones((6, 9), np.float32))
    np.save(tmp_path / "ceiling.npy", np.linspace(0, 1, 9))
    check_readers(tmp_path / "responses.npy", [lambda p: read_array(p, axes=("images", "v"))])
    check_readers(tmp_path / "ceiling.npy", [lambda p: read_ceiling(p, 9)])


def test_pickled_names(tmp_path: Path):
    np.save(tmp_path / "mapping.npy", np.array({0: "Unknown", 2: "V1v"}), allow_pickle=True)
    for seed in range(4):
        check_readers(tmp_path / "mapping.npy", [read_mapping], seed=seed)


def test_regions(tmp_path: Path):
    path = tmp_path / "rois.json"
    path.write_text('{"all": {"faces": [0, 1, 2], "places": [3, 4]}}')
    for seed in range(4):
        check_readers(path, [lambda p: read_rois(p, {"all": 6})], seed=seed)


def test_designs(tmp_path: Path):
    (tmp_path / "blocking.yaml").write_text(DESIGN)
    for seed in range(6):
        check_readers(tmp_path / "blocking.yaml", [read_design], seed=seed)


@pytest.mark.parametrize("text", ["[" * 5000, "us: !!int x", "dim: !!bool x", "a: &a [*a]"])
@pytest.mark.parametrize("read", [read_design, read_task])
def test_odd_yaml(tmp_path: Path, read: Callable[[Path], object], text: str):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match=r"a\.yaml"):
        read(tmp_path / "a.yaml")


def test_tasks_and_sequences(tmp_path: Path):
    write_task(LinearTask(), tmp_path / "task.yaml")
    (tmp_path / "a.csv").write_text("x1,x2,y\n1,2,3\n2,1,3\n0.5,0,\n")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=rng.normal(size=(2, 5, 3)), y=rng.normal(size=(2, 5)),
             query=rng.normal(size=(2, 3)))  # fmt: skip
    for seed in range(6):
        check_readers(tmp_path / "task.yaml", [read_task], seed=seed)
        check_readers(tmp_path / "a.csv", [read_sequences], seed=seed)
        check_readers(tmp_path / "a.npz", [read_sequences], seed=seed)


def test_blocks(tmp_path: Path):
    labels, runs = np.array(["face", "house"] * 4), np.repeat([1, 2], 4)
    bold = np.random.default_rng(0).normal(size=(8, 5))
    np.savez(tmp_path / "a.npz", bold=bold, label=labels, run=runs)
    for seed in range(3):
        check_readers(tmp_path / "a.npz", [read_blocks], seed=seed)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_images(tmp_path: Path, name: str):
    Image.fromarray(torch.randint(0, 255, (20, 20, 3), dtype=torch.uint8).numpy()).save(
        tmp_path / name
    )
    check_readers(tmp_path / name, [read_image])
