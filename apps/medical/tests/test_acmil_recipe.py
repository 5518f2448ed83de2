"""The recipe of ACMIL: every verb on its sample, on real bags, and on what users get wrong."""

import csv
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from heed_medical.acmil import AcmilConfig, BagClassifier
from heed_medical.acmil.network import BagOutput
from heed_medical.acmil.weights import official_name
from heed_medical_cli import APP
from heed_medical_cli.acmil import RECIPE, AcmilSettings, AcmilTraining, small
from heed_runtime.testing.contract import call, spoken

DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[3] / "../shared/data"))
QUICK = ("--trainer.max-steps", "2", "--trainer.batch", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handful of slides with and without coordinates, in CLAM's layout."""
    root = tmp_path_factory.mktemp("slides")
    rng = np.random.default_rng(0)
    (root / "h5_files").mkdir()
    rows = ["slide_id,label,split"]
    for number, split in enumerate(["train"] * 6 + ["val"] * 2 + ["test"] * 4):
        with h5py.File(root / "h5_files" / f"s{number}.h5", "w") as file:
            file["features"] = rng.normal(size=(20 + number, 8)).astype(np.float32)
            if number != 8:
                file["coords"] = np.stack([np.arange(20 + number) * 64, np.zeros(20 + number)], 1)
        rows.append(f"s{number},{'tumor' if number % 2 else 'normal'},{split}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    call(APP, "train", "acmil", "--data", data, "--out", out, *QUICK)
    return out


def test_predictions_are_probabilities_attention_and_geojson(run: Path, data: Path, tmp_path: Path):
    found = call(APP, "predict", run, data / "h5_files" / "s9.h5", "--out", tmp_path)
    assert sorted(Path(name).name for name in found["files"]) == ["s9.csv", "s9.geojson", "s9.json"]
    document = json.loads((tmp_path / "s9.json").read_text())
    assert sum(document["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert len((tmp_path / "s9.csv").read_text().splitlines()) == 30
    found = call(APP, "predict", run, data / "h5_files" / "s8.h5", "--out", tmp_path / "flat")
    assert sorted(Path(name).suffix for name in found["files"]) == [".csv", ".json"]


def test_the_exported_program_takes_features_as_they_lie_in_files(data: Path, tmp_path: Path):
    """Also where they are standardised before the network sees them."""
    run, file = tmp_path / "run", data / "h5_files" / "s9.h5"
    call(APP, "train", "acmil", "--data", data, "--out", run, "--data.standardise", *QUICK)
    call(APP, "predict", run, file, "--out", tmp_path)
    told = json.loads((tmp_path / "s9.json").read_text())["probabilities"]
    call(APP, "export", run, "--out", tmp_path / "a.pt2")
    program = torch.export.load(tmp_path / "a.pt2").module()
    with h5py.File(file) as opened:
        logits, attention = program(torch.from_numpy(opened["features"][()])[None])
    assert logits[0].softmax(0).tolist() == pytest.approx(list(told.values()), abs=1e-5)
    written = np.loadtxt(tmp_path / "s9.csv", delimiter=",", skiprows=1, usecols=3)
    np.testing.assert_allclose(attention[0].detach().numpy(), written, rtol=1e-4)


def test_slides_of_one_name_are_told_apart(run: Path, data: Path, tmp_path: Path):
    for folder, name in (("d1", "s9"), ("d2", "s10")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.h5").write_bytes((data / "h5_files" / f"{name}.h5").read_bytes())
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (3000, 200), (200, 120, 170)).save(tmp_path / "pictures" / "s.tif")
    paths = [tmp_path / "d1" / "s.h5", tmp_path / "d2" / "s.h5"]
    call(APP, "predict", run, *paths, "--out", tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.glob("out/*/*")}
    assert found >= {"d1/s.json", "d2/s.json"}
    out = ("--out", tmp_path / "drawn", "--data.thumbnails", tmp_path / "pictures")
    call(APP, "explain", run, *paths, *out)
    assert len(list(tmp_path.glob("drawn/**/*heatmap.png"))) == 2


def test_explain_draws_over_the_thumbnail_or_over_the_coordinates(
    run: Path, data: Path, tmp_path: Path
):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (3000, 200), (200, 120, 170)).save(pictures / "s9.tif")
    paths = [data / "h5_files" / f"s{n}.h5" for n in (8, 9)]
    out = tmp_path / "out"
    call(APP, "explain", run, *paths, "--out", out, "--data.thumbnails", pictures)
    assert sorted(path.name for path in out.glob("*.png")) == [
        "s8_concentration.png", "s9_concentration.png", "s9_heatmap.png",
    ]  # fmt: skip
    with np.load(out / "s9.npz") as arrays:
        np.testing.assert_allclose(arrays["branch_attention"].sum(1), 1, rtol=1e-5)
        np.testing.assert_allclose(arrays["branch_attention"].mean(0), arrays["attention"])
        assert arrays["concentration"][-1] == pytest.approx(1)
        assert arrays["coords"].shape == (29, 2)


def test_evaluate_reports_scores_with_intervals(run: Path, data: Path):
    found = call(APP, "evaluate", run, "--data", data, "--split", "test")
    assert found["n"] == 4
    assert set(found["metrics"]) >= {"accuracy", "balanced_accuracy", "f1", "auc"}
    assert (run / "evaluation" / "test" / "roc.png").stat().st_size > 0


def test_evaluate_draws_how_concentrated_the_attention_is(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    """The four slides have 28 to 31 patches; of each the first holds half of the attention."""

    def weights(output: BagOutput) -> torch.Tensor:
        assert output.scores is not None
        even = torch.full_like(output.scores, 0.5 / (output.scores.shape[-1] - 1))
        return even.index_fill(-1, torch.tensor([0]), 0.5)

    monkeypatch.setattr(BagOutput, "weights", property(weights))
    found = call(APP, "evaluate", run, "--data", data, "--split", "test")
    folder = run / "evaluation" / "test"
    with (folder / "concentration.csv").open() as stream:
        rows = {int(row["most attended patches"]): row for row in csv.DictReader(stream)}
    assert list(rows) == [1, 2, 5, 10, 20, 50]
    for count, row in rows.items():
        sizes = np.array([28, 29, 30, 31])
        wanted = np.minimum(0.5 + 0.5 * (count - 1) / (sizes - 1), 1)
        assert float(row["mean share"]) == pytest.approx(wanted.mean())
        assert float(row["low quartile"]) == pytest.approx(np.quantile(wanted, 0.25))
        assert float(row["high quartile"]) == pytest.approx(np.quantile(wanted, 0.75))
        assert float(row["even attention"]) == pytest.approx(np.minimum(count / sizes, 1).mean())
    assert found["metrics"]["top10_attention"] == pytest.approx(float(rows[10]["mean share"]))
    with (folder / "cases.csv").open() as stream:
        shares = [float(row["top1_attention"]) for row in csv.DictReader(stream)]
    assert shares == pytest.approx([0.5] * 4)
    assert (folder / "concentration.png").stat().st_size > 0


def broken(data: Path, root: Path, fault: str) -> Path:
    """A copy of the data with one fault."""
    (root / "h5_files").mkdir(parents=True)
    for path in (data / "h5_files").iterdir():
        (root / "h5_files" / path.name).write_bytes(path.read_bytes())
    labels = (data / "labels.csv").read_text()
    victim = root / "h5_files" / "s1.h5"
    if fault == "truncated":
        victim.write_bytes(victim.read_bytes()[:200])
    elif fault == "label":
        labels = labels.replace("s1,tumor", "s1,")
    elif fault == "missing":
        victim.unlink()
    else:
        features = {
            "empty": np.zeros((0, 8)),
            "nan": np.full((3, 8), np.nan),
            "width": np.zeros((3, 9)),
        }
        with h5py.File(victim, "w") as file:
            if fault in features:
                file["features"] = features[fault]
    (root / "labels.csv").write_text(labels)
    return root


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("truncated", "s1.h5: is not a readable h5 file"),
        ("label", "labels.csv, row 3: has no label"),
        ("missing", "slide 's1' has no features"),
        ("empty", "s1.h5: is a bag without patches"),
        ("nan", "s1.h5: 3 patches have features that are not numbers"),
        ("width", "s1.h5: has features of 9 channels, expected 8"),
        ("nothing", "s1.h5: has no data set 'features' or 'feat'"),
    ],
)
def test_a_fault_in_the_data_is_one_line_and_exit_code_2(
    fault: str, told: str, data: Path, tmp_path: Path
):
    root = broken(data, tmp_path / "data", fault)
    words = ("train", "acmil", "--data", root, "--out", tmp_path / "run", *QUICK, "--quiet")
    code, _, err = spoken(APP, *words, "--trainer.max-epochs", "1", "--trainer.max-steps", "3")
    errors = [line for line in err.splitlines() if "error:" in line]
    assert (code, len(errors)) == (2, 1), err
    assert told in errors[0]
    assert spoken(APP, "check", "acmil", root)[0] != 0
    if fault in ("truncated", "missing"):  # of a file, of a list: skipping is the same for all
        found = call(APP, *words, "--data.on-error", "skip", "--overwrite")
        assert [told in line for line in found["skipped"]["train"]] == [True]


def test_other_weights_and_other_classes_are_refused(run: Path, data: Path, tmp_path: Path):
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    words = ("train", "acmil", "--data", data, "--out", tmp_path / "r", *QUICK)
    code, _, err = spoken(APP, *words, "--training.weights", tmp_path / "w.safetensors")
    assert code == 2
    assert "not those of this network" in err
    (tmp_path / "labels.csv").write_text("slide_id,label,split\ns1,other,test\n")
    (tmp_path / "s1.h5").write_bytes((data / "h5_files" / "s1.h5").read_bytes())
    code, _, err = spoken(APP, "evaluate", run, "--data", tmp_path)
    assert code == 2
    assert "label 'other', the classes are normal, tumor" in err


def test_a_run_starts_from_official_weights(tmp_path: Path):
    config = AcmilConfig(kind="acmil-mha", in_dim=16, branches=2)
    donor = BagClassifier(config)
    state = {official_name(donor, k): x.contiguous() for k, x in donor.state_dict().items()}
    save_file(state, tmp_path / "official.safetensors")
    training = AcmilTraining(weights=tmp_path / "official.safetensors")
    settings = AcmilSettings(model=config, training=training)
    model = RECIPE.model(settings)
    RECIPE.start(settings, tmp_path, model)
    for name, x in donor.state_dict().items():
        assert torch.equal(model.state_dict()[name], x), name


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: AcmilTraining(learning_rate=0.0), "learning_rate"),
        (lambda: AcmilTraining(max_patches=0), "max_patches"),
        (
            lambda: AcmilSettings(
                model=AcmilConfig(kind="mha"), training=AcmilTraining(diversity_weight=0.0)
            ),
            "no effect",
        ),
        (
            lambda: AcmilSettings(
                model=AcmilConfig(kind="mean"), training=AcmilTraining(weights=Path("w"))
            ),
            "training.weights",
        ),
    ],
)
def test_settings_without_sense_are_refused(make, told: str):
    with pytest.raises(ValueError, match=told):
        make()


def test_a_training_tells_which_slides_it_leaves_out(data: Path, tmp_path: Path):
    root = shutil.copytree(data, tmp_path / "slides")
    rows = (root / "labels.csv").read_text().splitlines()
    (root / "labels.csv").write_text("\n".join(row for row in rows if row[:2] != "s1") + "\n")
    code, _, err = spoken(APP, "train", "acmil", "--data", root, "--out", tmp_path / "run", *QUICK)
    assert code == 0
    assert "3 slides have no label and are left out (s1, s10, s11)" in err


def test_features_of_pictures_are_trained_on(tmp_path: Path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    rows = ["file,label"]
    for number in range(10):
        pixels = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)
        pixels[..., number % 2] //= 3
        Image.fromarray(pixels).save(tmp_path / "images" / f"p{number}.png")
        rows.append(f"p{number}.png,{number % 2}")
    bags = tmp_path / "bags"
    words = ("features", tmp_path / "images", "--encoder", "resnet10t", "--out", bags)
    code, _, err = spoken(APP, *words, "--tiling.tile", 32, "--tissue.saturation", 1.0)
    assert code == 2
    assert "shows no tissue" in err  # nothing was made, so that other settings may be tried
    code, out, err = spoken(APP, *words, "--tiling.tile", 32, "--json", "--quiet")
    assert code == 0
    assert err.count("resnet10t is untrained") == 1
    slides = json.loads(out)["slides"]
    assert {(row["patches"], row["channels"]) for row in slides} == {(9, 512)}
    again = call(APP, *words, "--tiling.tile", 32)
    assert {row["state"] for row in again["slides"]} == {"kept"}
    code, _, err = spoken(APP, *words, "--tiling.tile", 64)
    assert code == 2
    assert "were made with tiling.tile 32, not 64; give another --out" in err
    (bags / "h5_files" / "settings.yaml").rename(tmp_path / "settings.yaml")
    code, _, err = spoken(APP, *words, "--tiling.tile", 32)
    assert code == 2
    assert "holds features that were made elsewhere" in err
    (bags / "labels.csv").write_text("\n".join(rows))
    call(APP, "train", "acmil", "--data", bags, "--out", tmp_path / "run", *QUICK)
    call(APP, "explain", tmp_path / "run", bags / "h5_files" / "p3.h5", "--out", tmp_path / "seen")
    assert (tmp_path / "seen" / "p3_heatmap.png").stat().st_size > 0
    (tmp_path / "images" / "p0.png").write_bytes(b"damaged")
    code, _, err = spoken(
        APP, "features", tmp_path / "images", "--encoder", "resnet10t", "--out", tmp_path
    )
    assert code == 2
    assert "p0.png: cannot be read as a picture" in err


def test_features_of_tiles_are_trained_on(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = ["slide_id,label"]
    for number in range(10):
        rows.append(f"s{number},{number % 2}")
        (tmp_path / "tiles" / f"s{number}").mkdir(parents=True)
        for x, y in ((0, 0), (32, 0), (32, 32)):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            pixels[..., number % 2] //= 3
            Image.fromarray(pixels).save(tmp_path / "tiles" / f"s{number}" / f"{x}_{y}.png")
    bags = tmp_path / "bags"
    words = ("features", tmp_path / "tiles", "--tiles", "--encoder", "resnet10t", "--out", bags)
    words = (*words, "--tiling.tile", 32)
    for flags, told in (
        (("--tiling.overlap", 0.5), "only tiling.tile"),
        (("--tissue.saturation", 0.5), "tissue has no effect with tiles"),
        (("--batch", 0), "batch must be at least 1"),
    ):
        code, _, err = spoken(APP, *words, *flags)
        assert code == 2
        assert told in err
    broken = tmp_path / "tiles" / "s4" / "32_0.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    found = call(APP, *words, "--on-error", "skip")
    assert [row["slide"] for row in found["slides"]] == [f"s{n}" for n in range(10) if n != 4]
    assert "s4/32_0.png: cannot be read as a picture" in found["skipped"][0]
    broken.write_bytes(whole)
    states = {row["slide"]: row["state"] for row in call(APP, *words)["slides"]}
    assert states.pop("s4") == "written"
    assert set(states.values()) == {"kept"}
    code, _, err = spoken(APP, *(word for word in words if word != "--tiles"))
    assert code == 2
    assert "has the name of" in err
    assert "add --tiles" in err
    (bags / "labels.csv").write_text("\n".join(rows))
    call(APP, "train", "acmil", "--data", bags, "--out", tmp_path / "run", *QUICK)
    call(APP, "explain", tmp_path / "run", bags / "h5_files" / "s3.h5", "--out", tmp_path / "seen")
    assert (tmp_path / "seen" / "s3_heatmap.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "wsi").is_dir(), reason="the real slides are not here")
def test_a_real_slide_becomes_features_a_heatmap_and_geojson(tmp_path: Path):
    """Two slides, each a class of its own that every split holds a copy of."""
    sizes = {"cmu-1-small-region": (2220, 2967), "tcga-cr-7395-01a-01-ts1": (4443, 3567)}
    slides, bags, run = DATA / "wsi", tmp_path / "bags", tmp_path / "run"
    words = ("features", slides, "--encoder", "resnet10t", "--out", bags)
    found = call(APP, *words, "--tiling.tile", 224)
    patches = {row["slide"]: row["patches"] for row in found["slides"]}
    assert set(patches) == set(sizes)
    rows = ["slide_id,label,split"]
    for copy, split in enumerate(("train", "train", "val", "test")):
        for label, name in enumerate(sizes):
            shutil.copy(bags / "h5_files" / f"{name}.h5", bags / "h5_files" / f"{name}_{copy}.h5")
            rows.append(f"{name}_{copy},{('region', 'section')[label]},{split}")
    for name in sizes:
        (bags / "h5_files" / f"{name}.h5").rename(tmp_path / f"{name}.h5")
    (bags / "labels.csv").write_text("\n".join(rows) + "\n")
    steps = ("--trainer.max-steps", "20", "--trainer.batch", "2", "--device", "cpu")
    call(APP, "train", "acmil", "--data", bags, "--out", run, "--data.standardise", *steps)
    assert call(APP, "evaluate", run)["metrics"]["accuracy"] == 1.0
    inputs = [tmp_path / f"{name}.h5" for name in sizes]
    call(APP, "predict", run, *inputs, "--out", tmp_path / "said")
    call(APP, "explain", run, *inputs, "--out", tmp_path / "seen", "--data.thumbnails", slides)
    for name, (width, height) in sizes.items():
        with Image.open(tmp_path / "seen" / f"{name}_heatmap.png") as picture:
            assert min(picture.size) > 300
        with np.load(tmp_path / "seen" / f"{name}.npz") as arrays:
            assert arrays["attention"].shape == (patches[name],)
            assert (arrays["coords"] >= 0).all()
            assert (arrays["coords"] + 224 <= (width, height)).all()
        document = json.loads((tmp_path / "said" / f"{name}.geojson").read_text())
        corners = np.array([f["geometry"]["coordinates"][0] for f in document["features"]])
        assert len(corners) == patches[name]
        assert (corners.min((0, 1)) >= 0).all()
        assert (corners.max((0, 1)) <= (width, height)).all()
        np.testing.assert_array_equal(np.ptp(corners, axis=1), 224)


def trained_auc(kind: str, data: Path, out: Path, *flags: object) -> dict[str, float]:
    call(APP, "train", "acmil", "--data", data, "--out", out, "--model.kind", kind,
         "--device", "cpu", *flags)  # fmt: skip
    metrics: dict[str, float] = call(APP, "evaluate", out, "--device", "cpu")["metrics"]
    return metrics


@pytest.mark.slow
def test_attention_beats_the_mean_patch_on_the_sample(tmp_path: Path):
    RECIPE.sample(tmp_path / "data", seed=0)
    whole = trained_auc("acmil-ga", tmp_path / "data", tmp_path / "whole")
    mean = trained_auc("mean", tmp_path / "data", tmp_path / "mean")
    assert whole["auc"] > mean["auc"] + 0.05, (whole, mean)
    assert whole["auc"] > 0.95


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "mil-bags").is_dir(), reason="the real bags are not here")
def test_musk_is_learnt_in_a_fold(tmp_path: Path):
    flags = ("--data.folds", 10, "--data.standardise", "--trainer.max-epochs", 30,
             "--training.learning-rate", 5e-4)  # fmt: skip
    assert trained_auc("gated", DATA / "mil-bags", tmp_path / "run", *flags)["auc"] >= 0.7


def test_presets_are_the_published_networks():
    counts = {name: make().model for name, make in RECIPE.presets.items()}
    with torch.device("meta"):
        sizes = {
            n: sum(p.numel() for p in BagClassifier(c).parameters()) for n, c in counts.items()
        }
    assert sizes["paper"] == 662_417
    assert sizes["paper-mha"] == 6_317_580
    assert small().model == AcmilConfig()
