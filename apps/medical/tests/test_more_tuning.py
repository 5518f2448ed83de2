"""What a fine-tuned MoRE drops: before its last layer, and keys of its towers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_medical.ecg.writing import write_record
from heed_medical.more import MoreConfig, TowerConfig, small_config
from heed_medical_cli import APP
from heed_medical_cli.more import small as small_pretraining
from heed_medical_cli.more_findings import RECIPE, ClassifierConfig, Input, paper, small
from heed_runtime.run import Run
from heed_runtime.testing.contract import call, refusal

CPU = ("--device", "cpu")


@pytest.mark.parametrize(
    ("inputs", "given", "used"),
    [
        (("xray", "ecg"), None, 0.2), (("xray",), None, 0.1), (("ecg",), None, 0.1),
        (("xray", "ecg"), 0.0, 0.0), (("ecg",), 0.4, 0.4),
    ],
)  # fmt: skip
def test_the_dropout_of_the_head(inputs: tuple[Input, ...], given: float | None, used: float):
    config = ClassifierConfig(more=small_config(), inputs=inputs, dropout=given)
    assert RECIPE.model(replace(small(), model=config)).dropout.p == used
    with pytest.raises(ValueError, match=r"dropout must be at least 0, below 1, got 1.0"):
        replace(config, dropout=1.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Studies of an X-ray, an ECG and a note."""
    rng = np.random.default_rng(0)
    rows = ["xray_path,ecg_path,xray_report,split,Edema"]
    for n, split in enumerate(("train", "train", "val", "test")):
        grey = rng.integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(grey).save(tmp_path / f"{n}.png")
        write_record(tmp_path / f"{n}", rng.normal(size=(12, 600)), rate_hz=100)
        rows.append(f"{n}.png,{n}.hea,Note {n}.,{split},{n % 2}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def pretrained(root: Path) -> Path:
    """A run of MoRE that has not learnt; its towers drop 0.3 of the keys."""
    recipe, start = APP.recipe("more"), small_pretraining()
    tower = replace(start.model.tower, depth=1, key_drop=0.3)
    text = replace(start.model.text, depth=1)
    settings = replace(start, model=replace(start.model, tower=tower, text=text))
    settings = recipe.plan(settings, root)
    run = Run.create(root / "before", system="more", settings=settings, command=["train"])
    run.save_model(recipe.model(settings))
    run.update_environment({"data": {"path": str(root)}})
    return run.path


def test_fine_tuning_drops_its_own_share_of_keys(root: Path):
    assert paper().model.more.tower.key_drop == 0.2
    assert MoreConfig().tower.key_drop == 0.3
    start = paper()
    training = replace(start.training, start_from=pretrained(root))
    planned = RECIPE.plan(replace(start, training=training), root)
    assert planned.model.more.tower == TowerConfig(
        dim=64, depth=1, heads=4, hidden=128, key_drop=0.2, schedule="linear"
    )
    model = RECIPE.model(planned)
    RECIPE.start(planned, root, model)
    assert model.xray.shares == [0.2]


def test_all_embeddings_go_into_one_npz(root: Path):
    run, out = pretrained(root), root / "vectors.npz"
    words = ("retrieve", run, "--among", root / "manifest.csv", *CPU)
    found = call(APP, *words, "--save-index", out)
    assert found["index"] == {"xray": 4, "ecg": 4, "text": 4}
    assert found["found"] == []
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["xray_names"].tolist() == ["0", "1", "2", "3"]
        assert np.allclose(np.linalg.norm(arrays["ecg"], axis=1), 1, atol=1e-5)
        kept = dict(arrays)
    call(APP, "predict", run, root / "manifest.csv", "--out", root / "predicted", *CPU)
    with np.load(root / "predicted" / "2.npz") as arrays:
        assert np.allclose(arrays["text"], kept["text"][2], atol=1e-6)
    assert "is there already" in refusal(APP, *words, "--save-index", out)
    assert "a query is needed" in refusal(APP, *words)
    line = refusal(APP, *words, "--save-index", root / "b.npz", "--out", root / "c.csv")
    assert "out has no effect" in line
    assert ".safetensors or .npz" in refusal(APP, *words, "--save-index", root / "b.csv")


def test_explain_has_the_published_form_too(root: Path):
    run = pretrained(root)
    maps = []
    for kind in ("centred", "published"):
        words = ("explain", run, root / "manifest.csv", "--out", root / kind, *CPU)
        call(APP, *words, "--data.relevance", kind)
        with np.load(root / kind / "0.npz", allow_pickle=False) as arrays:
            maps.append({name: arrays[name] for name in ("xray", "ecg", "text")})
    assert all(not np.allclose(maps[0][name], maps[1][name], rtol=1e-3) for name in maps[0])
