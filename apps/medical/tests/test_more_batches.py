"""Which studies MoRE puts into a batch: one of a subject, unless that is not wanted."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_medical_cli import APP
from heed_medical_cli.more import RECIPE, MoreRecipe, MoreSettings, small
from heed_medical_cli.more_findings import RECIPE as FINDINGS
from heed_medical_cli.more_findings import MoreFindingsRecipe
from heed_runtime.data import Data
from heed_runtime.settings import TrainerSettings
from heed_runtime.testing.contract import refusal

SUBJECTS = ("a", "a", "a", "b", "b", "b", "c", "c", "d", "", "", "")
"""Of the training studies; empty: not named."""


def write(root: Path, subjects: tuple[str, ...]) -> Path:
    """X-rays with notes."""
    rng = np.random.default_rng(0)
    rows = ["file,text,patient,split"]
    for number, subject in enumerate((*subjects, "v", "t")):
        name, split = f"{number}.png", {"v": "val", "t": "test"}.get(subject, "train")
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(root / name)
        rows.append(f"{name},Note {number}.,{subject},{split}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


def settings(root: Path, *, one_per_subject: bool = True, batch: int = 4) -> MoreSettings:
    start = small()
    training = replace(start.training, one_per_subject=one_per_subject)
    trainer = TrainerSettings(batch=batch)
    return RECIPE.plan(replace(start, training=training, trainer=trainer), root)


def listed(root: Path, *rows: str) -> None:
    """Write more rows under those of `write`."""
    table = root / "labels.csv"
    table.write_text(table.read_text() + "\n".join(rows) + "\n")


@pytest.mark.parametrize("recipe", [RECIPE, FINDINGS])
def test_rows_that_are_left_out_are_listed(recipe: MoreRecipe | MoreFindingsRecipe, tmp_path: Path):
    root = write(tmp_path, SUBJECTS)
    table = root / "labels.csv"
    head, *rows = table.read_text().splitlines()
    known = [f"{row},{number % 2}" for number, row in enumerate(rows)]
    table.write_text("\n".join([f"{head},Edema", *known]) + "\n")
    listed(root, "0.png,Note.,e,train,2", ",,e,train,0", "0.png,Note.,e,holdout,0")
    preset = recipe.presets["small"]()
    start = replace(preset, data=replace(preset.data, on_error="skip"))
    planned = recipe.plan(start, root)
    parts = ("Edema", "no X-ray", "holdout")
    for data in (recipe.train_data(planned, root), recipe.cases(planned, root, "val")):
        assert len(data.skipped) == 3
        assert all(part in line for part, line in zip(parts, data.skipped, strict=True))
    assert len(recipe.inputs(planned, [root]).skipped) == 2
    with pytest.raises(InputError, match="row 16: has Edema = '2'"):
        recipe.plan(preset, root)


def subjects_of_batches(config: MoreSettings, root: Path) -> list[list[int]]:
    """A number per subject, -1 of one that is not named, by batch; of three epochs."""
    loader = Data(RECIPE, config, root=root).train_dataloader()
    found = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        found += [batch.groups[0].tolist() for batch in loader]
    return found


def repeated(batches: list[list[int]]) -> int:
    """Batches that hold a named subject twice."""
    named = [[number for number in batch if number >= 0] for batch in batches]
    return sum(len(set(batch)) < len(batch) for batch in named)


def test_a_batch_holds_one_study_of_a_subject(tmp_path: Path):
    root = write(tmp_path, SUBJECTS)
    batches = subjects_of_batches(settings(root), root)
    assert len(batches) == 9
    assert repeated(batches) == 0
    assert sum(number < 0 for batch in batches for number in batch) == 9  # each is alone
    assert repeated(subjects_of_batches(settings(root, one_per_subject=False), root)) > 0


def test_a_batch_is_no_larger_than_there_are_subjects(tmp_path: Path, caplog):
    root = write(tmp_path, ("a", "a", "a", "b", "b"))
    batches = subjects_of_batches(settings(root, batch=8), root)
    assert {len(batch) for batch in batches} == {2}
    assert repeated(batches) == 0
    assert "2 groups of training samples that share no batch, fewer than batch=8" in caplog.text


def test_one_subject_alone_is_refused_and_can_be_allowed(tmp_path: Path):
    root = write(tmp_path, ("a", "a", "a", "a"))
    with pytest.raises(InputError, match=r"one subject alone.*no-one-per-subject"):
        RECIPE.train_data(settings(root), root)
    assert len(subjects_of_batches(settings(root, one_per_subject=False), root)) == 3


@pytest.mark.parametrize("system", ["more", "more-findings"])
def test_a_batch_of_one_has_no_spread_and_is_refused(system: str, tmp_path: Path):
    root = write(tmp_path, SUBJECTS)
    words = ("train", system, "--data", root, "--out", tmp_path / "run")
    assert "trainer.batch must be at least 2, got 1" in refusal(APP, *words, "--trainer.batch", 1)


@pytest.mark.slow
def test_a_batch_of_two_may_be_shared_by_two_processes(tmp_path: Path):
    """Each has one row; batch normalisation sees both."""
    root = write(tmp_path, SUBJECTS)
    words = ("train", "more", "--data", root, "--out", tmp_path / "run", "--device", "cpu")
    tiny = ("--model.tower.depth", 1, "--model.text.depth", 1, "--trainer.max-steps", 2)
    start = Path(sys.executable).with_name("heed-medical")
    shared = ("--trainer.batch", 2, "--trainer.devices", 2)
    command = [str(start), *map(str, (*words, *tiny, *shared))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "metrics.csv").open() as stream:
        losses = [float(row["train/loss"]) for row in csv.DictReader(stream)]
    assert np.isfinite(losses).all()
    assert max(losses) > 0
