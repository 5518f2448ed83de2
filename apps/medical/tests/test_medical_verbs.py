"""The verbs that only the medical app has: convert, pair, retrieve, zero-shot, probe."""

import csv
import gzip
import importlib
import io
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_medical.bags.files import read_bag
from heed_medical.bags.listing import find_inputs, list_bags
from heed_medical.bags.settings import BagData
from heed_medical.bags.writing import BAG_LAYOUTS
from heed_medical.classification.findings import Findings, summarise_findings
from heed_medical.classification.metrics import average_precision, roc_auc
from heed_medical.ecg.writing import write_record
from heed_medical.more.network import small_config
from heed_medical.more.pairing import pair_mimic, report_of_findings
from heed_medical.more.prediction import call_findings, first_finding_alone
from heed_medical.more.probes import choose_probe
from heed_medical.more.sample import FINDINGS, make_ecg, make_xray
from heed_medical.more.settings import CHEXPERT
from heed_medical_cli import APP
from heed_runtime.arguments import parse
from heed_runtime.run import Run
from heed_runtime.testing.contract import call, refusal, spoken

# convert


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """Six slides as TRIDENT has them, with labels, patients and splits."""
    root = tmp_path / "slides"
    rng = np.random.default_rng(0)
    (root / "features_uni").mkdir(parents=True)
    rows = ["case_id,slide_id,label,split"]
    for number in range(6):
        count = 5 + number
        with h5py.File(root / "features_uni" / f"s{number}.h5", "w") as file:
            file["features"] = rng.normal(size=(1, count, 8)).astype(np.float16)
            file["coords"] = np.stack([np.arange(count) * 512, np.full(count, 512 * number)], 1)
            file["coords"].attrs["patch_size_level0"] = 512
        split = ("train", "train", "train", "train", "val", "test")[number]
        rows.append(f"p{number // 2},s{number},{'tumor' if number % 2 else 'normal'},{split}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize("layout", BAG_LAYOUTS)
def test_a_converted_data_set_holds_the_same_bags(layout: str, slides: Path, tmp_path: Path):
    out = tmp_path / "out"
    words = ("convert", slides, "--to", layout, "--out", out, "--encoder", "uni")
    found = call(APP, *words)
    assert [row["patches"] for row in found["slides"]] == [5, 6, 7, 8, 9, 10]
    before, after = list_bags(slides, BagData()).files, list_bags(out, BagData()).files
    assert {(f.name, f.label, f.patient, f.split) for f in before} == {
        (f.name, f.label, f.patient, f.split) for f in after
    }
    features = {file.name: read_bag(file) for file in find_inputs([slides], BagData())}
    for file in find_inputs([out], BagData()):
        bag, other = read_bag(file), features[file.name]
        np.testing.assert_array_equal(bag.features, other.features)
        if layout in ("clam", "trident", "acmil"):
            np.testing.assert_array_equal(bag.coords, other.coords)
            assert bag.patch_size == 512
    assert not call(APP, "check", "acmil", out)["problems"]
    if layout == "acmil":
        assert found["labels"] == {"normal": 0, "tumor": 1}
        with h5py.File(out / "patch_feats_pretrain_uni.h5") as file:
            assert [int(file[f"s{n}"].attrs["label"]) for n in range(6)] == [0, 1, 0, 1, 0, 1]
            assert file["s0/feat"].dtype == np.float16
    if layout == "clam":
        assert (out / "pt_files" / "s0.pt").stat().st_size > 0
    assert "out" in refusal(APP, *words)


def test_a_broken_bag_leaves_nothing_or_is_left_out(slides: Path, tmp_path: Path):
    path = slides / "features_uni" / "s2.h5"
    path.write_bytes(path.read_bytes()[:300])
    words = ("convert", slides, "--to", "npy", "--out", tmp_path / "out")
    assert "s2.h5" in refusal(APP, *words)
    assert not (tmp_path / "out").exists()
    found = call(APP, *words, "--data.on-error", "skip")
    assert len(found["slides"]) == 5
    assert len(found["skipped"]) == 1
    (slides / "labels.csv").unlink()
    path.unlink()
    assert "has no label" in refusal(
        APP, "convert", slides, "--to", "csv", "--out", tmp_path / "csv"
    )
    assert len(call(APP, "convert", slides, "--to", "pt", "--out", tmp_path / "pt")["slides"]) == 5


def test_slides_are_not_converted_over_themselves(slides: Path):
    before = sorted(path for path in slides.rglob("*"))
    line = refusal(APP, "convert", slides, "--to", "npy", "--out", slides, "--overwrite")
    assert "holds files that are read here" in line
    assert sorted(path for path in slides.rglob("*")) == before


def test_features_beyond_half_precision_stay_as_they_are(slides: Path, tmp_path: Path):
    with h5py.File(slides / "features_uni" / "s1.h5", "r+") as file:
        values = file["features"][()].astype(np.float32)
        values[0, 0, 0] = -70_000
        del file["features"]
        file["features"] = values
    call(APP, "convert", slides, "--to", "acmil", "--out", tmp_path / "out")
    with h5py.File(tmp_path / "out" / "patch_feats_pretrain_features.h5") as file:
        np.testing.assert_array_equal(file["s1/feat"], values[0])
        assert file["s0/feat"].dtype == np.float16
    assert not call(APP, "check", "acmil", tmp_path / "out")["problems"]


# info


@pytest.mark.parametrize("system", APP.systems)
def test_every_system_tells_what_it_is(system: str):
    found = call(APP, "info", system)
    assert found["system"] == system
    assert found["model"]["parameters"] > 0


@pytest.mark.parametrize("system", APP.systems)
def test_every_system_says_that_it_is_no_device_and_whether_it_is_rebuilt(system: str):
    code, out, _ = spoken(APP, "train", system, "--help")
    told = " ".join(out.split())
    assert code == 0
    assert "research use only: not a medical device" in told
    rebuilt = system in ("medusa", "medusa-body", "medusa-findings", "ivgn")
    assert ("is a reconstruction" in told) == rebuilt


@pytest.mark.parametrize("kind", ["acmil-mha", "gated", "abmil", "mha"])
def test_every_pooling_is_counted(kind: str):
    assert call(APP, "info", "acmil", "--model.kind", kind)["model"]["gflops"] > 0


# pair


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    content = stream.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def mimic(tmp_path: Path) -> tuple[Path, Path]:
    """Three subjects: two with X-rays and ECGs, one with an X-ray alone."""
    cxr, ecg = tmp_path / "cxr", tmp_path / "ecg"
    shots = [  # subject, study, picture, view, date, split
        ("10000001", "501", "a", "PA", "21800101", "train"),
        ("10000001", "501", "b", "LATERAL", "21800101", "train"),
        ("10000001", "502", "c", "AP", "21800601", "train"),
        ("10000002", "503", "d", "PA", "21800101", "test"),
        ("10000003", "504", "e", "PA", "21800101", "validate"),
    ]
    names = ("subject_id", "study_id", "dicom_id", "ViewPosition", "StudyDate")
    write_csv(
        cxr / "mimic-cxr-2.0.0-metadata.csv.gz",
        [dict(zip(names, shot[:5], strict=True)) for shot in shots],
    )
    write_csv(
        cxr / "mimic-cxr-2.0.0-split.csv.gz",
        [{"dicom_id": s[2], "subject_id": s[0], "study_id": s[1], "split": s[5]} for s in shots],
    )
    blank = dict.fromkeys(sorted(CHEXPERT), "")
    write_csv(
        cxr / "mimic-cxr-2.0.0-chexpert.csv.gz",
        [
            {"subject_id": "10000001", "study_id": "501", **blank, "Edema": "1.0"},
            {"subject_id": "10000001", "study_id": "502", **blank, "Fracture": "-1.0",
             "Pneumonia": "1.0"},
        ],
    )  # fmt: skip
    note = cxr / "files/p10/p10000001/s501.txt"
    note.parent.mkdir(parents=True)
    note.write_text(" EXAM: chest\n FINDINGS:  Edema\n  in both lungs.\n IMPRESSION: Edema.\n")
    note.with_name("s502.txt").write_text("FINDINGS: ___ told Dr. ___ at 10:45 AM. IMPRESSION:\n")
    records = [
        ("10000001", "41", "2180-02-15 10:00:00"),
        ("10000001", "42", "2180-03-02 10:00:00"),
        ("10000001", "43", "2180-06-30 23:59:59"),
        ("10000002", "44", "2179-12-01 00:00:00"),
        ("10000009", "45", "2180-01-01 00:00:00"),
    ]
    write_csv(
        ecg / "record_list.csv",
        [
            {"subject_id": s, "study_id": n, "file_name": n, "ecg_time": t,
             "path": f"files/p{s[:4]}/p{s}/s{n}/{n}"}
            for s, n, t in records
        ],
    )  # fmt: skip
    write_csv(
        ecg / "machine_measurements.csv",
        [{"subject_id": "10000001", "study_id": "41", "report_0": "Sinus rhythm",
          "report_1": "", "report_2": "Normal ECG"}],
    )  # fmt: skip
    return cxr, ecg


def test_pairs_are_near_in_time_and_keep_the_official_split(
    mimic: tuple[Path, Path], tmp_path: Path
):
    out = tmp_path / "manifests" / "pairs.csv"
    found = call(APP, "pair", *mimic, "--out", out, "--val-share", 0)
    assert found["pairs"] == {"train": 2, "test": 1}
    assert found["without_report"] == 2
    rows = read_csv(out)
    # 2180-01-01 to 03-02 is 61 days (the year has a 29th of February), to 02-15 it is 45
    assert [(r["xray_study_id"], r["ecg_study_id"], r["days"]) for r in rows] == [
        ("501", "41", "45"), ("502", "43", "29"), ("503", "44", "-31"),
    ]  # fmt: skip
    assert rows[0]["xray_report"] == "Edema in both lungs. Edema."
    assert rows[0]["ecg_report"] == "Sinus rhythm Normal ECG"
    assert rows[1]["xray_report"] == "Pneumonia is present. uncertain finding of Fracture"
    assert rows[2]["xray_report"] == ""
    assert (out.parent / rows[0]["xray_path"]).resolve() == (
        mimic[0] / "files/p10/p10000001/s501/a.jpg"
    )
    assert [row["Edema"] for row in rows] == ["1", "", ""]
    assert len(pair_mimic(*mimic, out=tmp_path, days=61, val_share=0).rows) == 4
    moved = pair_mimic(*mimic, out=tmp_path, val_share=0.9).rows
    assert {row["split"] for row in moved if row["subject_id"] == "10000001"} == {"val"}


def test_broken_tables_of_mimic_are_named(mimic: tuple[Path, Path], tmp_path: Path):
    words = ("pair", *mimic, "--out", tmp_path / "pairs.csv")
    path = mimic[1] / "record_list.csv"
    whole = path.read_text()
    path.write_text(whole.replace("2180-02-15 10:00:00", "soon"))
    assert "record_list.csv, row 2: has the date 'soon'" in refusal(APP, *words)
    path.write_text(whole.replace("ecg_time", "time"))
    assert "record_list.csv: has no column 'ecg_time'" in refusal(APP, *words)
    path.write_text(whole)
    table = mimic[0] / "mimic-cxr-2.0.0-metadata.csv.gz"
    table.write_bytes(table.read_bytes()[:40])
    assert "mimic-cxr-2.0.0-metadata.csv.gz: cannot be read" in refusal(APP, *words)
    table.unlink()
    assert "mimic-cxr-2.0.0-metadata.csv: does not exist" in refusal(APP, *words)
    assert not (tmp_path / "pairs.csv").exists()
    assert report_of_findings({}) == ""


# retrieve, zero-shot, probe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triplets of two findings, and a run of MoRE that has not learnt."""
    root = tmp_path_factory.mktemp("more")
    rng = np.random.default_rng(0)
    data = root / "data"
    for folder in ("images", "ecgs"):
        (data / folder).mkdir(parents=True)
    rows = []
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for number in range(count):
            name, finding = f"{split}{number}", number % 2
            pixels = np.round(255 * make_xray(finding, rng)).astype(np.uint8)
            Image.fromarray(pixels).save(data / "images" / f"{name}.png")
            write_record(data / "ecgs" / name, make_ecg(finding, rng), rate_hz=100)
            rows.append(
                {
                    "name": name, "subject_id": f"s-{name}", "split": split,
                    "xray_path": f"images/{name}.png", "ecg_path": f"ecgs/{name}.hea",
                    "xray_report": f"{FINDINGS[finding]} is present.",
                    "ecg_report": f"rate {number}",
                    FINDINGS[0]: 1 - finding, FINDINGS[1]: finding,
                }
            )  # fmt: skip
    write_csv(data / "manifest.csv", rows)
    words = ["more", "--model.tower.depth", "1", "--model.text.depth", "1"]
    options = importlib.import_module("heed_runtime.commands.train").Options
    recipe = APP.recipe("more")
    settings = recipe.plan(parse(APP, "train", options, "", words).settings, data)
    run = Run.create(root / "run", system="more", settings=settings, command=words)
    run.save_model(recipe.model(settings))
    run.update_environment({"data": {"path": str(data)}})
    return root


def test_a_study_is_nearest_to_itself_in_every_kind_of_index(made: Path, tmp_path: Path):
    run, data = made / "run", made / "data"
    picture = data / "images" / "test1.png"
    words = ("retrieve", run, picture, "--to", "xray", "--k", 3, "--device", "cpu")
    index = tmp_path / "index.safetensors"
    found = call(APP, *words, "--among", data, "--save-index", index)
    assert found["index"] == {"xray": 16, "ecg": 16, "text": 16}
    assert [row["rank"] for row in found["found"]] == [1, 2, 3]
    assert found["found"][0]["study"] == "test1"
    assert found["found"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    again = call(APP, *words, "--among", index, "--out", tmp_path / "found.csv")
    assert again["found"] == found["found"]
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 4
    call(APP, "predict", run, data, "--out", tmp_path / "predicted", "--device", "cpu")
    kept = call(APP, *words, "--among", tmp_path / "predicted")
    assert [row["study"] for row in kept["found"]] == [row["study"] for row in found["found"]]
    said = call(APP, "retrieve", run, "--text", "Edema", "--among", index, "--device", "cpu")
    assert {(row["from"], row["to"]) for row in said["found"]} == {
        ("text", "xray"), ("text", "ecg"), ("text", "text"),
    }  # fmt: skip
    assert "is there already" in refusal(APP, *words, "--among", data, "--save-index", index)
    assert "a query is needed" in refusal(APP, "retrieve", run, "--among", index)
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    assert "no index" in refusal(APP, *words, "--among", tmp_path / "broken.safetensors")


def test_prompts_are_scored_by_finding(made: Path, tmp_path: Path):
    words = ("zero-shot", made / "run", "--device", "cpu")
    found = call(APP, *words, "--out", tmp_path / "cases.csv")
    assert found["n"] == 4
    assert {(r["modality"], r["finding"]) for r in found["findings"]} == {
        (m, f) for m in ("xray", "ecg") for f in FINDINGS[:2]
    }
    assert all(0 <= row["auroc"] <= 1 for row in found["findings"])
    cases = read_csv(tmp_path / "cases.csv")
    scores = np.array([[float(r[f"xray {f}"]) for f in FINDINGS[:2]] for r in cases])
    labels = np.array([[int(r[f"label {f}"]) for f in FINDINGS[:2]] for r in cases])
    area = roc_auc(scores[:, 0], labels[:, 0] == 1)
    assert found["findings"][0]["auroc"] == pytest.approx(area)
    hits = labels[np.arange(4), call_findings(scores)].mean()
    assert found["called"][0]["called right"] == pytest.approx(hits)
    flags = ("--data.contrast", "--data.prompts", f"{FINDINGS[0]}=sunshine|rain")
    other = call(APP, *words, *flags)
    assert other["prompts"][0]["prompts"] == "sunshine | rain"
    assert [row["denials"] for row in other["prompts"]] == ["", f"no {FINDINGS[1]}"]
    assert first_finding_alone({"a": 0, "b": 1, "c": 1, "d": None}) == {
        "a": 0, "b": 1, "c": 0, "d": None,
    }  # fmt: skip


def test_denials_are_taken_off_the_nearest_prompt(made: Path, tmp_path: Path):
    one, other = FINDINGS[:2]

    def scores(name: str, *flags: object) -> np.ndarray:
        words = ("zero-shot", made / "run", "--device", "cpu", "--out", tmp_path / f"{name}.csv")
        call(APP, *words, *flags)
        cases = read_csv(tmp_path / f"{name}.csv")
        return np.array([[float(r[f"{m} {one}"]) for m in ("xray", "ecg")] for r in cases])

    asked = scores("asked")
    denied = scores("denied", "--data.prompts", f"{one}=no {one}")
    sun = scores("sun", "--data.prompts", f"{one}=sun")
    assert scores("both", "--data.contrast") == pytest.approx(asked - denied, abs=1e-5)
    best = np.maximum(asked, sun) - np.maximum(denied, sun)
    table = tmp_path / "prompts.csv"
    table.write_text(
        f"finding,prompt,denial\n{one},{one} is present,no {one}\n{one},sun,sun\n{other},rain,\n"
    )
    assert scores("table", "--data.prompt-file", table) == pytest.approx(best, abs=1e-5)
    found = call(APP, "zero-shot", made / "run", "--data.prompt-file", table, "--device", "cpu")
    assert found["prompts"][0] == {
        "finding": one, "prompts": f"{one} is present | sun", "denials": f"no {one} | sun",
    }  # fmt: skip
    predicted = tmp_path / "predicted"
    words = ("--data.prompt-file", table, "--out", predicted, "--device", "cpu")
    call(APP, "predict", made / "run", made / "data" / "images" / "test0.png", *words)
    findings = json.loads((predicted / "test0.json").read_text())["findings"]
    assert findings["xray"][one] == pytest.approx(best[0, 0], abs=1e-5)
    table.write_text("finding,prompt\nOdema,fluid\n")
    for verb in ("zero-shot", "evaluate"):
        line = refusal(APP, verb, made / "run", "--data.prompt-file", table, "--device", "cpu")
        assert "prompts.csv, row 2: names 'Odema', which is none of the findings" in line


def test_a_probe_reads_what_a_random_tower_lets_through(made: Path, tmp_path: Path):
    words = ("probe", made / "run", "--embed", "xray", "--device", "cpu")
    found = call(APP, *words, "--out", tmp_path / "probe.csv", "--penalties", 1.0)
    assert found["studies"] == {"train": 8, "val": 4, "test": 4}
    assert [row["finding"] for row in found["findings"]] == list(FINDINGS[:2])
    with np.load(tmp_path / "probe.npz") as arrays:
        assert arrays["weight"].shape == (small_config().projection, 2)
    cases = read_csv(tmp_path / "probe.csv")
    assert [case["study"] for case in cases] == [f"test{n}" for n in range(4)]
    wide = call(APP, *words[:3], "xray", "ecg", "--before-projection", *words[4:])
    assert 0 <= wide["metrics"]["macro_auc"] <= 1
    assert "no study of the split 'test'" in refusal(
        APP, *words, "--data", one_split(made, tmp_path / "manifest.csv")
    )


def one_split(made: Path, path: Path) -> Path:
    rows = read_csv(made / "data" / "manifest.csv")
    for row in rows:
        for name in ("xray_path", "ecg_path"):
            row[name] = str(made / "data" / row[name])
    write_csv(path, [dict(row) for row in rows if row["split"] != "test"])
    return path


def test_verbs_of_more_refuse_runs_of_others(made: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("system: acmil\n")
    for verb in ("zero-shot", "probe"):
        assert "acmil" in refusal(APP, verb, run)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("retrieve", "--text", "Edema", "--among", "none"), "none: does not exist"),
        (("retrieve", "--text", " ", "--among", "DATA"), "--text ' ' is empty"),
        (("retrieve", "--text", "Edema", "--among", "DATA", "--k", "0"), "k must be at least 1"),
        (("retrieve", "--text", "Edema", "--among", "DATA", "--save-index", "a.npy"),
         "save_index must be a .safetensors"),
        (("retrieve", "DATA/manifest.csv", "--among", "DATA/ecgs", "--to", "xray"),
         "holds no embeddings of xray (ecg)"),
        (("retrieve", "TMP/broken.png", "--among", "DATA"), "broken.png: "),
        (("zero-shot", "--split", "tset"), "has no study of the split 'tset'"),
        (("zero-shot", "--data", "none"), "none: no such file or folder"),
        (("zero-shot", "--data.prompts", "Odema=Edema"), "denials must be of the findings"),
        (("zero-shot", "--data.prompts", f"{FINDINGS[0]}=___"),
         f"the prompts of '{FINDINGS[0]}' hold no words: ('___',)"),
        (("zero-shot", "--data.labels", "Odema"), "has no column 'Odema'"),
        (("zero-shot", "--out", "TMP/there.csv"), "there.csv: is there already"),
        (("probe", "--embed", "xray", "xray"), "embed must be one or more different"),
        (("probe", "--penalties", "-1"), "penalties must be numbers of at least 0"),
        (("probe", "--penalties", "nan"), "penalties must be numbers of at least 0"),
        (("probe", "--embed", "xray", "--out", "TMP/probe.csv"), "probe.npz: is there already"),
    ],
)  # fmt: skip
def test_what_the_verbs_of_more_refuse(
    made: Path, tmp_path: Path, words: tuple[str, ...], said: str
):
    for name in ("broken.png", "there.csv", "probe.npz"):
        (tmp_path / name).write_text("nothing")
    data, folder = str(made / "data"), str(tmp_path)
    verb, *flags = (word.replace("DATA", data).replace("TMP", folder) for word in words)
    assert said in refusal(APP, verb, made / "run", *flags, "--device", "cpu")
    assert (tmp_path / "there.csv").read_text() == "nothing"


def test_verbs_of_more_need_the_towers_that_they_use(made: Path, tmp_path: Path):
    """A run without reports can neither be asked with words nor probed on them."""
    recipe = APP.recipe("more")
    start = recipe.presets["small"]()
    data = replace(start.data, modalities=("xray", "ecg"))
    tower = replace(start.model.tower, depth=1)
    model = replace(start.model, tower=tower)
    settings = recipe.plan(replace(start, data=data, model=model), made / "data")
    run = Run.create(tmp_path / "run", system="more", settings=settings, command=["train"])
    run.save_model(recipe.model(settings))
    run.update_environment({"data": {"path": str(made / "data")}})
    words = ("--device", "cpu")
    assert "no text tower" in refusal(APP, "zero-shot", run.path, *words)
    assert "no tower of text" in refusal(APP, "probe", run.path, "--embed", "text", *words)
    ask = ("retrieve", run.path, "--text", "Edema", "--among", made / "data" / "ecgs")
    assert "no text tower" in refusal(APP, *ask, *words)


def test_prompts_of_unknown_findings_are_refused_at_training(made: Path):
    recipe = APP.recipe("more")
    start = recipe.presets["small"]()
    data = replace(start.data, prompts=("Odema=fluid",))
    with pytest.raises(InputError, match=r"no finding 'Odema', which --data.prompts names"):
        recipe.plan(replace(start, data=data), made / "data")


def test_a_penalty_is_chosen_by_the_validation():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(60, 20))
    labels = (truth[:, :1] > 0).astype(float)
    train, val = (truth[:12], labels[:12]), (truth[12:], labels[12:])
    _, penalty = choose_probe(train, val, penalties=(0.0, 1.0, 100.0))
    areas = {}
    for one in (0.0, 1.0, 100.0):
        probe, _ = choose_probe(train, val, penalties=(one,))
        areas[one] = roc_auc(probe.probabilities(val[0])[:, 0], val[1][:, 0] == 1)
    assert areas[penalty] == max(areas.values())
    with pytest.raises(ValueError, match="penalties"):
        choose_probe(train, val, penalties=())


def test_findings_are_scored_where_they_are_known():
    rng = np.random.default_rng(0)
    labels = (rng.random((200, 2)) < 0.4).astype(float)
    chances = np.clip(0.3 * labels + rng.random((200, 2)), 0, 1.3) / 1.3
    labels[:50, 1] = np.nan
    found = summarise_findings(
        Findings(names=("a", "b"), probabilities=chances, labels=labels, groups=np.arange(200) // 2)
    )
    areas = [
        roc_auc(chances[:, 0], labels[:, 0] == 1),
        roc_auc(chances[50:, 1], labels[50:, 1] == 1),
    ]
    assert [row["auc"] for row in found.rows] == pytest.approx(areas)
    assert found.metrics["macro_auc"] == pytest.approx(np.mean(areas))
    assert found.rows[1]["cases"] == 150
    assert found.rows[1]["ap"] == pytest.approx(
        average_precision(chances[50:, 1], labels[50:, 1] == 1)
    )
    assert found.metrics["macro_auc_low"] < found.metrics["macro_auc"]
    assert found.metrics["macro_auc_high"] > found.metrics["macro_auc"]
    with pytest.raises(ValueError, match="must be"):
        Findings(names=("a",), probabilities=chances, labels=labels, groups=np.arange(200))
