"""Layouts and trials: files of every format, splits, crops, baselines and the table of scores."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import openpyxl
import pytest
import torch
from PIL import Image

from heed_core.errors import InputError
from heed_gaze.oat import baselines
from heed_gaze.oat.evaluation import score_paths, score_viewers, sum_up
from heed_gaze.oat.files import read_shelves, write_neutral
from heed_gaze.oat.importers import ImportOptions, without_longest
from heed_gaze.oat.pictures import (
    CropOptions,
    CropStore,
    Sample,
    as_input,
    check_table_rows,
    cut_crops,
    make_batch,
)
from heed_gaze.oat.sample import SampleOptions, write_sample
from heed_gaze.oat.shelves import Layout, Shelves, Trial, even_boxes, reading_order
from heed_gaze.oat.splits import SplitOptions, split_trials
from heed_gaze.oat.workbooks import COLUMNS, SHELVES

STI = os.environ.get("HEED_STI")
"""A folder with the published Amazon.json of the Search Target Inference data."""
PLAIN = ImportOptions()
SMALL = SampleOptions(layouts=8, targets=2, viewers=3, cell_px=(24, 18))


def layout_of(rows: int = 2, columns: int = 3, name: str = "a", **facts: object) -> Layout:
    size = (30 * columns, 40 * rows)
    boxes = even_boxes(size, rows, columns)
    return Layout(
        name=name, boxes=boxes, cells=reading_order(rows, columns, len(boxes)), rows=rows,
        columns=columns, size_px=size, **facts,
    )  # fmt: skip


def trial_of(*objects: int, layout: str = "a", target: int = 1, subject: str = "s") -> Trial:
    return Trial(layout=layout, target=target, subject=subject, objects=np.array(objects))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shelves]:
    root = tmp_path_factory.mktemp("shelves")
    return root, write_sample(root, SMALL, seed=1)


def test_the_neutral_file_gives_back_what_was_written(sample: tuple[Path, Shelves], tmp_path: Path):
    root, made = sample
    found = read_shelves(root, PLAIN)
    assert len(found.trials) == len(made.trials) == 8 * 2 * 3
    for ours, theirs in zip(found.trials, made.trials, strict=True):
        assert (ours.layout, ours.target, ours.subject, ours.split) == (
            theirs.layout, theirs.target, theirs.subject, theirs.split,
        )  # fmt: skip
        assert ours.objects.tolist() == theirs.objects.tolist()
    for name, layout in found.layouts.items():
        assert np.array_equal(layout.boxes, made.layouts[name].boxes)
        assert np.array_equal(layout.cells, made.layouts[name].cells)
    again = write_neutral(root / "again.json", found)
    assert again.read_text() == (root / "shelves.json").read_text()


def test_made_viewers_stop_at_the_target(sample: tuple[Path, Shelves]):
    assert all(trial.objects[-1] == trial.target for trial in sample[1].trials)
    assert {trial.subject.split("-")[0] for trial in sample[1].trials} == {
        "reading", "guided", "centre",
    }  # fmt: skip


def document() -> dict:
    return {
        "layouts": [
            {
                "name": "a", "width": 40, "height": 20, "rows": 1, "cols": 2,
                "boxes": [[0, 0, 20, 20], [20, 0, 40, 20]],
            }
        ],
        "trials": [{"layout": "a", "target": 1, "subject": "s", "objects": [0, 1]}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("where", "change", "said"),
    [
        ("trials", {"target": 2}, r"trial 1 .*target 2 is none of the objects 0 to 1"),
        ("trials", {"target": -1}, "write null for free viewing"),
        ("trials", {"objects": []}, r"trial 1 .*has no fixation"),
        ("trials", {"objects": [0, 5]}, r"trial 1 .*object 5 is none"),
        ("trials", {"objects": [0, float("nan")]}, r"trial 1: objects holds NaN"),
        ("trials", {"objects": [0.5]}, "whole numbers"),
        ("trials", {"x": [1.0, float("nan")], "y": [1.0, 2.0]}, "x holds NaN"),
        ("trials", {"x": [1.0], "y": [1.0]}, "different numbers of objects, x and y"),
        ("trials", {"objects": [[0, 1]]}, "objects must be a list of numbers"),
        ("trials", {"layout": "b"}, "layout 'b' is not among the layouts"),
        ("layouts", {"boxes": [[0, 0, 20], [20, 0, 40, 20]]}, "a list of rows of 4 numbers"),
        ("layouts", {"boxes": [[0, 0, 20, 20], [20, 0, 55, 20]]}, "outside 40 x 20"),
        ("layouts", {"boxes": [[0, 0, 20, 20], [20, 5, 40, 5]]}, "is no box"),
        ("layouts", {"boxes": [[0, 0, 20, 20]]}, "has 1 objects"),
        ("layouts", {"rows": 1, "cols": 1}, "do not fit into"),
        ("layouts", {"cells": [[0, 0], [3, 0]]}, "outside the grid of 1 x 2"),
        ("layouts", {"rows": "one"}, "rows must be a whole number"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, where: str, change: dict, said: str):
    broken = document()
    broken[where][0] |= change
    path = tmp_path / "shelves.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(InputError, match=said) as caught:
        read_shelves(tmp_path, PLAIN)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    if where == "trials":
        skipping = read_shelves(tmp_path, ImportOptions(on_error="skip"))
        assert len(skipping.skipped) == 1


def test_positions_become_the_objects_that_hold_them(tmp_path: Path):
    given = document()
    given["trials"][0] = {"layout": "a", "target": None, "x": [5, 39, 70], "y": [5, 30, 3]}
    path = tmp_path / "shelves.json"
    path.write_text(json.dumps(given))
    found = read_shelves(tmp_path, PLAIN)
    assert found.trials[0].objects.tolist() == [0, 1, 1]
    assert found.trials[0].target == -1
    assert found.notes == ("2 fixations off their picture were kept",)
    dropped = read_shelves(tmp_path, ImportOptions(outside="drop"))
    assert dropped.trials[0].objects.tolist() == [0]
    with pytest.raises(InputError, match=r"trial 1: fixation 2 at \(39, 30\) is off the picture"):
        read_shelves(tmp_path, ImportOptions(outside="stop"))
    given["trials"][0] |= {"x": [70.0], "y": [3.0]}
    path.write_text(json.dumps(given))
    with pytest.raises(InputError, match=r"trial 1: fixation 1 at \(70, 3\) is off"):
        read_shelves(tmp_path, ImportOptions(outside="drop"))


def write_sti(root: Path, images: int = 3) -> None:
    """A collage of the Amazon kind: a dictionary of pictures with six viewers each."""
    (root / "images").mkdir()
    found = {}
    for k in range(1, images + 1):
        Image.new("RGB", (140, 60)).save(root / "images" / f"{k}.jpg")
        found[f"{k}.jpg"] = {
            "fixations": {str(v): [[10 * v + 5, 5], [95.0, 45.0]] for v in range(1, 7)},
            "ground_truth": [{"xmin": 91, "xmax": 99, "ymin": 41, "ymax": 49}],
            "size": {"width": 140, "height": 60},
            "target": "target_2.jpg",
        }
    found["1.jpg"]["fixations"]["1"] = [[5, 5]] * 80
    (root / "Amazon.json").write_text(json.dumps(found))


def test_amazon_has_a_record_per_picture_and_viewer(tmp_path: Path):
    write_sti(tmp_path)
    every = read_shelves(tmp_path, ImportOptions(longest_sd=None))
    assert len(every.trials) == 3 * 6
    firsts = [trial.objects[0] for trial in every.trials if trial.layout == "2.jpg"]
    assert firsts == [1, 2, 3, 4, 5, 6]  # the viewers are not each other's copies
    assert {trial.target for trial in every.trials} == {4 * 14 + 9}
    assert "6 x 14 even cells" in every.notes[0]
    kept = read_shelves(tmp_path, PLAIN)
    assert len(kept.trials) == 17
    assert "1 of 18 scanpaths" in kept.notes[1]


@pytest.mark.skipif(STI is None, reason="set HEED_STI to a folder that holds STI's Amazon.json")
def test_the_published_amazon_file_has_its_counts():
    every = read_shelves(Path(str(STI)), ImportOptions(longest_sd=None)).trials
    lengths = np.array([len(trial.objects) for trial in every])
    assert (len(every), lengths.min(), lengths.max()) == (600, 2, 91)
    assert lengths.mean() == pytest.approx(14.47, abs=0.005)
    assert lengths.std() == pytest.approx(13.53, abs=0.005)
    kept = read_shelves(Path(str(STI)), PLAIN).trials
    assert len(kept) == 585
    assert np.mean([len(trial.objects) for trial in kept]) == pytest.approx(12.89, abs=0.005)
    assert all(((trial.objects >= 0) & (trial.objects < 84)).all() for trial in every)


def test_cells_of_amazon_come_from_the_masks(tmp_path: Path):
    write_sti(tmp_path, images=1)
    (tmp_path / "binarymask").mkdir()
    mask = np.zeros((60, 140), dtype=np.uint8)
    for row, column in reading_order(6, 14, 84):
        # Cells of a row are not quite level, which must not mix their order.
        y, x = 10 * row + 1 + (column % 2), 10 * column + 1
        mask[y : y + 7, x : x + 7] = 255
    Image.fromarray(mask).save(tmp_path / "binarymask" / "14x6-1.png")
    (tmp_path / "binarymask" / "14x6-1.png").rename(tmp_path / "binarymask" / "14x6-1.jpg")
    layout = read_shelves(tmp_path, PLAIN).layouts["1.jpg"]
    assert layout.boxes[15].tolist() == [11, 12, 18, 19]
    Image.fromarray(mask[:30]).save(tmp_path / "half.png")
    (tmp_path / "half.png").rename(tmp_path / "binarymask" / "14x6-1.jpg")
    with pytest.raises(InputError, match="42 white cells, not 84"):
        read_shelves(tmp_path, PLAIN)


def test_longest_scanpaths_go_by_the_population_deviation():
    lengths = [10] * 20 + [40]
    trials = [trial_of(*[0] * n) for n in lengths]
    limit = np.mean(lengths) + 3 * np.std(lengths)
    assert limit < 40
    kept, notes = without_longest(trials, 3.0)
    assert len(kept) == 20
    assert "1 of 21" in notes[0]


def write_book(path: Path, rows: list[tuple], columns: tuple[str, ...] = COLUMNS) -> None:
    book = openpyxl.Workbook()
    book.active.append(columns)
    for row in rows:
        book.active.append(row)
    book.save(path)


def test_spreadsheets_count_from_one_and_know_their_shelves(tmp_path: Path):
    write_book(
        tmp_path / "gaze.xlsx",
        [
            (7, "Brand", "Q1_a", 1, 10.0, 200.0, 22, "p1"),
            (7, "Brand", "Q1_a", 22, 1600.0, 900.0, 22, "p1"),
            (8, "Other", "Q3_b", 27, 5, 6, 27, "p2"),
        ],
    )
    found = read_shelves(tmp_path, PLAIN)
    assert [trial.objects.tolist() for trial in found.trials] == [[0, 21], [26]]
    assert [trial.target for trial in found.trials] == [21, 26]
    wine = found.layouts["Q1_a"]
    assert (wine.rows, wine.columns, wine.group) == (2, 11, "wine")
    assert wine.boxes[0].tolist() == [0, 152, 152, 601]  # top margin 152
    assert SHELVES["Q3"].boxes()[0, 1] == 135


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ((7, "B", "Q1", 1, 1, 1, 23, "p"), r"trial 7 .*target 22 is none"),
        ((7, "B", "Q1", 1, None, 1, 2, "p"), r"row 2 \(trial 7\): X is None"),
        ((7, "B", "Q9", 1, 1, 1, 2, "p"), r"row 2 \(trial 7\): Question 'Q9'"),
        ((7, "B", "Q1", "x", 1, 1, 2, "p"), "Choice is 'x'"),
        ((7, "B", "Q1", 0, 1, 1, 2, "p"), "object -1 is none"),
    ],
)
def test_bad_rows_of_a_spreadsheet_are_named(tmp_path: Path, row: tuple, said: str):
    write_book(tmp_path / "gaze.xlsx", [row])
    with pytest.raises(InputError, match=said):
        read_shelves(tmp_path, PLAIN)


def test_files_that_are_no_spreadsheets(tmp_path: Path):
    write_book(tmp_path / "a.xlsx", [], columns=COLUMNS[:-1])
    with pytest.raises(InputError, match="has no column 'Sub_ID'"):
        read_shelves(tmp_path / "a.xlsx", PLAIN)
    (tmp_path / "a.xlsx").write_bytes((tmp_path / "a.xlsx").read_bytes()[:900])
    with pytest.raises(InputError, match="is no spreadsheet"):
        read_shelves(tmp_path / "a.xlsx", PLAIN)


def test_objects_of_free_viewing_are_labels_boxes_or_cells(tmp_path: Path):
    images = {
        f"{k}.png": {"split": "train", "subjects": [{"x": [5, 35], "y": [5, 25], "ms": [100, 90]}]}
        for k in range(3)
    }
    for name in images:
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "osie.json").write_text(json.dumps({"image_size": [40, 30], "images": images}))
    (tmp_path / "objects").mkdir()
    labels = np.zeros((30, 40), dtype=np.uint8)
    labels[2:8, 2:8], labels[20:28, 30:38] = 5, 9
    Image.fromarray(labels).save(tmp_path / "objects" / "0.png")
    (tmp_path / "objects" / "boxes.csv").write_text(
        "image,x0,y0,x1,y1\n1.png,0,0,10,10\n1.png,30,20,40,30\n1.png,0,0,40,30\n"
    )
    found = read_shelves(tmp_path, ImportOptions(grid=(3, 4)))
    assert found.layouts["0.png"].boxes.tolist() == [[2, 2, 8, 8], [30, 20, 38, 28]]
    assert found.layouts["0.png"].cells.tolist() == [[0, 0], [2, 3]]
    assert len(found.layouts["1.png"]) == 3
    assert len(found.layouts["2.png"]) == 12
    # Of boxes one within the other the smaller is meant.
    assert [t.objects.tolist() for t in found.trials] == [[0, 1], [0, 1], [0, 11]]
    assert all(trial.target == -1 for trial in found.trials)


def test_coco_search_targets_are_the_objects_that_overlap_most(tmp_path: Path):
    Image.new("RGB", (1680, 1050)).save(tmp_path / "a.jpg")
    trial = {
        "name": "a.jpg", "subject": 2, "task": "cup", "condition": "present", "split": "valid",
        "bbox": [1500, 900, 100, 100], "X": [840, 1550], "Y": [525, 950], "T": [200, 300],
        "length": 2, "correct": 1,
    }  # fmt: skip
    (tmp_path / "coco_search18_fixations.json").write_text(json.dumps([trial]))
    found = read_shelves(tmp_path, ImportOptions(grid=(5, 8)))
    assert found.trials[0].target == found.trials[0].objects[-1] == 4 * 8 + 7
    assert (found.trials[0].target_name, found.trials[0].split) == ("cup", "val")


def test_splits_hold_out_what_they_say():
    layouts = {n: layout_of(2, 5, name=n, group=n[0]) for n in ("w1", "w2", "w3", "y1", "y2", "y3")}
    trials = tuple(
        trial_of(0, t, layout=n, target=t, subject=s)
        for n in layouts for t in range(10) for s in "ab"
    )  # fmt: skip
    shelves = Shelves(layouts=layouts, trials=trials)
    random = split_trials(shelves, SplitOptions(rule="random", seed=4))
    assert [len(part) for part in random.values()] == [96, 12, 12]
    for group in "wy":  # each group is cut on its own
        assert sum(t.layout.startswith(group) for t in random["test"]) == 6
    assert random["test"] != split_trials(shelves, SplitOptions(rule="random", seed=5))["test"]
    for rule, key in (
        ("layout", lambda t: t.layout),
        ("target", lambda t: (t.layout[0], t.target)),
    ):
        parts = split_trials(shelves, SplitOptions(rule=rule))
        kinds = [{key(trial) for trial in part} for part in parts.values()]
        assert all(kinds)
        assert not kinds[0] & kinds[2]
        assert not kinds[0] & kinds[1]
    parts = split_trials(shelves, SplitOptions(rule="combination", combination="3@w2"))
    assert [(t.target, t.layout) for t in parts["test"]] == [(3, "w2")] * 2
    assert sum(map(len, parts.values())) == 120
    with pytest.raises(InputError, match="no trial has the combination"):
        split_trials(shelves, SplitOptions(rule="combination", combination="3@w9"))
    with pytest.raises(InputError, match="has the split ''"):
        split_trials(shelves, SplitOptions(rule="given"))


def test_crops_show_their_boxes_and_pixels_are_scaled_as_asked(tmp_path: Path):
    layout = layout_of()
    picture = np.zeros((80, 90, 3), dtype=np.uint8)
    for k, (x0, y0, x1, y1) in enumerate(layout.boxes.astype(int)):
        picture[y0:y1, x0:x1] = (10 + k, 20, 30)
    crops = cut_crops(picture, layout, (50, 31))
    assert crops.shape == (6, 50, 31, 3)
    assert all((crops[k] == (10 + k, 20, 30)).all() for k in range(6))
    assert as_input(crops, "unit")[2, :, 0, 0].tolist() == pytest.approx(
        [12 / 255, 20 / 255, 30 / 255]
    )
    assert as_input(crops, "bgr-255")[2, :, 0, 0].tolist() == [30, 20, 12]
    scaled = as_input(crops, "min-max")
    assert scaled.amin() == 0
    assert scaled.amax() == 1
    assert cut_crops(picture, layout, None).shape == (6, 40, 30, 3)
    with pytest.raises(InputError, match="has no picture"):
        CropStore(CropOptions()).crops(layout)


def test_a_batch_holds_each_layout_once_and_ends_paths_with_stop():
    few, many = layout_of(1, 2, name="few", group="x"), layout_of(2, 3, name="many")
    crops = {
        n: np.zeros((len(one), 8, 6, 3), np.uint8) for n, one in (("few", few), ("many", many))
    }
    batch = make_batch(
        [
            Sample(few, crops["few"], trial_of(0, 1, layout="few")),
            Sample(many, crops["many"], trial_of(5, 4, 3, layout="many", target=3)),
            Sample(few, crops["few"], trial_of(1, layout="few")),
        ]
    )
    assert [len(crop) for crop in batch.scenes.crops] == [2, 6]
    assert batch.scene.tolist() == [0, 1, 0]
    assert batch.group.tolist() == [0, 1, 0]
    assert batch.scanpath.tolist() == [[0, 1, 6], [5, 4, 3], [1, 6, 7]]
    assert batch.wanted.tolist() == [[0, 1, 6, 7], [5, 4, 3, 6], [1, 6, 7, 7]]
    assert batch.scenes.present.sum(1).tolist() == [2, 6]


def test_a_grid_larger_than_the_table_is_refused_by_trial():
    with pytest.raises(InputError, match=r"subject 's'.*4 rows of the position table.*has 3"):
        check_table_rows(trial_of(1), layout_of(3, 4), 3)
    check_table_rows(trial_of(1), layout_of(3, 4), 4)


def test_scores_of_a_scene():
    layout = layout_of()
    viewers = [np.array([1, 2, 3]), np.array([1, 3])]
    own = score_paths(layout, 3, [np.array([1, 3])], viewers, similarity=0.5)
    assert own.scores["ss"] == pytest.approx((2 / 3 + 1) / 2)
    assert own.defined["mm_shape"] == 0  # fewer than three fixations
    assert own.behaviour[:2].tolist() == [1, 2]
    # The map is 1 on objects 1 and 3 of 6: z is sqrt(2) there and -1 / sqrt(2) elsewhere.
    z, other = np.sqrt(2), -np.sqrt(0.5)
    assert own.scores["nss"] == pytest.approx(((2 * z + other) / 3 + z) / 2)
    human = score_viewers(layout, 3, viewers)
    assert human.scores["ss"] == pytest.approx(2 / 3)
    assert np.isnan(score_viewers(layout, 3, viewers[:1]).scores["ss"])
    assert sum_up([human], [human])["delta"] == 0
    row = sum_up([own, replace(own, trials=6)], [human, replace(human, trials=6)])
    assert row["trials"] == 8
    assert row["sim"] == 0.5


def test_searchers_without_a_network():
    layouts = {"a": layout_of(3, 4)}
    rng = np.random.default_rng(0)
    trials = [trial_of(5, 6, 7), trial_of(5, 6, 7, 11)]
    reference = baselines.learn_reference(trials, layouts)
    for make in (baselines.random_paths, baselines.centre_paths):
        paths = make(layouts["a"], reference, samples=200, rng=rng)
        assert {len(path) for path in paths} == {3, 4}
    weights = np.array([0.0, 8.0, *[0.1] * 10])
    paths = baselines.guided_paths(weights, 1, reference, samples=50, rng=rng)
    assert all(path[-1] == 1 and len(set(path)) == len(path) for path in paths)
    assert np.mean([len(path) for path in paths]) < 2
    chain = reference.chain(layouts["a"])
    assert chain is not None
    np.testing.assert_allclose(chain.move.sum(axis=1), 1)
    assert chain.move[6].argmax() == 7
    # 2 of 2 starts, smoothed by 0.1 on 12 objects; after 5 comes 6 twice of 13 followers.
    wanted = np.mean([2.1 / 3.2, 2.1 / 3.3])
    assert baselines.markov_similarity(chain, np.array([5]))  # start and stop
    found = (chain.start[5] + chain.move[5, 6]) / 2
    assert found == pytest.approx(wanted)
    assert reference.chain(layout_of(2, 2)) is None


def test_saliency_finds_what_stands_out():
    picture = np.full((80, 90, 3), 120, dtype=np.uint8)
    picture[50:70, 70:80] = (250, 10, 10)
    assert baselines.object_saliency(picture, layout_of()).argmax() == 5
    crops = np.zeros((4, 20, 10, 3), dtype=np.uint8)
    crops[2:] = 200
    crops[3] = 190
    similarity = baselines.colour_similarity(crops, 2)
    assert similarity.argsort()[::-1][:2].tolist() == [2, 3]


def test_an_even_probability_scores_one_over_all_choices():
    from heed_gaze.oat.decoding import next_probabilities

    logits = torch.zeros(4, 8 + 2)
    assert next_probabilities(logits, torch.tensor([0, 3, 7, 8])).mean() == pytest.approx(1 / 10)
