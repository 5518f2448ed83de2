"""The recipes: what they settle, count, write and draw, and the verbs of the domain."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from heed_core.errors import InputError
from heed_lidar.clouds.cloud import CloudOptions
from heed_lidar.clouds.ply import read_ply
from heed_lidar.clouds.reading import read_cloud
from heed_lidar.curbnet import CurbNet, CurbNetConfig
from heed_lidar.cylinder3d import Cylinder3dConfig
from heed_lidar.cylinder3d.weights import official_name
from heed_lidar.cylindrical import CylindricalGrid
from heed_lidar.labels import CURB_RAW, read_labels
from heed_lidar.layouts import find_scans
from heed_lidar.scans import load_scan
from heed_lidar.scenes.files import SceneSet, write_scenes
from heed_lidar.scenes.sensor import Sensor
from heed_lidar_cli import APP, classical, curbnet, curbnet_released, cylinder3d
from heed_lidar_cli.compare import key_of
from heed_lidar_cli.explaining import (
    HEIGHTS_M,
    Question,
    ask,
    entropy_of,
    explain_network,
    look,
    occlusion,
    pyramid_shares,
)
from heed_lidar_cli.prediction import StreetPrediction, finish
from heed_lidar_cli.scoring import score
from heed_lidar_cli.settings import NetworkData, NetworkTraining, StreetData
from heed_lidar_cli.street import SegmentationModule, cosine_to_a_hundredth, prepare, scattered
from heed_runtime.recipe import Recipe
from heed_runtime.testing.contract import call

GRID = CylindricalGrid(shape=(48, 36, 8))
SENSOR = Sensor(beams=24, azimuth_step_deg=1.0, field_of_view_deg=180.0)
QUICK = [
    *("--trainer.max-steps", "1", "--trainer.batch", "2", "--device", "cpu"),
    *("--model.width", "4", "--model.grid.shape", "48", "36", "8"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "streets"
    write_scenes(root, SceneSet(sequences={"00": 3, "02": 1, "11": 2}, sensor=SENSOR))
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    call(APP, "train", "curbnet", "--data", data, "--out", path, *QUICK)
    return path


@pytest.fixture(scope="module")
def planned(data: Path) -> curbnet.CurbNetSettings:
    settings = curbnet.CurbNetSettings(
        model=CurbNetConfig(width=4, grid=GRID), data=NetworkData(crop="forward:25")
    )
    return curbnet.RECIPE.plan(settings, data)


@pytest.fixture(scope="module")
def module(planned: curbnet.CurbNetSettings):
    torch.manual_seed(0)
    return curbnet.RECIPE.module(planned, curbnet.RECIPE.model(planned)).eval()


def first_scan(data: Path, settings) -> object:
    return load_scan(find_scans(data, settings.data, "train")[0], settings.data)


def test_the_data_settle_classes_and_their_counts(planned, data: Path):
    assert planned.model.classes == 5
    expected = np.zeros(5, dtype=np.int64)
    for file in find_scans(data, planned.data, "train"):
        scan = load_scan(file, planned.data)
        x, y = scan.cloud.xyz[:, 0], scan.cloud.xyz[:, 1]
        expected += np.bincount(scan.classes[(x > 0) & (np.hypot(x, y) <= 25)], minlength=5)
    assert planned.training.class_counts == tuple(expected)
    again = curbnet.RECIPE.plan(planned, data / "nothing")  # what is settled is not asked again
    assert again == planned


def test_cylinder3d_counts_nothing_and_takes_any_classes(data: Path):
    settings = cylinder3d.Cylinder3dSettings(
        model=Cylinder3dConfig(width=4, grid=GRID), data=NetworkData(labels="semantic-kitti")
    )
    planned = cylinder3d.RECIPE.plan(settings, data)
    assert planned.model.classes == 20
    assert planned.training.class_counts == ()


def test_the_released_network_is_counted_and_takes_its_weights(data: Path, tmp_path: Path):
    recipe = curbnet_released.RECIPE
    settings = recipe.presets["released"]()
    with torch.device("meta"):
        network = recipe.model(settings)
    assert sum(parameter.numel() for parameter in network.parameters()) == 294_605_095
    grid = CylindricalGrid(shape=(24, 18, 8))
    config = dataclasses.replace(settings.model, width=2, grid=grid)
    made = recipe.model(dataclasses.replace(settings, model=config))
    state = {}
    for name, tensor in made.state_dict().items():
        if tensor.ndim == 5 and tensor.shape[1:4] == (1, 1, 1):  # stored as (out, in)
            tensor = tensor.reshape(tensor.shape[0], -1).T.reshape(tensor.shape)
        state[official_name(name)] = tensor
    torch.save(state, tmp_path / "official.pt")
    training = dataclasses.replace(settings.training, weights=tmp_path / "official.pt")
    settings = dataclasses.replace(settings, model=config, training=training)
    other = recipe.model(settings)
    recipe.start(settings, tmp_path, other)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name]), name
    broken = dataclasses.replace(settings, model=dataclasses.replace(config, variant="520"))
    with pytest.raises(InputError, match="520 can be counted and does not run"):
        recipe.plan(broken, data)


@pytest.mark.parametrize(
    "recipe",
    [curbnet.RECIPE, curbnet_released.RECIPE, cylinder3d.RECIPE, classical.RECIPE],
)
def test_presets_are_of_the_recipe(recipe: Recipe):
    for make in recipe.presets.values():
        assert isinstance(make(), recipe.settings)


def test_the_paper_is_a_preset():
    paper = curbnet.RECIPE.presets["paper"]()
    assert (paper.model.width, paper.model.grid.shape) == (32, (480, 360, 32))
    training, trainer = paper.training, paper.trainer
    assert (training.optimizer, training.learning_rate, training.schedule) == (
        "adam", 1e-3, "constant",
    )  # fmt: skip
    assert (training.voxel_loss, training.region_loss) == ("ace", "lovasz")
    assert (trainer.max_epochs, trainer.batch) == (100, 6)
    released = cylinder3d.RECIPE.presets["released"]()
    assert (released.model.classes, released.training.voxel_loss) == (20, "cross-entropy")
    assert (released.trainer.max_epochs, released.trainer.batch) == (40, 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"voxel_loss": "none", "region_loss": "none"}, "nothing"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"rate_batch": 0}, "rate_batch"),
        ({"weight_decay": 0.1}, "adamw"),
        ({"delta": 1.0}, "delta"),
        ({"gamma": -1.0}, "gamma"),
    ],
)
def test_training_without_sense_is_refused(settings: dict, said: str):
    with pytest.raises(ValueError, match=said):
        NetworkTraining(**settings)


def test_the_learning_rate_falls_to_a_hundredth():
    assert cosine_to_a_hundredth(0, steps=10) == 1
    assert cosine_to_a_hundredth(10, steps=10) == pytest.approx(0.01)
    assert cosine_to_a_hundredth(99, steps=10) == pytest.approx(0.01)
    assert cosine_to_a_hundredth(5, steps=10) == pytest.approx(0.505)


@pytest.mark.parametrize(
    ("recipe", "preset", "batch", "expected"),
    [
        (cylinder3d.RECIPE, "base", 2, 1e-3),
        (cylinder3d.RECIPE, "base", 8, 2e-3),
        (cylinder3d.RECIPE, "released", 8, 1e-3),
        (curbnet.RECIPE, "paper", 6, 1e-3),
        (curbnet.RECIPE, "paper", 24, 1e-3),
    ],
)
def test_the_learning_rate_grows_with_the_root_of_the_batch(recipe, preset, batch, expected):
    settings = recipe.presets[preset]()
    trainer = dataclasses.replace(settings.trainer, batch=batch // 2, accumulate=2)
    training = dataclasses.replace(settings.training, schedule="constant")
    settings = dataclasses.replace(settings, trainer=trainer, training=training)
    optimizer = SegmentationModule(torch.nn.Linear(2, 2), settings).configure_optimizers()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_voxels_are_made_after_the_change_of_a_scan(planned, data: Path):
    scan = first_scan(data, planned)
    grid = dataclasses.replace(GRID, out_of_range="drop")
    rng = np.random.default_rng(3)
    found = prepare(scan, rng, training=planned.training, grid=grid)
    rho = np.hypot(found.features[:, 6], found.features[:, 7])
    np.testing.assert_allclose(found.features[:, 3], rho, rtol=1e-5)
    assert len(found.features) == len(found.cells) == len(found.classes) < len(scan)
    again = prepare(scan, np.random.default_rng(3), training=planned.training, grid=grid)
    np.testing.assert_array_equal(found.features, again.features)
    batch = curbnet.RECIPE.collate([found, again])
    assert batch.counts == (len(found.features),) * 2


def test_the_loss_is_the_mean_over_scans(planned, data: Path):
    settings = dataclasses.replace(
        planned, training=dataclasses.replace(planned.training, region_loss="lovasz")
    )
    torch.manual_seed(0)
    module = curbnet.RECIPE.module(settings, curbnet.RECIPE.model(settings)).eval()
    module.log_dict = lambda *args, **kwargs: None
    change = curbnet.RECIPE.augment(settings)
    samples = [
        change(scan, np.random.default_rng(n))
        for n, scan in enumerate(curbnet.RECIPE.train_data(settings, data)[i] for i in (0, 1))
    ]
    with torch.no_grad():
        both = module.training_step(curbnet.RECIPE.collate(samples), 0)
        alone = [module.training_step(curbnet.RECIPE.collate([one]), 0) for one in samples]
    assert float(both) == pytest.approx(float(sum(alone)) / 2, rel=1e-5)


def test_points_outside_a_grid_that_drops_them_have_no_class(planned, data: Path):
    grid = dataclasses.replace(GRID, high=(10.0, GRID.high[1], GRID.high[2]), out_of_range="drop")
    settings = dataclasses.replace(planned, model=dataclasses.replace(planned.model, grid=grid))
    module = curbnet.RECIPE.module(settings, curbnet.RECIPE.model(settings)).eval()
    scan = first_scan(data, settings)
    prediction = module.predict_step([scan], 0)[0]
    inside = grid.inside(scan.cloud.xyz)
    assert 0 < inside.sum() < len(scan)
    assert (prediction.first[~inside] == 0).all()
    assert (prediction.first[inside] > 0).all()


def curb_scores(scan, data: StreetData) -> np.ndarray:
    """Probabilities that say the truth."""
    return np.eye(len(data.label_map), dtype=np.float32)[scan.classes] * 0.6 + 0.05


def test_curb_points_on_no_curve_become_their_second_class(data: Path):
    settings = NetworkData(crop="all")
    scan = load_scan(find_scans(data, settings, "train")[0], settings)
    scores = curb_scores(scan, settings)
    far = np.flatnonzero((scan.classes == 4) & (np.hypot(*scan.cloud.xyz[:, :2].T) > 20))[0]
    scores[far] = (0, 0.6, 0.1, 0.3, 0.0)  # a lonely point that looks like a curb, then a sidewalk
    prediction = finish(scan, scores, settings)
    assert prediction.first[far] == 1
    assert prediction.classes[far] == 3
    assert prediction.curbs
    kept = finish(scan, scores, dataclasses.replace(settings, clean=False))
    assert kept.classes[far] == 1
    others = finish(scan, scores, dataclasses.replace(settings, revert="others"))
    assert others.classes[far] == 4
    assert (others.classes == 1).sum() == (prediction.classes == 1).sum()
    known = ("ignore=0:0#000000", "curb=3:3#00ff00", "road=40:40#ff00ff")
    without = dataclasses.replace(settings, revert="others", classes=known)
    with pytest.raises(InputError, match="no class 'others'"):
        finish(scan, scores[:, :3], without)
    hit = ((prediction.classes == 1) & (scan.classes == 1)).sum()
    assert hit > 0.6 * (scan.classes == 1).sum()


def test_distances_are_measured_in_the_plane_or_in_space(data: Path):
    """A wall above a curb is at the curb in the plane alone."""
    settings = StreetData()
    scan = load_scan(find_scans(data, settings, "train")[0], settings)
    xyz = np.array([[5.0, 3.0, -1.6], [5.0, 3.0, 1.0]])
    truth, found = np.array([1, 4]), np.array([4, 1])
    above = dataclasses.replace(scan.cloud, xyz=xyz, rows=np.arange(2), intensity=None, ring=None)
    case = dataclasses.replace(scan, cloud=above, classes=truth)
    zeros = np.zeros(2, dtype=np.float32)
    said = StreetPrediction(
        name="0", scan=case, classes=found, first=found, curb_score=zeros, curbs=()
    )
    hits = {
        distance: score(said, StreetData(distance=distance))[-1]["curb hit 0.2"]
        for distance in ("xy", "xyz")
    }
    assert hits == {"xy": 1, "xyz": 0}


def test_predict_writes_a_label_for_every_row_and_what_else_is_asked_for(
    run: Path, data: Path, tmp_path: Path
):
    source = data / "sequences" / "11" / "velodyne" / "000000.bin"
    found = call(APP, "predict", run, source, "--out", tmp_path / "all", "--device", "cpu")
    names = {Path(name).name for name in found["files"]}
    assert names == {
        "000000.label", "000000_classes.ply", "000000_curbs.csv",
        "000000_curbs.local.geojson", "000000_birds-eye.png", "000000_view.png",
    }  # fmt: skip
    cloud = read_cloud(source)
    raw = read_labels(tmp_path / "all" / "000000.label", count=cloud.rows_in_file)
    assert set(raw) <= {3, 4, 40, 48}
    written = read_cloud(tmp_path / "all" / "000000_classes.ply")
    np.testing.assert_allclose(written.xyz, cloud.xyz, atol=1e-5)
    with Image.open(tmp_path / "all" / "000000_view.png") as picture:
        assert np.asarray(picture).std() > 5
    words = ("--data.write", "label", "geojson", "osm", "--data.map-origin", "48.1,11.5,500,30")
    few = call(APP, "predict", run, source, "--out", tmp_path / "few", "--device", "cpu", *words)
    assert {Path(name).name for name in few["files"]} == {
        "000000.label", "000000_curbs.geojson", "000000_curbs.osm",
    }  # fmt: skip
    collection = json.loads((tmp_path / "few" / "000000_curbs.geojson").read_text())
    assert "heed:crs" not in collection
    for feature in collection["features"]:
        for longitude, latitude, _ in feature["geometry"]["coordinates"]:
            assert abs(latitude - 48.1) < 0.002
            assert abs(longitude - 11.5) < 0.002


def test_a_stream_is_in_natural_order_and_resumed(run: Path, data: Path, tmp_path: Path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    source = data / "sequences" / "11" / "velodyne" / "000000.bin"
    for name in ("scan10", "scan9", "scan1"):
        (inputs / f"{name}.bin").write_bytes(source.read_bytes())
    words = ("--out", tmp_path / "out", "--device", "cpu", "--data.write", "label")
    found = call(APP, "predict", run, inputs, *words)
    assert [row["case"] for row in found["predictions"]] == ["scan1", "scan9", "scan10"]
    (tmp_path / "out" / "scan9.label").unlink()
    again = call(APP, "predict", run, inputs, *words, "--resume")
    assert [row["case"] for row in again["predictions"]] == ["scan9"]
    assert again["earlier"] == 2


def test_evaluate_scores_points_and_curves_within_the_region(run: Path, data: Path):
    found = call(APP, "evaluate", run, "--split", "test", "--device", "cpu")
    assert found["n"] == 2
    rows = found["tables"]["curbs"]
    assert [(row["output"], row["mean"]) for row in rows] == [
        (output, mean) for output in ("points", "with curves") for mean in ("micro", "macro")
    ]
    tolerances = [
        row["f1"] for row in found["tables"]["curbs with a tolerance"] if row["output"] == "points"
    ]
    assert tolerances == sorted(tolerances)
    near = call(APP, "evaluate", run, "--device", "cpu", "--data.roi", "forward:10")
    assert 0 < near["metrics"]["points"] < found["metrics"]["points"]


def test_compare_finds_what_evaluate_finds(run: Path, data: Path, tmp_path: Path):
    words = ("--device", "cpu", "--data.roi", "forward")
    scores = call(APP, "evaluate", run, "--split", "test", *words)["metrics"]
    out = tmp_path / "predictions"
    call(
        APP,
        "predict",
        run,
        data / "sequences",
        "--out",
        out,
        "--device",
        "cpu",
        "--data.write",
        "label",
    )
    found = call(APP, "compare", out / "11", data / "sequences" / "11", "--out", tmp_path / "table")
    assert found["n"] == 2
    for name in ("miou", "curb_f1", "curb_precision_0.1"):
        assert found["metrics"][name] == pytest.approx(scores[name])
    other = {"tolerances-m": (0.0, 0.3), "distance": ("xyz",)}
    flags = [word for name, values in other.items() for word in (f"--data.{name}", *values)]
    scores = call(APP, "evaluate", run, "--split", "test", *words, *flags)["tables"]
    flags = [word for name, values in other.items() for word in (f"--{name}", *values)]
    found = call(APP, "compare", out / "11", data / "sequences" / "11", *flags)["tables"]
    title = "curbs with a tolerance"
    assert [row["tolerance_m"] for row in found[title]] == [0.0, 0.3]
    assert found[title] == [row for row in scores[title] if row["output"] == "with curves"]
    assert (tmp_path / "table" / "metrics.json").exists()
    labels = tmp_path / "only-labels"
    labels.mkdir()
    for path in (data / "sequences" / "11" / "labels").glob("*.label"):
        (labels / path.name).write_bytes(path.read_bytes())
    bare = call(APP, "compare", labels, labels)
    assert bare["metrics"]["curb_f1"] == 1
    assert "curbs with a tolerance" not in bare["tables"]


def test_a_scan_is_known_by_its_sequence_and_name():
    assert key_of(Path("sequences/08/predictions/000123")) == ("08", "000123")
    assert key_of(Path("08/000123")) == ("08", "000123")
    assert key_of(Path("07/000123")) != ("08", "000123")


def test_view_draws_scans_with_and_without_labels(data: Path, tmp_path: Path):
    source = data / "sequences" / "00"
    found = call(APP, "view", source, "--out", tmp_path / "labelled")
    assert found["n"] == 3
    assert all(row["colours"] == "classes" for row in found["scans"])
    assert len(found["files"]) == 6
    (tmp_path / "bare.bin").write_bytes((source / "velodyne" / "000000.bin").read_bytes())
    found = call(APP, "view", tmp_path / "bare.bin", "--out", tmp_path / "values")
    assert found["scans"][0]["colours"] == "intensity"


def test_streets_are_made_in_any_number_and_of_any_size(data: Path, tmp_path: Path):
    sensor = ("--sensor.beams", 24, "--sensor.azimuth-step-deg", 1, "--sensor.field-of-view-deg")
    words = ("--train", 4, "--val", 0, "--test", 1, *sensor)
    out = tmp_path / "made"
    found = call(APP, "make-streets", out, *words, 180)
    assert found["n"] == 5
    counts = {row["split"]: row["scans"] for row in call(APP, "check", "curbnet", out)["counts"]}
    assert counts == {"train": 4, "test": 1}
    for number in range(3):  # of the same sensor and seed
        name = f"sequences/00/velodyne/{number:06d}.bin"
        assert (out / name).read_bytes() == (data / name).read_bytes()
    call(APP, "make-streets", tmp_path / "near", *words, 180, "--sensor.range-m", 20, "--test", 0)
    cloud = read_cloud(tmp_path / "near/sequences/00/velodyne/000000.bin")
    assert np.linalg.norm(cloud.xyz, axis=1).max() < 21
    assert not (tmp_path / "near/sequences/11").exists()


def test_curb_labels_are_derived_into_a_data_set_of_their_own(data: Path, tmp_path: Path):
    found = call(APP, "make-curb-labels", data, "--out", tmp_path / "derived")
    assert found["n"] == 6
    settings = NetworkData()
    scans = find_scans(tmp_path / "derived", settings, "train")
    assert len(scans) == 3
    original = load_scan(find_scans(data, settings, "train")[0], settings)
    derived = load_scan(scans[0], settings)
    np.testing.assert_array_equal(derived.cloud.xyz, original.cloud.xyz)


def test_scores_on_derived_labels_say_so(run: Path, data: Path, tmp_path: Path):
    derived = tmp_path / "derived"
    call(APP, "make-curb-labels", data, "--out", derived)
    found = call(APP, "evaluate", run, "--data", derived, "--split", "val", "--device", "cpu")
    assert found["metrics"]["scans_with_derived_labels"] == 1
    assert "curbs (derived labels)" in found["tables"]
    found = call(APP, "compare", data, derived)
    assert found["metrics"]["scans_with_derived_labels"] == 6
    assert all(title.endswith("(derived labels)") for title in found["tables"])
    only = derived / "sequences" / "00" / "labels"
    assert "classes (derived labels)" in call(APP, "compare", only, only)["tables"]
    found = call(APP, "check", "curbnet", derived)
    assert any("6 scans have derived labels" in line for line in found["warnings"])
    assert found["counts"][0]["derived labels"] == 3
    found = call(APP, "compare", derived, data)
    assert "classes" in found["tables"]
    assert "scans_with_derived_labels" not in found["metrics"]


def test_doctor_lists_the_sparse_back_ends(monkeypatch: pytest.MonkeyPatch):
    rows = call(APP, "doctor")["sparse_back_ends"]
    assert next(row["back-end"] for row in rows if row["used"] == "yes") == "torch"
    monkeypatch.setenv("HEED_SPARSE_BACKEND", "reference")
    rows = call(APP, "doctor")["sparse_back_ends"]
    assert next(row["back-end"] for row in rows if row["used"] == "yes") == "reference"


def test_doctor_says_that_the_environment_names_no_back_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HEED_SPARSE_BACKEND", "spcnov")
    found = call(APP, "doctor")
    first, *others = found["sparse_back_ends"]
    assert "HEED_SPARSE_BACKEND must be" in first["why"]
    assert "'spcnov'" in first["why"]
    assert {"torch", "spconv", "reference"} <= {row["back-end"] for row in others}
    assert {row["used"] for row in found["sparse_back_ends"]} == {"no"}
    assert found["versions"]


def test_explanations_hold_what_they_say(module, planned, data: Path):
    scan = first_scan(data, planned)
    prediction = module.predict_step([scan], 0)[0]
    found = explain_network(module, prediction)
    assert set(found.figures) == {
        "prediction", "height", "gradient", "scales", "columns_down0", "columns_up3",
        "channels_down0", "channels_up3",
    }  # fmt: skip
    assert found.arrays["gradient_x_input"].shape == (len(scan),)
    assert np.abs(found.arrays["gradient_x_input"]).max() > 0
    assert found.arrays["height_logit_fall"].shape == (len(HEIGHTS_M) - 1,)
    shares = found.arrays["down0_scale_share"]
    seen = np.isfinite(shares).all(axis=1)
    assert seen.sum() >= 4
    np.testing.assert_allclose(shares[seen].sum(axis=1), 1, rtol=1e-5)
    entropy = found.arrays["down0_column_entropy"]
    assert len(entropy) == len(found.arrays["column_cells"])
    assert ((entropy > 0) & (entropy <= 1 + 1e-6)).all()


def test_explanations_of_points_are_coloured_clouds(module, planned, data: Path, tmp_path: Path):
    scan = first_scan(data, planned)
    found = explain_network(module, module.predict_step([scan], 0)[0])
    assert set(found.files) == {
        "gradient.ply", "columns_down0.ply", "columns_up3.ply", "channels_down0.ply",
        "channels_up3.ply",
    }  # fmt: skip
    for name, write in found.files.items():
        write(tmp_path / name)
    values = read_ply(tmp_path / "channels_up3.ply", CloudOptions()).values
    np.testing.assert_allclose(
        np.stack([values[axis] for axis in "xyz"], 1), scan.cloud.xyz, atol=1e-4
    )
    np.testing.assert_array_equal(
        np.unique(values["channel"]), np.unique(found.arrays["up3_column_channel"])
    )
    np.testing.assert_allclose(
        np.unique(values["entropy"]),
        np.unique(found.arrays["up3_column_entropy"].astype(np.float32)),
    )
    colours = np.stack([values[band] for band in ("red", "green", "blue")], 1)
    for channel in np.unique(values["channel"]):
        assert len(np.unique(colours[values["channel"] == channel], axis=0)) == 1
    gradient = read_ply(tmp_path / "gradient.ply", CloudOptions()).values
    np.testing.assert_array_equal(gradient["gradient_x_input"], found.arrays["gradient_x_input"])


def test_weights_of_columns_belong_to_the_columns_that_are_named(module, planned, data: Path):
    scan = first_scan(data, planned)
    prediction = module.predict_step([scan], 0)[0]
    seen = look(module, prediction)
    columns = np.unique(seen.cells[:, :2], axis=0)
    for weights in seen.weights.values():
        assert weights.shape[0] == len(columns)
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)


def test_a_slice_without_points_changes_nothing_and_one_with_points_moves_them(
    module, planned, data: Path
):
    scan = first_scan(data, planned)
    prediction = module.predict_step([scan], 0)[0]
    falls, counts = occlusion(module, prediction, ask(module, prediction))
    assert counts[HEIGHTS_M.index(0.0)] > 0
    assert (falls[counts == 0] == 0).all()
    assert np.abs(falls[counts > 0]).max() > 0


def test_without_curb_points_the_most_likely_ones_are_asked_about(module, planned, data: Path):
    scan = first_scan(data, planned)
    prediction = module.predict_step([scan], 0)[0]
    none = dataclasses.replace(prediction, first=np.full(len(scan), 2))
    asked = ask(module, none)
    assert isinstance(asked, Question)
    assert len(asked.rows) == max(1, round(0.01 * len(scan)))
    rest = np.delete(none.curb_score, asked.rows)
    assert none.curb_score[asked.rows].min() >= rest.max()


def test_even_weights_have_entropy_one_and_a_single_channel_zero():
    weights = np.array([[0.25] * 4, [1, 0, 0, 0]], dtype=np.float32)
    np.testing.assert_allclose(entropy_of(weights), [1, 0], atol=1e-7)


def test_a_scale_that_gives_nothing_has_no_share(module):
    block = module.model.down[0].body
    rng = torch.Generator().manual_seed(0)
    width = block.fuse.weight.shape[0]
    planes = [[torch.randn(5, width, generator=rng) for _ in range(3)] for _ in range(3)]
    planes[1] = [torch.zeros(5, width) for _ in range(3)]
    shares = pyramid_shares(block, planes)
    assert (shares[:, 1] == 0).all()
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    with torch.no_grad():  # the parts add up to what the fusion computes
        x = [torch.stack(list(plane)).sum(dim=0) for plane in planes]
        levels = [x[0] + x[1] + x[2], x[1] + x[2], x[2]]
        whole = block.fuse(torch.cat(levels, dim=1))
        parts = block.fuse.weight.reshape(width, 3, -1)
        summed = sum(x[s] @ parts[:, : s + 1].sum(dim=1).T for s in range(3))
    torch.testing.assert_close(whole, summed)


def test_the_detector_keeps_the_thresholds_with_the_best_f1(data: Path, tmp_path: Path):
    flags = ("--training.lowest-steps-m", "0.02", "0.4", "--training.height-stds-m", "0.01",
             "--training.min-rings", "2")  # fmt: skip
    found = call(APP, "train", "classical", "--data", data, "--out", tmp_path / "run", *flags)
    settings = classical.ClassicalSettings(
        training=classical.ClassicalTraining(
            lowest_steps_m=(0.02, 0.4), height_stds_m=(0.01,), min_rings=(2,)
        )
    )
    from safetensors.torch import load_file

    counts = load_file(tmp_path / "run" / "model" / "model.safetensors")["counts"]
    detector = classical.Detector(classical.candidates(settings))
    detector.load_state_dict({"counts": counts})
    assert counts.shape == (3, 3)
    true, predicted, hit = counts.unbind(1)
    assert (true == true[0]).all()
    assert (hit <= torch.minimum(true, predicted)).all()
    best = int((2 * hit / (true + predicted)).argmax())
    assert detector.config == classical.candidates(settings)[best]
    assert detector.config.height_range_m[0] < 0.4  # no curb is that high
    assert found["metrics"]["val/curb_f1"] >= 0
    explained = call(APP,
        "explain", tmp_path / "run", data / "sequences" / "11" / "velodyne" / "000000.bin",
        "--out", tmp_path / "why", "--device", "cpu",
    )  # fmt: skip
    arrays = np.load(next(name for name in explained["files"] if name.endswith(".npz")))
    assert {"stage", "rows", "passed_gap", "passed_height_range"} <= set(arrays)
    assert set(np.unique(arrays["stage"])) <= set(range(6))


def test_bench_names_its_contenders_and_stages(monkeypatch: pytest.MonkeyPatch):
    from heed_lidar_cli import benchmarks

    monkeypatch.setattr(benchmarks, "SENSOR", SENSOR)
    benchmarks.street.cache_clear()
    flags = ("--model.width", "4", "--model.grid.shape", "48", "36", "8", "--device", "cpu")
    words = ("--rounds", "1", "--no-memory", "--modes", "inference")
    try:
        found = call(APP, "bench", "curbnet", *words, *flags)
    finally:
        benchmarks.street.cache_clear()
    names = [row["name"] for row in found["rows"]]
    assert names[0] == "heed, auto"
    assert "heed, torch" in names
    assert names[-1] == "its matrix products alone"
    assert (
        "48.3 ms" in {row["name"]: row["why"] for row in found["missing"]}["the paper's, RTX 3090"]
    )
    stages = [row["stage"] for row in found["stages"]]
    assert stages == ["voxels", "point features", "rulebooks", "convolutions", "curb lines"]
    assert all(row["calls_per_s"] > 0 for row in found["stages"])
    assert call(APP, "bench", "classical", *words)["rows"][0]["ms"] > 0


def test_a_fifth_of_the_curb_points_of_the_benchmark_are_none(monkeypatch: pytest.MonkeyPatch):
    from heed_lidar_cli import benchmarks

    monkeypatch.setattr(benchmarks, "SENSOR", SENSOR)
    benchmarks.street.cache_clear()
    try:
        scan = benchmarks.street()
    finally:
        benchmarks.street.cache_clear()
    xyz, score = benchmarks.curb_points(scan, seed=0)
    true = {tuple(point) for point in scan.xyz[scan.raw == CURB_RAW]}
    false = [tuple(point) not in true for point in xyz]
    assert np.mean(false) == pytest.approx(0.2, abs=0.01)
    assert len(np.unique(xyz, axis=0)) == len(xyz) == len(score)


def test_the_products_of_the_benchmark_are_all_products_of_the_network(
    monkeypatch: pytest.MonkeyPatch,
):
    from heed_lidar_cli import benchmarks

    monkeypatch.setattr(benchmarks, "SENSOR", SENSOR)
    benchmarks.street.cache_clear()
    try:
        scan = benchmarks.inputs(GRID)
        build = functools.partial(CurbNet, CurbNetConfig(width=4, grid=GRID))
        products = benchmarks.products_of(build, GRID)
    finally:
        benchmarks.street.cache_clear()
    with torch.no_grad(), FlopCounterMode(display=False) as all_of_them:
        build().eval()(*scan, batch_size=1)
    with torch.no_grad(), FlopCounterMode(display=False) as alone:
        products(*scan)
    assert alone.get_total_flops() == all_of_them.get_total_flops() > 1e6


@pytest.mark.parametrize(
    "recipe", [curbnet.RECIPE, cylinder3d.RECIPE], ids=["curbnet", "cylinder3d"]
)
def test_the_peer_on_spconv_computes_the_same(recipe: Recipe):
    pytest.importorskip("spconv", reason="spconv is not installed")
    from heed_lidar_cli.spconv_peer import SpconvPeer
    from heed_lidar_cli.street import PointLogits

    settings = recipe.presets["tiny"]()
    model = dataclasses.replace(settings.model, width=4, grid=GRID)
    torch.manual_seed(0)
    network = recipe.model(dataclasses.replace(settings, model=model)).eval()
    points, index = scattered(GRID, 700, seed=1)
    with torch.no_grad():
        ours = PointLogits(network)(points, index)
        theirs = SpconvPeer(network, native=True).eval()(points, index)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
