"""Fine-tuning on CheXpert labels: what uncertain findings count as, and studies without any."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_medical_cli import APP
from heed_medical_cli.more_findings import RECIPE, TuningSettings, paper, small
from heed_runtime.testing.contract import call, refusal

CELLS = ("1,0", "0,1", "-1,1", "0,-1", ",", "1,")
"""Edema and Cardiomegaly of six training studies."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    grey = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    cells = [*(("train", c) for c in CELLS), ("val", "1,0"), ("val", "-1,1"), ("test", "0,1")]
    rows = [f"{n},a.png,{split},{labels}" for n, (split, labels) in enumerate(cells)]
    head = "name,xray_path,split,Edema,Cardiomegaly"
    (tmp_path / "manifest.csv").write_text("\n".join([head, *rows]) + "\n")
    return tmp_path


def labels(root: Path, settings: TuningSettings) -> list[list[float]]:
    """Of the training studies, as the loss sees them; in the order of CheXpert."""
    planned = RECIPE.plan(settings, root)
    assert planned.data.labels == ("Cardiomegaly", "Edema")
    data = RECIPE.train_data(planned, root)
    found = RECIPE.collate([data[number] for number in range(len(data))])["findings"]
    return found.tolist()


NAN = float("nan")


@pytest.mark.parametrize(
    ("uncertain", "third", "fourth"),
    [
        ("leave-out", [1, NAN], [NAN, 0]),
        ("positive", [1, 1], [1, 0]),
        ("negative", [1, 0], [0, 0]),
        ("mixed", [1, 1], [0, 0]),
    ],
)
def test_uncertain_findings_are_learnt_as_the_settings_say(
    root: Path, uncertain: str, third: list[float], fourth: list[float]
):
    start = small()
    data = replace(start.data, uncertain=uncertain)  # type: ignore[arg-type]
    found = labels(root, replace(start, data=data))
    wanted = [[0, 1], [1, 0], third, fourth, [0, 0], [0, 1]]
    np.testing.assert_array_equal(found, wanted)


def test_studies_with_an_uncertain_finding_are_left_out_as_published(root: Path):
    assert paper().training.certain_only
    start = small()
    certain = replace(start, training=replace(start.training, certain_only=True))
    assert labels(root, certain) == [[0, 1], [1, 0], [0, 0], [0, 1]]
    planned = RECIPE.plan(certain, root)
    assert RECIPE.cases(planned, root, "val").names == ["6"]
    asked = replace(certain, data=replace(certain.data, labels=("Cardiomegaly",)))
    assert RECIPE.train_data(RECIPE.plan(asked, root), root).names == ["0", "1", "2", "4", "5"]
    path = root / "manifest.csv"
    path.write_text(path.read_text().replace("val,1,0", "val,-1,0"))
    with pytest.raises(InputError, match="no study of the split 'val' without an uncertain"):
        RECIPE.cases(planned, root, "val")
    path.write_text(path.read_text().replace("train,0,1", "train,-1,1"))
    with pytest.raises(InputError, match="no training study with and without Cardiomegaly"):
        RECIPE.plan(certain, root)


def test_a_policy_without_effect_is_refused(root: Path):
    words = ("train", "more-findings", "--data", root, "--out", root / "run")
    line = refusal(APP, *words, "--training.certain-only", "--data.uncertain", "mixed")
    assert "uncertain has no effect" in line
    assert "mixed" in refusal(APP, *words, "--data.uncertain", "maybe")


def test_the_command_counts_by_the_policy(root: Path):
    counts = call(APP, "check", "more-findings", root, "--data.uncertain", "mixed")["counts"]
    assert (counts[0]["Edema"], counts[0]["Cardiomegaly"]) == (3, 2)
    words = ("--data.uncertain", "mixed", "--trainer.max-steps", 2, "--device", "cpu")
    call(APP, "train", "more-findings", "--data", root, "--out", root / "run", *words)
    found = call(APP, "evaluate", root / "run", "--split", "val", "--device", "cpu")
    assert found["metrics"]["cases"] == 2
