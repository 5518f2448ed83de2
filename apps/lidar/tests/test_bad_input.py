"""What a user sees when a file is broken: one line that names it, exit code 2, nothing lost."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from heed_lidar.clouds.ply import write_ply
from heed_lidar.scenes.files import SceneSet, write_scenes
from heed_lidar.scenes.sensor import Sensor
from heed_lidar_cli import APP

QUICK = [
    *("--trainer.max-steps", "1", "--trainer.batch", "2", "--device", "cpu"),
    *("--model.width", "4", "--model.grid.shape", "48", "36", "8"),
]
SENSOR = Sensor(beams=24, azimuth_step_deg=1.0, field_of_view_deg=180.0)


def call(*words: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = APP.call([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def refusal(*words: object) -> str:
    """The one line that a refused command says."""
    code, out, err = call(*words)
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1, err
    return lines[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set, and a run of one step on it."""
    root = tmp_path_factory.mktemp("made")
    write_scenes(root / "data", SceneSet(sequences={"00": 2, "02": 1, "11": 2}, sensor=SENSOR))
    code, _, err = call("train", "curbnet", "--data", root / "data", "--out", root / "run", *QUICK)
    assert code == 0, err
    return root


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "data", tmp_path / "data"))


def scan(data: Path, number: int = 0, sequence: str = "00") -> Path:
    return data / "sequences" / sequence / "velodyne" / f"{number:06d}.bin"


def labels(data: Path, number: int = 0) -> Path:
    return data / "sequences" / "00" / "labels" / f"{number:06d}.label"


def assert_refused_everywhere(data: Path, tmp_path: Path, *said: str) -> None:
    """`train` refuses with the file's name and leaves no run; `check` lists it and exits with 1."""
    line = refusal("train", "curbnet", "--data", data, "--out", tmp_path / "run", *QUICK)
    for word in said:
        assert word in line, line
    assert not (tmp_path / "run").exists()
    code, out, _ = call("check", "curbnet", data, "--json")
    assert code == 1
    problems = json.loads(out)["problems"]
    assert any(said[0] in problem for problem in problems), problems


@pytest.mark.parametrize("keep", [0, 7, 1001])
def test_a_truncated_scan(data: Path, tmp_path: Path, keep: int):
    path = scan(data)
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused_everywhere(data, tmp_path, path.name)


def test_labels_of_another_length(data: Path, tmp_path: Path):
    path = labels(data)
    path.write_bytes(path.read_bytes()[:-40])
    assert_refused_everywhere(data, tmp_path, path.name)


def test_a_truncated_label_file(data: Path, tmp_path: Path):
    path = labels(data)
    path.write_bytes(path.read_bytes()[:-3])
    assert_refused_everywhere(data, tmp_path, path.name, "multiple of 4")


def test_an_unknown_raw_id(data: Path, tmp_path: Path):
    path = labels(data)
    raw = np.fromfile(path, dtype="<u4")
    raw[5] = 777
    raw.tofile(path)
    assert_refused_everywhere(data, tmp_path, path.name, "777")


def test_a_scan_without_labels(data: Path, tmp_path: Path):
    labels(data).unlink()
    assert_refused_everywhere(data, tmp_path, scan(data).name)


def test_labels_without_any_class_that_counts(data: Path, tmp_path: Path):
    for number in (0, 1):
        raw = np.fromfile(labels(data, number), dtype="<u4")
        np.zeros_like(raw).tofile(labels(data, number))
    line = refusal("train", "curbnet", "--data", data, "--out", tmp_path / "run", *QUICK)
    assert "no point of the training scans has a class that counts" in line


def test_a_crop_that_leaves_nothing(data: Path, tmp_path: Path):
    words = ["--data", data, "--out", tmp_path / "run", "--data.crop", "900:901,900:901", *QUICK]
    line = refusal("train", "curbnet", *words)
    assert scan(data).name in line
    assert "--data.crop" in line


def test_a_crop_that_leaves_one_voxel_is_trained_on(data: Path, tmp_path: Path):
    for number in (0, 1):
        points = np.full((3, 4), 0.001, dtype="<f4") * np.arange(3, dtype="<f4")[:, None]
        (points + np.array([5, 0.5, -1.7, 0.2], dtype="<f4")).tofile(scan(data, number))
        np.full(3, 40, dtype="<u4").tofile(labels(data, number))
    words = ["--trainer.batch", "1", "--training.augmentation.rotate-deg", "0"]
    line = ("train", "curbnet", "--data", data, "--out", tmp_path / "run", *QUICK, *words)
    code, _, err = call(*line)
    assert code == 0, err


def test_an_empty_folder(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    line = refusal("train", "curbnet", "--data", tmp_path / "empty", "--out", tmp_path / "run")
    assert "empty" in line
    assert not (tmp_path / "run").exists()


def test_a_split_that_does_not_exist(made: Path):
    line = refusal("evaluate", made / "run", "--data", made / "data", "--split", "nosuch")
    assert "has no split 'nosuch'; use train, val, test" in line


def test_classes_without_curbs(data: Path, tmp_path: Path):
    words = ["--data", data, "--out", tmp_path / "run", "--data.labels", "semantic-kitti", *QUICK]
    line = refusal("train", "curbnet", *words)
    assert "'curb'" in line
    assert "cylinder3d" in line
    assert "no class 'curb'" in refusal("train", "classical", *words[: -len(QUICK)])


def test_a_label_map_without_the_key_that_is_needed(data: Path, tmp_path: Path):
    (tmp_path / "map.yaml").write_text("labels: {0: unlabeled, 3: curb}\n")
    words = ["--data", data, "--data.labels", tmp_path / "map.yaml", "--out", tmp_path / "run"]
    line = refusal("train", "curbnet", *words, *QUICK)
    assert "map.yaml" in line
    assert "learning_map" in line
    assert "none.yaml" in refusal("train", "curbnet", "--data.labels", tmp_path / "none.yaml",
                                  "--data", data, "--out", tmp_path / "run")  # fmt: skip


def test_points_that_are_not_numbers_are_left_out_and_get_no_class(
    made: Path, data: Path, tmp_path: Path
):
    path = scan(data)
    points = np.fromfile(path, dtype="<f4").reshape(-1, 4)
    points[3:6, 1] = np.nan
    points[9, :3] = 0
    points.tofile(path)
    words = ["--out", tmp_path / "out", "--device", "cpu", "--data.write", "label"]
    assert call("predict", made / "run", path, *words)[0] == 0
    raw = np.fromfile(tmp_path / "out" / "000000.label", dtype="<u4")
    assert len(raw) == len(points)
    assert set(np.flatnonzero(raw == 0)) == {3, 4, 5, 9}
    points[:, 0] = np.nan
    points.tofile(path)
    assert path.name in refusal("predict", made / "run", path, "--out", tmp_path / "again")


def test_an_empty_scan_is_refused_alone_and_an_empty_result_in_a_stream(
    made: Path, data: Path, tmp_path: Path
):
    path = scan(data)
    path.write_bytes(b"")
    assert path.name in refusal("predict", made / "run", path, "--out", tmp_path / "alone")
    folder = data / "sequences" / "00"
    words = ("predict", made / "run", folder, "--out", tmp_path / "out", "--device", "cpu")
    code, out, err = call(*words, "--json")
    assert code == 0, err
    assert json.loads(out)["n"] == 2
    assert path.name in err
    assert (tmp_path / "out" / "000000.label").stat().st_size == 0
    assert (tmp_path / "out" / "000001.label").stat().st_size > 0


def test_columns_that_do_not_fit_the_file(made: Path, data: Path, tmp_path: Path):
    path = scan(data)
    points = np.fromfile(path, dtype="<f4").reshape(-1, 4)
    points[:-1].tofile(path)  # so that the rows of 4 are no rows of 5
    words = ("predict", made / "run", path, "--out", tmp_path / "out")
    line = refusal(*words, "--data.columns", "x", "y", "z", "intensity", "ring")
    assert path.name in line
    assert "--data.columns" in line or "columns" in line
    assert "columns must name x, y and z" in refusal(*words, "--data.columns", "a", "b")


def test_a_file_that_is_no_cloud(made: Path, tmp_path: Path):
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "cloud.ply").write_text("ply\nformat ascii 1.0\nend_header\n")
    for name in ("notes.md", "cloud.ply", "missing.bin"):
        line = refusal("predict", made / "run", tmp_path / name, "--out", tmp_path / "out")
        assert name in line


def test_a_broken_scan_stops_a_stream_or_is_skipped_and_listed(
    made: Path, data: Path, tmp_path: Path
):
    scan(data, 1).write_bytes(b"12345")
    folder = data / "sequences" / "00"
    words = ("predict", made / "run", folder, "--out", tmp_path / "out", "--device", "cpu")
    assert "000001.bin" in refusal(*words)
    assert (tmp_path / "out" / "000000.label").exists()
    code, out, err = call(*words, "--resume", "--data.on-error", "skip", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["n"], found["earlier"], len(found["skipped"])) == (0, 1, 1)
    assert "000001.bin" in err
    code, out, err = call(*words, "--overwrite", "--data.on-error", "skip", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["n"], len(found["skipped"])) == (1, 1)
    entries = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert all("000001.bin" in json.loads(line)["error"] for line in entries)


@pytest.mark.parametrize("inner", ["", "found"])
def test_predictions_are_not_taken_for_scans(made: Path, tmp_path: Path, inner: str):
    folder = Path(shutil.copytree(made / "data/sequences/11/velodyne", tmp_path / "scans"))
    words = ("predict", made / "run", folder, "--out", folder / inner, "--device", "cpu", "--json")
    code, out, err = call(*words, "--data.write", "ply", "csv")
    assert code == 0, err
    assert json.loads(out)["n"] == 2
    code, out, err = call(*words, "--data.write", "ply", "csv", "--resume")
    assert code == 0, err
    found = json.loads(out)
    assert (found["n"], found["earlier"]) == (0, 2)
    assert "left out" not in err
    code, out, err = call("view", folder / inner / "000000_classes.ply", "--out", tmp_path / "v")
    assert code == 0, err


def test_a_prediction_beside_its_scan_leaves_the_scan_as_it_was(made: Path, tmp_path: Path):
    xyz = np.random.default_rng(0).uniform((2, -9, -2), (9, 9, -1), (2000, 3))
    write_ply(tmp_path / "a.ply", xyz)
    before = (tmp_path / "a.ply").read_bytes()
    words = ("predict", made / "run", tmp_path, "--out", tmp_path, "--overwrite")
    for _ in range(2):
        code, out, err = call(*words, "--device", "cpu", "--json")
        assert code == 0, err
        assert json.loads(out)["n"] == 1
    assert (tmp_path / "a.ply").read_bytes() == before


@pytest.mark.parametrize("out", ["data", "data/sequences/11", "data/sequences/11/labels", "found"])
def test_compare_replaces_no_folder_that_it_reads(data: Path, tmp_path: Path, out: str):
    found = Path(shutil.copytree(data / "sequences/11/labels", tmp_path / "found" / "11"))
    before = sorted(tmp_path.rglob("*"))
    line = refusal("compare", found.parent, data, "--out", tmp_path / out, "--overwrite")
    assert f"{tmp_path / out}: holds files that are read here" in line
    assert sorted(tmp_path.rglob("*")) == before
    scores = tmp_path / "found" / "scores"
    for _ in range(2):
        words = ("compare", found.parent, data, "--out", scores, "--overwrite")
        assert call(*words)[0] == 0


def test_links_of_derived_labels_are_predicted(made: Path, data: Path, tmp_path: Path):
    words = ("make-curb-labels", data, "--out", tmp_path / "derived")
    assert call(*words)[0] == 0
    words = ("predict", made / "run", tmp_path / "derived", "--out", tmp_path / "out", "--json")
    code, out, err = call(*words, "--data.write", "label", "--device", "cpu")
    assert code == 0, err
    assert json.loads(out)["n"] == 5


def test_a_grid_that_does_not_fit_the_weights(made: Path, tmp_path: Path):
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    config = run / "config.yaml"
    text = config.read_text()
    assert "- 48\n    - 36\n    - 8\n" in text
    config.write_text(text.replace("- 48\n    - 36\n    - 8\n", "- 48\n    - 36\n    - 16\n"))
    line = refusal("evaluate", run, "--data", made / "data", "--split", "val")
    assert "model.safetensors" in line
    words = ("predict", made / "run", made / "data", "--out", tmp_path / "out")
    assert "unknown flag --model.grid" in refusal(*words, "--model.grid.shape", "48", "36", "16")


def test_classes_cannot_be_changed_after_training(made: Path, tmp_path: Path):
    words = ("predict", made / "run", made / "data", "--out", tmp_path / "out")
    assert "--data.labels is settled" in refusal(*words, "--data.labels", "curb-only")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--data.roi", "backwards"), "roi"),
        (("--data.write", "label", "label"), "write"),
        (("--data.write", "osm"), "map_origin"),
        (("--data.map-origin", "95,0"), "latitude"),
        (("--data.curves.eps-m", "0"), "eps_m"),
        (("--data.tolerances-m", "-1"), "tolerances"),
        (("--data.no-clean", "--data.revert", "others"), "revert"),
    ],
)
def test_settings_without_sense_are_refused(
    made: Path, tmp_path: Path, flags: tuple[str, ...], said: str
):
    line = refusal("predict", made / "run", made / "data", "--out", tmp_path / "out", *flags)
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_system_and_an_unknown_key(made: Path, tmp_path: Path):
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("system: curbnet", "system: msga"))
    assert "msga" in refusal("evaluate", run)
    (tmp_path / "mine.yaml").write_text("model:\n  widht: 8\n")
    words = ("train", "curbnet", "--config", tmp_path / "mine.yaml", "--out", tmp_path / "new")
    line = refusal(*words)
    assert "model.widht" in line
    assert "mine.yaml" in line


def test_a_folder_that_holds_a_run_is_kept(made: Path):
    before = {path: path.stat().st_mtime_ns for path in (made / "run").rglob("*")}
    line = refusal("train", "curbnet", "--data", made / "data", "--out", made / "run", *QUICK)
    assert "--overwrite" in line
    assert {path: path.stat().st_mtime_ns for path in (made / "run").rglob("*")} == before


def test_the_verbs_of_the_domain_refuse_in_one_line(made: Path, tmp_path: Path):
    assert "no/such" in refusal("compare", "no/such", made / "data")
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal("compare", tmp_path / "empty", made / "data")
    stray = tmp_path / "stray" / "77"
    stray.mkdir(parents=True)
    np.zeros(4, dtype="<u4").tofile(stray / "000000.label")
    assert "has no labels for" in refusal("compare", tmp_path / "stray", made / "data")
    assert "roi" in refusal("compare", tmp_path / "stray", made / "data", "--roi", "x")
    words = ("compare", tmp_path / "stray", made / "data", "--tolerances-m")
    assert "tolerances_m must not be negative, got (-1.0,)" in refusal(*words, "-1")
    for flags in (("--roi", "all"), ("--tolerances-m", "0.3"), ("--distance", "xyz")):
        line = refusal("compare", tmp_path / "stray", tmp_path / "stray", *flags)
        assert f"{flags[0]} has no effect on a folder of .label files without scans" in line
    words = ("make-curb-labels", made / "data", "--out", made / "data")
    assert "labels" in refusal(*words)
    assert "--out DIR or --window" in refusal("view", scan(made / "data"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--train", "-1"), "train must be within 0..100000, got -1"),
        (("--train", "0", "--val", "0", "--test", "0"), "train, val and test are all 0"),
        (("--sensor.beams", "3"), "beams must be even"),
        (("--sensor.range-m", "nan"), "range_m"),
        (("--curb-height-m", "-1"), "curb_height_m"),
        (("--seed", "-1"), "seed"),
    ],
)
def test_streets_that_cannot_be_made(tmp_path: Path, flags: tuple[str, ...], said: str):
    assert said in refusal("make-streets", tmp_path / "out", *flags)
    assert list(tmp_path.iterdir()) == []


def test_streets_replace_nothing(data: Path):
    before = sorted(data.rglob("*"))
    line = refusal("make-streets", data, "--train", "1")
    assert f"{data}: is not empty; choose another folder" in line
    assert "--overwrite" not in line
    assert sorted(data.rglob("*")) == before


def test_nothing_to_score_is_said_in_one_line(made: Path, data: Path):
    line = refusal("compare", data, data, "--roi", "900:901,900:901")
    assert "no point of 5 scans is in the region that counts" in line
    assert "choose another --roi" in line
    words = ("evaluate", made / "run", "--split", "val", "--data.roi", "900:901,900:901")
    assert "another --data.roi" in refusal(*words)


def test_the_verbs_of_the_domain_name_flags_that_they_have(made: Path, data: Path, tmp_path: Path):
    np.save(tmp_path / "five.npy", np.random.default_rng(0).uniform(1, 9, (2000, 5)))
    words = ("view", tmp_path / "five.npy", "--out", tmp_path / "pictures")
    assert "--data.columns x y z ..." in refusal(*words)
    assert call(*words, "--data.columns", "x", "y", "z", "intensity", "ring")[0] == 0
    raw = np.fromfile(labels(data), dtype="<u4")
    raw[5] = 777
    raw.tofile(labels(data))
    line = refusal("compare", data / "sequences/00/labels", data / "sequences/00/labels")
    assert "--map FILE.yaml" in line
    line = refusal("view", scan(data), "--out", tmp_path / "others")
    assert "--labels FILE.yaml" in line
    assert "--data.labels" not in line


def test_a_detector_is_not_exported(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    words = ("--trainer.max-steps", "1", "--trainer.batch", "2", "--training.min-rings", "4")
    assert call("train", "classical", "--data", data, "--out", run, *words)[0] == 0
    line = refusal("export", run, "--out", tmp_path / "model.pt2")
    assert "nothing to export" in line


def test_a_scan_in_the_coordinates_of_a_map_is_said_once(made: Path, tmp_path: Path):
    for number in range(2):
        points = np.fromfile(scan(made / "data", number, "11"), "<f4").reshape(-1, 4)
        utm = np.add(points[:, :3], [500_123.456, 5_400_789.012, 115.3], dtype=np.float64)
        write_ply(tmp_path / f"{number}.ply", utm)
    words = ("predict", made / "run", tmp_path, "--data.write", "label", "csv")
    code, _, err = call(*words, "--out", tmp_path / "out")
    assert code == 0
    lines = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len([line for line in lines if "--data.origin X Y Z" in line]) == 1
    assert len([line for line in lines if "does not look for curbs" in line]) == 1
    origin = ("--data.origin", "500123.456", "5400789.012", "115.3")
    code, _, err = call(*words, "--out", tmp_path / "other", *origin)
    assert code == 0
    assert "warning: " not in err


def test_compare_says_where_the_sensor_of_a_map_is_taken_to_have_stood(made: Path, tmp_path: Path):
    points = np.fromfile(scan(made / "data"), "<f4").reshape(-1, 4)
    folder = tmp_path / "scans"
    folder.mkdir()
    write_ply(
        folder / "a.ply", np.add(points[:, :3], [500_123.4, 5_400_789.0, 0], dtype=np.float64)
    )
    shutil.copy(labels(made / "data"), folder / "a.label")
    (tmp_path / "found").mkdir()
    shutil.copy(labels(made / "data"), tmp_path / "found" / "a.label")
    words = ("compare", tmp_path / "found", folder, "--roi", "all")
    code, _, err = call(*words)
    assert code == 0
    assert "a: has the coordinates of a map" in err
    code, _, err = call(*words, "--data.origin", "500123.4", "5400789.0", "0")
    assert code == 0
    assert "has the coordinates of a map" not in err
