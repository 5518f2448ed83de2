"""Clinical efficacy of IVGN from the command line, with the two files of a labeller."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from heed_medical.reports.efficacy import FINDINGS
from heed_medical.reports.phantoms import write_studies
from heed_medical_cli import APP
from heed_runtime.testing.contract import call, refusal

TINY = (
    *("--model.dim", 16, "--model.heads", 2, "--model.hidden", 16, "--model.depth", 1),
    *("--data.size", 32, "--data.resize", 36, "--data.most-words", 12),
    *("--trainer.max-steps", 1, "--trainer.batch", 2, "--device", "cpu"),
)
Write = Callable[[str, dict[str, dict[str, str]]], Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ivgn")
    write_studies(root / "data", train=8, val=2, test=2, side=48)
    call(APP, "train", "ivgn", "--data", root / "data", "--out", root / "run", *TINY)
    return root / "run"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes labels in the order of the alphabet; findings that are not given are blank."""

    def of(name: str, rows: dict[str, dict[str, str]]) -> Path:
        with (tmp_path / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["study_id", *sorted(FINDINGS)], restval="")
            writer.writeheader()
            writer.writerows({"study_id": key, **cells} for key, cells in rows.items())
        return tmp_path / f"{name}.csv"

    return of


def words(run: Path, truth: Path, found: Path) -> tuple[object, ...]:
    files = ("--data.truth-findings", truth, "--data.found-findings", found)
    return ("evaluate", run, *files, "--device", "cpu")


def test_efficacy_is_counted_by_study_and_by_name(run: Path, write: Write):
    truth = write("truth", {
        "a": {"Edema": "1.0", "Pneumonia": "-1.0"}, "b": {"Edema": "0.0", "Fracture": "1.0"},
        "c": {"Edema": "1.0"},
    })  # fmt: skip
    found = write("found", {
        "c": {"Edema": "-1.0"}, "b": {"Fracture": "1.0", "Edema": "1.0"},
        "a": {"Edema": "1.0", "Pneumonia": "1.0"},
    })  # fmt: skip
    metrics = call(APP, *words(run, truth, found))["metrics"]
    # true: Edema a c, Fracture b; called: Edema a b, Fracture b, Pneumonia a; hits: Edema a,
    # Fracture b
    assert metrics["ce_precision_micro"] == pytest.approx(2 / 4)
    assert metrics["ce_recall_micro"] == pytest.approx(2 / 3)
    assert metrics["ce_f1_micro"] == pytest.approx(4 / 7)
    assert metrics["ce_precision_macro"] == pytest.approx((1 / 2 + 1 + 0) / 14)
    assert metrics["ce_recall_macro"] == pytest.approx((1 / 2 + 1) / 14)
    assert metrics["ce_f1_macro"] == pytest.approx((1 / 2 + 1) / 14)
    table = run / "evaluation" / "test" / "clinical-efficacy.csv"
    with table.open() as stream:
        rows = {row["finding"]: row for row in csv.DictReader(stream)}
    assert list(rows) == list(FINDINGS)
    assert [float(rows["Edema"][key]) for key in ("precision", "recall", "f1")] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"a": {}}, "found.csv: has no row of b, which "),
        ({"a": {}, "b": {}, "c": {}}, "found.csv: has a row of c, which "),
        ({"a": {}, "b": {"Edema": "2"}}, "found.csv, row 3, Edema: is '2', not 1, 0, -1 or blank"),
    ],
)
def test_files_that_do_not_pair_are_refused_before_reports_are_written(
    run: Path, write: Write, rows: dict, said: str, monkeypatch: pytest.MonkeyPatch
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("reports were written first")

    monkeypatch.setattr("heed_runtime.engine.predict", never)
    truth, found = write("truth", {"a": {}, "b": {}}), write("found", rows)
    assert said in refusal(APP, *words(run, truth, found))


def test_one_file_alone_is_refused(run: Path, write: Write):
    line = refusal(APP, "evaluate", run, "--data.truth-findings", write("truth", {"a": {}}))
    assert "truth_findings and found_findings have an effect together only" in line
