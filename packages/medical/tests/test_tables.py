"""Tables as users have them: odd line breaks, blank lines, other separators, other notations."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_medical.classification.labels import look_alikes
from heed_medical.pictures.checking import check_pictures
from heed_medical.pictures.layouts import list_pictures
from heed_medical.pictures.planning import plan_pictures
from heed_medical.pictures.records import read_rows
from heed_medical.pictures.settings import PictureData

CSV = 'file,label,note\n\na.png,x,"one\ntwo"\n\nb.png,y,\n\n'


def test_rows_have_the_numbers_that_a_spreadsheet_shows(tmp_path: Path):
    """The header and blank lines count, a field of several lines is in one row."""
    path = tmp_path / "labels.csv"
    for text in (CSV, "\ufeff" + CSV.replace("\n", "\r\n")):
        path.write_bytes(text.encode())
        table = read_rows(path)
        assert [(place.rpartition(" ")[2], row["file"]) for place, row in table.numbered()] == [
            ("3", "a.png"), ("5", "b.png"),
        ]  # fmt: skip
    path.write_text(CSV + "c.png\nd.png,y,z\ne.png,y,z,\n")
    with pytest.raises(InputError, match="row 7: has another number of fields"):
        read_rows(path)
    table = read_rows(path, lenient=True)
    assert [row["file"] for row in table.rows] == ["a.png", "b.png", "d.png"]
    assert [line.partition(":")[0][-5:] for line in table.problems] == ["row 7", "row 9"]
    path.write_text("file,label\nd.png\n")
    with pytest.raises(InputError, match="row 2: has another number of fields"):
        read_rows(path, lenient=True)


def test_json_lines_break_at_line_feeds_alone(tmp_path: Path):
    path = tmp_path / "labels.jsonl"
    rows = [{"file": "a.png", "note": "one\u2028two\x85"}, {"file": "b.png", "note": None}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\r\n\r\n".join(lines) + "\n", encoding="utf-8", newline="")
    table = read_rows(path)
    assert [row["note"] for row in table.rows] == ["one\u2028two", ""]
    assert list(table.numbers) == [1, 3]
    path.write_text("\n".join(["{", lines[0], "[]"]))
    with pytest.raises(InputError, match="row 1: is not JSON"):
        read_rows(path)
    table = read_rows(path, lenient=True)
    assert len(table.rows) == 1
    assert ["row 1: is not JSON" in table.problems[0], table.problems[1].partition(", ")[2]] == [
        True, "row 3: is not a JSON object",
    ]  # fmt: skip


@pytest.mark.parametrize(("sign", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_another_separator_is_named(sign: str, name: str, tmp_path: Path):
    path = tmp_path / "labels.csv"
    path.write_text(CSV.replace(",", sign))
    with pytest.raises(InputError, match=f"separated by {name}"):
        read_rows(path).need("file")


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["0", "1", "0.0"], ("0", "0.0")),
        (["01", "1", "2"], ("01", "1")),
        (["True", "false", "true"], ("True", "true")),
        (["no finding", "No  Finding", "edema"], ("No  Finding", "no finding")),
        (["1_0", "10"], ()),
        (["-1", "1", "0"], ()),
        (["mild", "moderate", "1.5"], ()),
    ],
)
def test_labels_that_look_like_one_class_are_found(labels: list[str], found: tuple[str, ...]):
    assert look_alikes(labels) == found


def test_pictures_are_not_trained_on_labels_that_look_like_one_class(tmp_path: Path):
    rows = ["file,label,split"]
    for number, label in enumerate(("true", "False", "True", "False")):
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{label},{'val' if number == 3 else 'train'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    said = "has the labels 'True' and 'true', which look like one class"
    with pytest.raises(InputError, match=said):
        plan_pictures(PictureData(), tmp_path)
    assert any(said in line for line in check_pictures(PictureData(), tmp_path).problems)
    named = ("False", "True", "true")
    assert plan_pictures(PictureData(classes=named), tmp_path).classes == named


def test_pictures_of_a_table_have_different_names(tmp_path: Path):
    """Without patients each is a case of its own, also where names differ in their suffix."""
    files = ("in/x.png", "in/x.jpg", "in/y.png", "../away/z.png", "in/a..b.png")
    root = tmp_path / "data"
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(root / name)
    rows = [f"{name},a,test" for name in files]
    (root / "labels.csv").write_text("\n".join(["file,label,split", *rows]) + "\n")
    found = list_pictures(root, PictureData()).pictures
    assert [picture.name for picture in found] == [
        "in/x_png", "in/x_jpg", "in/y", "away/z", "in/a..b"
    ]  # fmt: skip
    assert len({picture.group for picture in found}) == 5
