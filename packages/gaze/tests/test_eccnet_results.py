"""Results of other programs: arrays and tables of the six experiments."""

from pathlib import Path

import numpy as np
import pytest

from heed_core.errors import InputError
from heed_gaze.eccnet.experiments import EXPERIMENTS, make_displays
from heed_gaze.eccnet.results import read_results

TASK = "curvature/curve_in_lines"  # set sizes 8, 16 and 32


def hits(*found_at: int, fixations: int = 37) -> np.ndarray:
    array = np.zeros((len(found_at), fixations))
    for row, at in zip(array, found_at, strict=True):
        if at >= 0:
            row[at] = 1
    return array


@pytest.mark.parametrize("name", [f"{TASK}.npy", f"{TASK}/eccnet.npy"])
@pytest.mark.parametrize("alone", [True, False])
def test_arrays_come_in_blocks_of_set_sizes(tmp_path: Path, name: str, alone: bool):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    np.save(path, hits(1, 2, 1, -1, 5, 36))
    found = read_results(path if alone else tmp_path)
    # What was not found counts as the size of its set.
    assert found.trials == {TASK: ([8, 8, 16, 16, 32, 32], [1, 2, 1, 16, 5, 36])}
    assert found.unit == "saccades"


@pytest.mark.parametrize(
    ("text", "values", "unit"),
    [
        ("task,set_size,found_at\na,4,2\na,8,\n", [2.0, 8.0], "saccades"),
        ("task,set_size,saccades,found_at\na,4,2.5,9\na,8,3,\n", [2.5, 3.0], "saccades"),
        ("set_size,rt_ms,task\n4,500,a\n8,612.5,a\n", [500.0, 612.5], "ms"),
    ],
)
def test_tables_say_their_unit(tmp_path: Path, text: str, values: list[float], unit: str):
    path = tmp_path / "r.csv"
    path.write_text(text + "b,,\n" if unit != "ms" else text)
    found = read_results(path)
    assert (found.trials, found.unit) == ({"a": ([4, 8], values)}, unit)
    assert len(found.skipped) == (unit != "ms")  # b has no set size


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.csv", "", "has no column task"),
        ("r.csv", "task,set_size,rt\na,4,5\n", "has no column rt_ms or saccades or found_at"),
        ("r.csv", "task,set_size,rt_ms\na,4,nan\n", "row 2: .*'nan'"),
        ("r.csv", "task,set_size,rt_ms\na,4,5\na,4,\n", "row 3: .*''"),
        ("r.csv", "task,set_size,saccades\na,4,-1\n", "row 2: .*'-1'"),
        ("r.csv", "task,set_size,saccades\na,0,1\n", "row 2: .*'0'"),
        ("r.csv", "task,set_size,saccades\na,inf,1\n", "row 2: .*'inf'"),
        ("r.csv", "task,set_size,found_at\na,x,\n", "row 2: .*'x'"),
        ("r.csv", "task,set_size,saccades\n", "holds no trial with a set size"),
        ("r.npy", hits(1, 1, 1), "named after no task"),
        (f"{TASK}.npy", hits(1, 1), "2 trials, which are not 3 equal blocks"),
        (f"{TASK}.npy", hits(1, 1, 1) + hits(2, -1, -1), "row 1: is not one 1 among zeros"),
        (f"{TASK}.npy", hits(1, 1, 1) * 2, "row 1: is not one 1"),
        (f"{TASK}.npy", hits(1, -1, 1) * np.nan, "row 1: is not one 1"),
        (f"{TASK}.npy", np.zeros((0, 9)), "has no trial"),
        (f"{TASK}.npy", np.zeros(9), r"has the shape \(9,\)"),
        (f"{TASK}.npy", b"\x93NUMPY", "is not a numpy array"),
        ("notes.txt", "nothing", "holds no results"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: object, said: str):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    with pytest.raises(InputError, match=said) as caught:
        read_results(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_second_model_and_mixed_units_are_refused(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / TASK).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / TASK / f"{name}.npy", hits(1, 1, 1))
    with pytest.raises(InputError, match="second array of the task"):
        read_results(tmp_path)
    other = tmp_path / "tables"
    other.mkdir()
    (other / "a.csv").write_text("task,set_size,rt_ms\na,4,500\n")
    (other / "b.csv").write_text("task,set_size,saccades\na,4,1\n")
    with pytest.raises(InputError, match="saccades and reaction times"):
        read_results(other)


def test_the_papers_code_marks_a_box_at_the_item_in_the_lighting_experiment():
    lighting, curvature = EXPERIMENTS[1], EXPERIMENTS[0]
    both = [
        make_displays(lighting, lighting.tasks[0], seed=3, trials=4, legacy=legacy)
        for legacy in (False, True)
    ]
    for plain, legacy in zip(*both, strict=True):
        assert np.array_equal(plain.image, legacy.image)
        assert np.array_equal(plain.truth, lighting.cell_mask(plain.target_cell))
        rows, columns = np.nonzero(legacy.truth)
        row, column = divmod(plain.target_cell, lighting.grid)
        item = np.nonzero((plain.image != lighting.background) & plain.truth)
        # Of 31 pixels of the item those at its border may be background.
        assert 0 <= item[0].min() - rows.min() <= 2
        assert 0 <= item[1].min() - columns.min() <= 2
        assert 0 <= rows.min() - row * lighting.cell < 18
        assert 0 <= columns.min() - column * lighting.cell < 18
        assert rows.max() + 1 - rows.min() == min(lighting.cell, lighting.side - rows.min())
    moved = [not np.array_equal(a.truth, b.truth) for a, b in zip(*both, strict=True)]
    assert sum(moved) > len(moved) / 2
    same = [
        make_displays(curvature, curvature.tasks[0], seed=3, trials=1, legacy=legacy)[0].truth
        for legacy in (False, True)
    ]
    assert np.array_equal(*same)
