"""People beside a search: their files, when they found the target, chance, likeness."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_gaze.eccnet.layouts import find_trials, read_trial
from heed_gaze.eccnet.sample import write_sample_array
from heed_gaze.eccnet.search import (
    ChanceSearcher,
    Scene,
    Search,
    SearchConfig,
    first_found,
    search,
)
from heed_gaze.eccnet.viewers import (
    chance_curve,
    chance_of,
    consistency,
    found_by,
    likeness,
    performance,
)


def make_scene(rows: slice, columns: slice, size: tuple[int, int] = (60, 80)) -> Scene:
    truth = np.zeros(size, dtype=bool)
    truth[rows, columns] = True
    picture = np.zeros((*size, 3), dtype=np.uint8)
    return Scene(name="scene", image=picture, target=picture[:8, :8], truth=truth)


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_array(tmp_path_factory.mktemp("data"), seed=0, trials=3, viewers=2)


def test_viewers_are_read_beside_their_pictures(array: Path):
    trials = [read_trial(file) for file in find_trials(array.parent)]
    assert [len(trial.viewers) for trial in trials] == [2, 2, 2]
    for trial in trials:
        assert trial.task == "objectarray"
        assert trial.rules.max_fixations == 7
        when = found_by(trial.scene, trial.viewers, trial.rules)
        # A made viewer ends at the target.
        assert when == tuple(len(path) - 1 for path in trial.viewers)


def test_positions_follow_a_picture_that_is_brought_to_another_size(array: Path, tmp_path: Path):
    before = [read_trial(file) for file in find_trials(array.parent)]
    half = tmp_path / "objectarray"
    for part in ("stimuli", "gt"):
        (half / part).mkdir(parents=True)
        for file in (array / part).iterdir():
            Image.open(file).resize((272, 272), Image.Resampling.NEAREST).save(
                half / part / file.name
            )
    (half / "target").symlink_to(array / "target")
    rows = (array / "viewers.csv").read_text().splitlines()
    names = rows[0].split(",")
    x, width = names.index("x"), names.index("width")
    halved = [rows[0]]
    for row in rows[1:]:
        cells = row.split(",")
        for column in (x, x + 1):
            cells[column] = str(float(cells[column]) / 2)
        cells[width : width + 2] = ["", ""]  # the size is that of the picture
        halved.append(",".join(cells))
    (half / "viewers.csv").write_text("\n".join(halved) + "\n")
    after = [read_trial(file) for file in find_trials(tmp_path)]
    for one, other in zip(before, after, strict=True):
        for path, scaled in zip(one.viewers, other.viewers, strict=True):
            np.testing.assert_allclose(path.xy_px, scaled.xy_px)
            assert scaled.size_px == (544, 544)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,subject,index,x,y\n9.png,a,0,5,5\n", "no picture of stimuli"),
        ("image,subject,index,x,y\n1.png,a,0,nan,5\n", "x is nan"),
        ("image,subject,index,x\n1.png,a,0,5\n", "column"),
        ("", "is empty"),
    ],
)
def test_viewers_that_cannot_be_used_are_named(array: Path, tmp_path: Path, text: str, said: str):
    folder = tmp_path / "objectarray"
    folder.mkdir()
    for part in ("stimuli", "target", "gt"):
        (folder / part).symlink_to(array / part)
    (folder / "viewers.csv").write_text(text)
    with pytest.raises(InputError, match=r"viewers\.csv") as error:
        read_trial(find_trials(tmp_path)[0])
    assert said in str(error.value)


def test_anybody_finds_a_target_by_the_rule_of_the_search():
    scene = make_scene(slice(30, 34), slice(0, 5))
    config = SearchConfig(inhibition=10)
    off = [[-20, -20], [200, 3], [32, -30]]
    assert first_found(scene, np.array([*off, [32, 11], [32, 9], [32, 2]]), config) == 4
    assert first_found(scene, np.array(off), config) is None
    # A square of 10 reaches 5 pixels before a fixation and 4 behind it.
    assert first_found(scene, np.array([[25, 2]]), config) is None
    assert first_found(scene, np.array([[26, 2]]), config) == 0
    assert first_found(scene, np.array([[38, 2]]), config) == 0
    assert first_found(scene, np.array([[39, 2]]), config) is None


def test_chance_is_the_share_of_places_that_find_the_target():
    scene, config = make_scene(slice(0, 7), slice(70, 80)), SearchConfig(inhibition=9)
    places = np.argwhere(np.ones(scene.size, dtype=bool))
    found = [first_found(scene, place[None], config) == 0 for place in places]
    assert chance_of(scene, config) == pytest.approx(np.mean(found))
    curve = chance_curve([0.25, 0.5], [False, True], 3)
    assert curve.tolist() == [0.5, (0.25 + 1) / 2, (1 - 0.75**2 + 1) / 2, (1 - 0.75**3 + 1) / 2]


def test_chance_without_memory_is_no_better_than_a_searcher_who_inhibits():
    scene = make_scene(slice(4, 16), slice(4, 16))
    config = SearchConfig(max_fixations=9, inhibition=7)
    searcher = ChanceSearcher(0)
    found = [search(scene, searcher, config).found_at for _ in range(400)]
    share = performance(found, 8).curve
    curve = chance_curve([chance_of(scene, config)], [False], 8)
    assert abs(share - curve).max() < 0.08
    assert share[-1] > curve[-1] - 0.04


def test_statistics_of_the_fixations_that_find():
    found = performance([1, 4, None, 9, 2], 4)
    assert found.curve.tolist() == [0, 0.2, 0.4, 0.4, 0.6]
    assert (found.found, found.median) == (0.6, 2)
    assert found.mean == pytest.approx(7 / 3)
    assert found.deviation == pytest.approx(np.std([1, 2, 4]))
    nothing = performance([None, None], 4)
    assert nothing.found == 0
    assert np.isnan(nothing.mean)


def test_consistency_is_a_rank_correlation_over_pictures():
    viewers = [{"a": at, "b": 2 * at, "c": None} for at in (1, 2, 3, 4)]
    own, others = consistency([10, 20, 30, None], viewers, most=40)
    assert own == pytest.approx(1)
    assert others == pytest.approx(1)  # "c" has no differences and does not count
    own, _ = consistency([None, 30, 20, 10], viewers, most=40)
    assert own == pytest.approx(-1)
    apart, others = consistency([1, 2], viewers[:2], most=40)
    assert np.isnan(apart)
    assert np.isnan(others)
    # A viewer counts in the pictures that he saw.
    _, others = consistency(
        [1, 2, 3, 4], [{"a": 1, "b": 1}, *({"a": k} for k in (2, 3, 4))], most=9
    )
    assert np.isnan(others)


def test_a_search_like_the_viewers_scores_above_one_elsewhere(array: Path):
    trial = read_trial(find_trials(array.parent)[0])
    path = trial.viewers[0].xy_px[:, ::-1].round().astype(np.int64)
    alike = likeness(trial.scene, Search(fixations=path, found_at=None), trial.viewers)
    corner = np.array([[5, 5], [20, 500], [10, 10]])
    unlike = likeness(trial.scene, Search(fixations=corner, found_at=None), trial.viewers)
    assert alike["scanmatch"]["predicted"] > unlike["scanmatch"]["predicted"] + 0.2
    # One of two viewers is the path itself, the other one is as near as the viewers are.
    assert alike["scanmatch"]["predicted"] == pytest.approx(
        (1 + alike["scanmatch"]["human"]) / 2, abs=0.03
    )
