"""The recipe of MSGA: what it settles from the data, what it draws, and that training is exact."""

import csv
import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from heed_core.errors import InputError
from heed_medical.msga import Msga, MsgaConfig
from heed_medical.msga.weights import official_name
from heed_medical.segmentation.layouts import find_cases
from heed_medical.segmentation.phantoms import write_sample
from heed_medical.segmentation.slices import CaseData
from heed_medical_cli import APP
from heed_medical_cli.attention_maps import attention_maps, spread
from heed_medical_cli.msga import RECIPE, MsgaSettings, MsgaTraining
from heed_medical_cli.pictures import draw_attention, draw_scores
from heed_runtime.run import Run
from heed_runtime.testing.contract import call, refusal
from heed_runtime.testing.processes import KILLED, kill_when, start, start_ranks, wait

SMALL = MsgaSettings(model=MsgaConfig(backbone="resnet18", width=8, scales=(1, 2)))
WORDS = [
    *("--model.width", "8", "--model.scales", "1", "2", "--trainer.batch", "4"),
    *("--trainer.max-epochs", "3", "--device", "cpu", "--quiet"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "nifti"
    write_sample(root, cases=8, shape=(16, 24, 4))
    return root


@pytest.fixture(scope="module")
def planned(data: Path) -> MsgaSettings:
    return RECIPE.plan(SMALL, data)


def test_the_data_settle_classes_channels_and_size(planned: MsgaSettings):
    assert planned.model.classes == len(planned.data.table) == 4
    assert planned.model.in_channels == 1
    assert planned.data.size == (32, 32)
    assert planned.model.zoom == 2
    assert planned.model.width == 8


def test_data_in_another_layout_than_the_training_are_scored(
    planned: MsgaSettings, data: Path, tmp_path: Path
):
    run = Run.create(tmp_path / "run", system="msga", settings=planned, command=[])
    run.save_model(RECIPE.model(planned))
    for path in (path for path in data.rglob("*") if path.is_file()):
        name = path.relative_to(data).as_posix().replace("_0000.nii", ".nii")
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "data" / name)
    words = ("evaluate", tmp_path / "run", "--data", tmp_path / "data", "--device", "cpu")
    said = "is not in the layout nnunet, it seems to be in the layout msd; add --data.layout msd"
    assert said in refusal(APP, *words)
    assert call(APP, *words, "--data.layout", "msd")["n"] > 0


def test_a_run_is_rebuilt_without_the_weights_it_started_from(tmp_path: Path):
    settings = replace(SMALL, model=MsgaConfig(backbone="resnet18", width=8))
    donor = Msga(settings.model)
    state = {official_name(name): x.clone() for name, x in donor.state_dict().items()}
    for name in list(state):
        if name.endswith(("query_conv.weight", "key_conv.weight", "value_conv.weight")):
            state[name] = state[name][:, :, None, None].contiguous()
    save_file(state, tmp_path / "official.safetensors")
    settings = replace(settings, training=MsgaTraining(weights=tmp_path / "official.safetensors"))
    model = RECIPE.model(settings)
    before = {name: x.clone() for name, x in model.named_parameters()}
    RECIPE.start(settings, tmp_path, model)
    for name, wanted in donor.named_parameters():
        assert torch.equal(model.get_parameter(name), wanted), name
    assert any(not torch.equal(before[name], x) for name, x in donor.named_parameters())
    (tmp_path / "official.safetensors").unlink()
    RECIPE.model(settings)
    with pytest.raises(InputError, match=r"official\.safetensors"):
        RECIPE.start(settings, tmp_path, model)


def test_even_attention_is_shown_as_no_preference(planned: MsgaSettings, data: Path):
    model = RECIPE.model(planned).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if ".attention.query." in name:
                x.zero_()  # all scores are 0: every place gets the same weight
    module = RECIPE.module(planned, model).eval()
    case = CaseData(find_cases(data, planned.data, "test"), planned.data)[0]
    prediction = module.predict_step([case], 0)[0]
    maps = attention_maps(model, case, prediction, device=torch.device("cpu"))
    assert 1 <= len(maps) <= 3
    for one in maps:
        assert set(one.guided) == set(one.position) == {1, 2}
        for scale in (1, 2):
            np.testing.assert_allclose(one.position[scale], 1.0, rtol=1e-5)
            assert one.guided[scale].shape == one.image.shape == (16, 24)
            assert np.ptp(one.guided[scale]) > 0


def test_without_position_attention_the_guided_maps_are_shown(planned: MsgaSettings, data: Path):
    settings = replace(planned, model=replace(planned.model, attention="none"))
    module = RECIPE.module(settings, RECIPE.model(settings)).eval()
    case = CaseData(find_cases(data, settings.data, "test"), settings.data)[0]
    explanation = RECIPE.explain(settings, module, case)
    assert all("position" not in name for name in explanation.arrays)
    assert any("guided_scale2" in name for name in explanation.arrays)
    for figure in explanation.figures.values():
        assert sum("scale" in axes.get_title() for axes in figure.axes) == 2


def test_explained_slices_are_spread_over_the_foreground():
    foreground = np.array([0, 0, 4, 4, 4, 4, 4, 4, 4, 4, 0, 0])
    chosen = spread(foreground, 3)
    assert chosen == [3, 5, 7]
    assert spread(np.zeros(9), 3) == [4]
    assert spread(np.array([0, 7, 0]), 3) == [1]


def test_pictures_show_every_scale_and_every_class(planned: MsgaSettings, data: Path):
    module = RECIPE.module(planned, RECIPE.model(planned)).eval()
    case = CaseData(find_cases(data, planned.data, "test"), planned.data)[0]
    prediction = module.predict_step([case], 0)[0]
    one = attention_maps(module.model, case, prediction, device=torch.device("cpu"))[0]
    figure = draw_attention(one, planned.data.table.names)
    titles = [axes.get_title() for axes in figure.axes]
    assert sum("scale 1" in title for title in titles) == 2
    rows = [
        {"class": name, "dice": value, "msd": None}
        for name in ("liver", "kidney")
        for value in (0.5, 0.7)
    ]
    axes = draw_scores(rows, "dice", "Dice").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["liver", "kidney"]
    assert "2 cases" in axes.get_title()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"guide_weight": -1.0}, "guide_weight"),
        ({"weights": Path("a"), "backbone_weights": Path("b")}, "backbone_weights"),
        ({"backbone_stem": "mean"}, "backbone_stem"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict, said: str):
    with pytest.raises(ValueError, match=said):
        MsgaTraining(**settings)


def test_a_network_without_attention_trains_and_has_no_back_end_to_choose(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [
        *("train", "msga", "--data", str(data), "--out", str(tmp_path / "run"), "--quiet"),
        *("--model.attention", "none", "--model.width", "8", "--model.scales", "1"),
        *("--trainer.batch", "2", "--trainer.max-steps", "1", "--device", "cpu"),
    ]
    assert APP.call([*words, "--impl", "sdpa"]) == 2
    assert "--impl sdpa has no effect" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert APP.call(words) == 0
    assert APP.call(["evaluate", str(tmp_path / "run"), "--split", "val", "--quiet"]) == 0


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def train_words(data: Path, run: Path) -> list[str]:
    return ["train", "msga", "--data", str(data), "--out", str(run), *WORDS]


@pytest.mark.slow
def test_kill_9_and_resume_give_the_weights_of_an_uninterrupted_run(data: Path, tmp_path: Path):
    assert APP.call(train_words(data, tmp_path / "whole")) == 0
    began = time.monotonic()
    assert wait(start(APP, train_words(data, tmp_path / "timed"), log=tmp_path / "log")) == 0
    duration = time.monotonic() - began
    moments = random.Random(0)
    for number in range(10):
        run = tmp_path / f"killed{number}"
        words = train_words(data, run)
        at = time.monotonic() + moments.uniform(0.05, 1.0) * duration
        child = start(APP, words, log=tmp_path / "log")
        code = kill_when(child, lambda at=at: time.monotonic() > at)
        assert code in (0, KILLED)
        again = ["train", "msga", "--resume", str(run), "--quiet"] if run.exists() else words
        assert wait(start(APP, again, log=tmp_path / "log")) == 0, (tmp_path / "log").read_text()
        for name, wanted in weights(tmp_path / "whole").items():
            assert torch.equal(weights(run)[name], wanted), (number, name)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(data: Path, tmp_path: Path):
    # Adam turns the rounding of gradients near zero into whole steps, which grows from step to
    # step: the first loss is that of one process, the second, after one step, nearly so.
    for steps, tolerance in ((1, 1e-5), (2, 1e-3)):
        limit = ["--trainer.max-steps", str(steps)]
        one, two = tmp_path / f"one{steps}", tmp_path / f"two{steps}"
        assert APP.call([*train_words(data, one), *limit]) == 0
        words = [*train_words(data, two), *limit]
        children = start_ranks(APP, words, ranks=2, log=tmp_path / f"log{steps}.txt")
        assert [wait(child) for child in children] == [0, 0]
        losses = []
        for run in (one, two):
            with (run / "metrics.csv").open() as file:
                losses += [float(row["train/loss"]) for row in csv.DictReader(file)]
        assert len(losses) == 2
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.mark.slow
def test_one_scale_alone_scores_lower_on_the_sample(tmp_path: Path):
    write_sample(tmp_path / "data", seed=0)
    scores = {}
    for name, flags in {"whole": (), "finest": ("--model.scales", "1")}.items():
        run = tmp_path / name
        words = ["train", "msga", "--data", str(tmp_path / "data"), "--out", str(run), "--quiet"]
        words += ["--trainer.max-epochs", "60", "--trainer.validate-every", "5"]
        words += ["--training.augmentation.flip-probability", "0.5"]
        assert APP.call([*words, *flags]) == 0
        assert APP.call(["evaluate", str(run), "--quiet"]) == 0
        report = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
        scores[name] = report["metrics"]["dice"]
    assert scores["whole"] > scores["finest"] + 0.02, scores
