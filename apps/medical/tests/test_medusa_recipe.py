"""The recipes of MEDUSA and its body: every verb, what they settle, calibrate, draw and refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from heed_core.errors import InputError
from heed_medical.classification.metrics import roc_auc
from heed_medical.medusa import Medusa, MedusaConfig
from heed_medical.medusa.inputs import MedusaCase, MedusaData, to_batch
from heed_medical.medusa.lungs import LungPicture, vary_lungs
from heed_medical.medusa.phantoms import write_chests, write_lungs
from heed_medical.pictures.augmentation import PictureAugmentation
from heed_medical.pictures.reading import resize_grey
from heed_medical_cli import APP
from heed_medical_cli.medusa import (
    RECIPE,
    MedusaModule,
    MedusaPrediction,
    MedusaSettings,
    MedusaTraining,
    predictions_of,
)
from heed_runtime.data import Data
from heed_runtime.draws import Batches, Draws
from heed_runtime.testing.contract import call, refusal, spoken

TINY = (
    *("--data.size", "64", "64", "--data.body-size", "32", "32"),
    *("--model.body-widths", "4", "8", "--model.hidden", "8"),
)
TINY_BODY = ("--data.size", "32", "32", "--model.widths", "4", "8")
SETTINGS = MedusaSettings(
    model=MedusaConfig(backbone="resnet18", body_widths=(4, 8), hidden=8),
    data=MedusaData(size=(64, 64), body_size=(32, 32), classes=("negative", "positive")),
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:monai")


def train(data: Path, run: Path, *flags: str) -> None:
    words = ("train", "medusa", "--data", data, "--out", run, "--device", "cpu", "--quiet")
    code, _, err = spoken(APP, *words, *TINY, "--trainer.batch", "4", *flags)
    assert code == 0, err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chests, lungs, and a run of two steps on the chests."""
    root = tmp_path_factory.mktemp("made")
    write_chests(root / "chests", train=24, test=6, side=64)
    write_lungs(root / "lungs", pictures=12, side=48)
    train(root / "chests", root / "run", "--trainer.max-steps", "2")
    return root


@pytest.fixture
def chests(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "chests", tmp_path / "data"))


def test_the_data_settle_the_classes(made: Path):
    settings = replace(SETTINGS, data=replace(SETTINGS.data, classes=()))
    planned = RECIPE.plan(settings, made / "chests")
    assert planned.data.classes == ("negative", "positive")
    assert planned.model.classes == 2
    weighted = replace(planned, training=MedusaTraining(class_weights=(1.0, 2.0, 3.0)))
    with pytest.raises(InputError, match="class-weights has 3 values for the 2 classes"):
        RECIPE.plan(weighted, made / "chests")


def test_evaluation_writes_scores_tables_and_curves(made: Path):
    code, out, err = spoken(APP, "evaluate", made / "run", "--device", "cpu", "--json", "--quiet")
    assert code == 0, err
    found = json.loads(out)
    assert set(found["metrics"]) >= {"accuracy", "auc_low", "auc_high", "brier", "ece", "patients"}
    assert found["metrics"]["cases"] == 6
    assert found["metrics"]["patients"] == 3
    table = found["tables"]["accuracy per source"]
    assert {row["source"] for row in table} == {"clinic-a", "clinic-b"}
    names = {path.name for path in (made / "run/evaluation/test").iterdir()}
    assert names >= {"roc.png", "precision-recall.png", "calibration.png", "confusion.png"}


def test_the_threshold_of_the_validation_is_kept_and_can_be_chosen(made: Path, tmp_path: Path):
    weights = load_file(made / "run/model/model.safetensors")
    kept = float(weights["threshold"])
    assert 0 < kept <= 1
    picture = next((made / "chests/test").glob("*.png"))
    found = {}
    for name, flags in {
        "plain": (),
        "calibrated": ("--data.decision", "calibrated"),
        "low": ("--data.threshold", "1e-6"),
        "high": ("--data.threshold", "0.999999"),
    }.items():
        words = ("predict", made / "run", picture, "--out", tmp_path / name, "--device", "cpu")
        code, _, err = spoken(APP, *words, *flags)
        assert code == 0, err
        found[name] = json.loads(next((tmp_path / name).glob("*.json")).read_text())
    assert found["plain"]["threshold"] is None
    assert found["calibrated"]["threshold"] == pytest.approx(kept, abs=1e-6)
    assert (found["low"]["class"], found["high"]["class"]) == ("positive", "negative")
    chances = found["plain"]["probabilities"]
    assert sum(chances.values()) == pytest.approx(1)
    assert found["plain"]["class"] == max(chances, key=chances.get)


def test_validation_settles_the_threshold_that_separates_best(monkeypatch: pytest.MonkeyPatch):
    module = RECIPE.module(SETTINGS, Medusa(SETTINGS.model)).eval()
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.__setitem__(name, value))
    module._seen = [((0.9, 0.1), 0), ((0.8, 0.2), 0), ((0.7, 0.3), 1), ((0.6, 0.4), 1)]
    module.on_validation_epoch_end()
    odds = (0.2 / 0.8 * 0.3 / 0.7) ** 0.5  # in the middle of the log-odds
    assert float(module.model.threshold) == pytest.approx(odds / (1 + odds))
    assert logged["val/auc"] == 1.0
    assert logged["val/balanced_accuracy"] == 0.5
    assert module._seen == []


@pytest.mark.parametrize(("epoch", "resting"), [(0, "backbone"), (1, "backbone"), (2, "gates")])
def test_parts_rest_in_turn(epoch: int, resting: str, monkeypatch: pytest.MonkeyPatch):
    settings = replace(SETTINGS, training=MedusaTraining(alternate=2))
    module = RECIPE.module(settings, RECIPE.model(settings))
    monkeypatch.setattr(MedusaModule, "current_epoch", epoch)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.on_before_optimizer_step(torch.optim.SGD(module.parameters(), lr=1.0))
    still = {name.split(".")[1] for name, p in module.named_parameters() if p.grad is None}
    assert still == ({"backbone"} if resting == "backbone" else {"body", "gates"})


def test_a_body_trained_on_lungs_starts_a_medusa(made: Path, tmp_path: Path):
    words = ("train", "medusa-body", "--data", made / "lungs", "--out", tmp_path / "body")
    flags = ("--trainer.max-steps", "1", "--trainer.batch", "2", "--device", "cpu", "--quiet")
    code, _, err = spoken(APP, *words, *TINY_BODY, *flags)
    assert code == 0, err
    weights = tmp_path / "body/model/model.safetensors"
    settings = replace(SETTINGS, training=MedusaTraining(body_weights=weights))
    model = RECIPE.model(settings)
    RECIPE.start(settings, tmp_path, model)
    assert model.body is not None
    wanted = load_file(weights)
    assert torch.equal(model.body.first[0].weight, wanted["first.0.weight"])
    wider = replace(settings, model=replace(settings.model, body_widths=(8, 16)))
    with pytest.raises(InputError, match="not those of this network"):
        RECIPE.start(wider, tmp_path, RECIPE.model(wider))


def test_balanced_training_runs_and_is_even(made: Path, tmp_path: Path):
    settings = replace(SETTINGS, data=replace(SETTINGS.data, balance="positive"))
    data = RECIPE.train_data(settings, made / "chests")
    augment = RECIPE.augment(settings)
    batch = RECIPE.collate([augment(data[i], np.random.default_rng(i)) for i in range(4)])
    assert batch["label"].tolist() == [0, 1] * 4
    train(
        made / "chests", tmp_path / "run", "--data.balance", "classes", "--trainer.max-steps", "1"
    )


def test_a_batch_of_positive_balance_holds_no_picture_twice(tmp_path: Path):
    write_chests(tmp_path, train=80, test=2, side=32)
    path = tmp_path / "train_COVIDx_phantom.txt"
    rows = path.read_text().splitlines()
    few = [row for row in rows if "positive" in row][:6]
    path.write_text("\n".join([row for row in rows if "negative" in row] + few) + "\n")
    settings = replace(SETTINGS, data=replace(SETTINGS.data, balance="positive", val_share=0.02))
    data = RECIPE.train_data(settings, tmp_path)
    draws = Draws(len(data), batch=4, seed=0, rank=0, world=1, apart=data.apart)
    negatives = sum(file.label == "negative" for file in data.files)
    assert draws.steps == -(-negatives // 8)
    for batch in Batches(draws):
        lots = [lot for draw in batch for lot in data[draw.item]]
        names = [file.name for lot in lots for file in lot.files]
        assert len(names) == len(set(names))
        assert [lot.files[0].label for lot in lots] == ["negative", "positive"] * 4


def test_batches_shrink_to_the_positives_and_stay_even(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_chests(tmp_path, train=40, test=2, side=32)
    path = tmp_path / "train_COVIDx_phantom.txt"
    rows = path.read_text().splitlines()
    few = [row for row in rows if "positive" in row][:4]  # one is for validation
    path.write_text("\n".join([row for row in rows if "negative" in row] + few) + "\n")
    data = replace(SETTINGS.data, balance="positive", val_share=0.02)
    trainer = replace(SETTINGS.trainer, batch=5)
    settings = replace(SETTINGS, data=data, trainer=trainer)
    found = [
        batch["label"].tolist()
        for batch in Data(RECIPE, settings, root=tmp_path).train_dataloader()
    ]
    assert len(found) > 1
    assert all(labels == [0, 1] * 3 for labels in found)
    assert "3 groups of training samples that share no batch, fewer than batch=5" in caplog.text


def test_attention_none_has_no_maps_but_evidence(made: Path):
    settings = replace(SETTINGS, model=replace(SETTINGS.model, attention="none"))
    module = RECIPE.module(settings, RECIPE.model(settings)).eval()
    case = RECIPE.cases(settings, made / "chests", "test")[0]
    shown = RECIPE.explain(settings, module, case)
    assert "evidence" in shown.arrays
    assert not any(name.startswith("gate") for name in shown.arrays)
    full = RECIPE.module(SETTINGS, RECIPE.model(SETTINGS)).eval()
    watched = RECIPE.explain(SETTINGS, full, case)
    assert [watched.arrays[f"gate{s}"].shape for s in (1, 2, 3, 4)] == [
        (16, 16),
        (8, 8),
        (4, 4),
        (2, 2),
    ]
    wide, narrow = watched.figures["attention"], shown.figures["attention"]
    assert isinstance(wide, np.ndarray)
    assert isinstance(narrow, np.ndarray)
    assert wide.shape[1] > narrow.shape[1]


def test_scores_survive_as_rows():
    rows = []
    for name, label, chance in (("a", 0, 0.2), ("b", 1, 0.9), ("c", 1, 0.4)):
        prediction = MedusaPrediction(
            name=name,
            probabilities=(1 - chance, chance),
            called=int(chance > 0.5),
            threshold=None,
            label=label,
            patient="",
            source="",
        )
        rows += RECIPE.score(SETTINGS, prediction)
    found = predictions_of(rows, SETTINGS.data.classes)
    assert found.labels.tolist() == [0, 1, 1]
    assert found.called.tolist() == [0, 1, 0]
    assert found.probabilities[:, 1].tolist() == [0.2, 0.9, 0.4]
    assert len(set(found.groups.tolist())) == 3


def test_pictures_and_masks_move_together():
    rng = np.random.default_rng(0)
    mask = np.zeros((48, 64), dtype=bool)
    mask[10:30, 12:40] = True
    sample = LungPicture(
        picture=np.where(mask, 0.9, 0.2).astype(np.float32), mask=mask, counted=np.ones_like(mask)
    )
    options = PictureAugmentation(brightness=0.0)
    moved = vary_lungs(sample, rng, options)
    assert not np.array_equal(moved.mask, mask)
    agree = (moved.picture > 0.55) == moved.mask
    assert agree.mean() > 0.995
    assert not moved.counted.all()  # what came in from outside does not count


def test_cases_without_labels_make_batches():
    case = MedusaCase(
        name="x", main=np.zeros((64, 64), np.float32), body=np.ones((32, 32), np.float32)
    )
    batch = to_batch([case])
    assert batch["label"].tolist() == [-1]
    assert batch["body"].abs().max() == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--data.body-size", "40", "33"), "body_size must be multiples of"),
        (("--data.body-size", "0", "32"), "body_size must be two positive numbers"),
        (("--data.size", "32", "32"), "size must be 64 or more"),
        (("--model.attention", "se", "--training.alternate", "2"), "alternate has no effect"),
        (("--data.threshold", "0.3", "--data.decision", "calibrated"), "no effect"),
        (("--data.label", "kind"), "--data.label has no effect"),
        (("--data.classes", "negative", "absent"), "class absent"),
        (("--training.body-weights", "gone.safetensors"), "gone.safetensors"),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    made: Path, tmp_path: Path, flags: tuple[str, ...], said: str
):
    words = ("train", "medusa", "--data", made / "chests", "--out", tmp_path / "run", *TINY)
    assert said in refusal(APP, *words, "--device", "cpu", *flags)
    assert not (tmp_path / "run" / "model").exists()


def test_sizes_that_do_not_fit_are_padded(made: Path, tmp_path: Path):
    sizes = ("--model.pad", "--data.size", "50", "60", "--data.body-size", "33", "44")
    words = ("train", "medusa", "--data", made / "chests", "--out", tmp_path / "run", *TINY)
    call(APP, *words, "--device", "cpu", "--trainer.max-steps", "1", *sizes)
    call(APP, "evaluate", tmp_path / "run", "--device", "cpu")
    picture = made / "chests" / "test" / "chest_0001.png"
    call(APP, "explain", tmp_path / "run", picture, "--out", tmp_path / "seen", "--device", "cpu")
    (found,) = (tmp_path / "seen").rglob("*.npz")
    arrays = np.load(found)
    assert {arrays[name].shape for name in ("gate1", "gate4", "evidence")} == {(50, 60)}
    assert arrays["body_mask"].shape == (33, 44)
    call(APP, "export", tmp_path / "run", "--out", tmp_path / "m.pt2")


def test_a_broken_picture_stops_or_is_skipped(chests: Path, made: Path, tmp_path: Path):
    broken = chests / "test/chest_0001.png"
    broken.write_bytes(broken.read_bytes()[:200])
    words = ("evaluate", made / "run", "--data", chests, "--device", "cpu", "--quiet")
    assert "chest_0001.png" in refusal(APP, *words)
    code, out, err = spoken(APP, *words, "--data.on-error", "skip", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["n"] == 5
    assert len(found["skipped"]) == 1
    code, _, err = spoken(APP, "check", "medusa", chests)
    assert code != 0


def test_a_label_of_another_data_set_is_refused(chests: Path, made: Path):
    path = chests / "test_COVIDx_phantom.txt"
    path.write_text(path.read_text().replace("positive", "COVID-19"))
    said = refusal(APP, "evaluate", made / "run", "--data", chests, "--device", "cpu", "--quiet")
    assert "row 2: has the label 'COVID-19', which is not one of the classes" in said


def test_a_picture_of_no_kind_is_refused(made: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("hello")
    words = ("predict", made / "run", tmp_path / "notes.txt", "--out", tmp_path / "out")
    assert "notes.txt" in refusal(APP, *words, "--device", "cpu")
    Image.new("L", (40, 30)).save(tmp_path / "black.png")
    words = ("predict", made / "run", tmp_path / "black.png", "--out", tmp_path / "out")
    code, _, err = spoken(APP, *words, "--device", "cpu")
    assert code == 0, err
    chances = json.loads((tmp_path / "out/black.json").read_text())["probabilities"]
    assert all(np.isfinite(list(chances.values())))


def test_masks_of_two_organs_are_no_lungs(made: Path, tmp_path: Path):
    data = Path(shutil.copytree(made / "lungs", tmp_path / "data"))
    mask = data / "masks/chest_000.png"
    pixels = np.array(Image.open(mask))
    pixels[:4] = 127
    Image.fromarray(pixels).save(mask)
    words = ("train", "medusa-body", "--data", data, "--out", tmp_path / "run", *TINY_BODY)
    assert "one is needed" in refusal(APP, *words, "--device", "cpu")


def test_the_contenders_stand_beside_the_plain_backbone():
    contenders = {c.name: c for c in RECIPE.contenders(SETTINGS)}
    assert next(iter(contenders)) == "MEDUSA (resnet18)"
    for contender in contenders.values():
        if contender.missing is None:
            loss = contender.loss(contender.build()(*contender.inputs()))
            assert loss.isfinite()
    stages = RECIPE.stages(SETTINGS)
    assert set(stages) == {"read", "resize", "augment", "network"}
    for stage in stages.values():
        stage()


@pytest.mark.slow
def test_the_sample_is_learned_and_pixels_alone_do_not_tell(tmp_path: Path):
    from sklearn.linear_model import LogisticRegression

    write_chests(tmp_path / "data")
    code, _, err = spoken(
        APP,
        *("train", "medusa", "--data", tmp_path / "data", "--out", tmp_path / "run"),
        *("--device", "cpu", "--quiet"),
    )
    assert code == 0, err
    code, out, err = spoken(
        APP, "evaluate", tmp_path / "run", "--device", "cpu", "--json", "--quiet"
    )
    assert code == 0, err
    reached = json.loads(out)["metrics"]["auc"]
    settings = RECIPE.plan(RECIPE.presets["small"](), tmp_path / "data")
    pixels = {}
    for split in ("train", "test"):
        cases = list(RECIPE.cases(settings, tmp_path / "data", split))
        small = [resize_grey(case.main, (24, 24)).ravel() for case in cases]
        pixels[split] = np.stack(small), np.array([case.label for case in cases])
    fitted = LogisticRegression(C=0.01, max_iter=1000).fit(*pixels["train"])
    chance = fitted.predict_proba(pixels["test"][0])[:, 1]
    plain = roc_auc(chance, pixels["test"][1] == 1)
    assert reached > 0.95
    assert plain < reached - 0.1
