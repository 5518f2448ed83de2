"""Scores with gaps and intervals, ensembles, surfaces; decoding and encoding of block designs."""

import os
from pathlib import Path

import numpy as np
import pytest

from heed_core.errors import InputError
from heed_neuro.brain_encoder.ensemble import average_runs, combine_layers, layer_weights
from heed_neuro.brain_encoder.regions import with_rest
from heed_neuro.brain_encoder.scores import (
    bootstrap_r,
    mean_r,
    pearson_of_known,
    score_region,
    score_vertices,
)
from heed_neuro.brain_encoder.solved import Flat, pca_regression, ridge_mean_token
from heed_neuro.brain_encoder.subject import SURFACE
from heed_neuro.brain_encoder.surface import COARSE, draw_surface, on_surface
from heed_neuro.haxby import (
    REST,
    BlockDesign,
    clean,
    decode,
    decode_by_delay,
    encode,
    read_blocks,
    shifted,
)
from heed_neuro.ridge import RidgeOptions

HAXBY = (
    Path(os.environ.get("HEED_DATA", Path(__file__).parents[4] / "shared" / "data"))
    / "fmri-haxby"
    / "timeseries_1slice.npz"
)


def tables(images: int = 60, vertices: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(images, vertices))
    return truth + rng.normal(size=truth.shape), truth


def test_a_vertex_is_scored_on_the_images_at_which_it_was_measured():
    predicted, measured = tables()
    whole = pearson_of_known(predicted, measured)
    measured[3, 1] = np.nan
    measured[:, 2] = np.nan
    measured[::2, 3] = np.inf
    found = pearson_of_known(predicted, measured)
    kept = np.arange(60) != 3
    assert found[1] == pytest.approx(np.corrcoef(predicted[kept, 1], measured[kept, 1])[0, 1])
    assert found[3] == pytest.approx(np.corrcoef(predicted[1::2, 3], measured[1::2, 3])[0, 1])
    assert np.isnan(found[2])
    np.testing.assert_allclose(found[[0, 4]], whole[[0, 4]])
    assert mean_r({"a": predicted}, {"a": measured}) == pytest.approx(found[[0, 1, 3, 4]].mean())


def test_intervals_are_those_of_images_drawn_with_replacement():
    predicted, measured = tables()
    measured[5:9, 1] = np.nan
    drawn = bootstrap_r(predicted, measured, draws=40, seed=2, vertices=2)
    counts = np.random.default_rng(2).multinomial(60, np.full(60, 1 / 60), size=40)
    for draw in (0, 39):
        index = np.repeat(np.arange(60), counts[draw])
        for vertex in (0, 1, 4):
            a, b = predicted[index, vertex], measured[index, vertex]
            known = np.isfinite(b)
            wanted = np.corrcoef(a[known], b[known])[0, 1]
            assert drawn[draw, vertex] == pytest.approx(wanted, abs=1e-5)


def test_a_region_counts_what_it_leaves_out():
    predicted, measured = tables()
    measured[:, 0] = 3.0  # never varies: r is undefined
    predicted[:, 4] = -measured[:, 4]
    ceiling = np.array([0.5, 0.6, 0.0, 0.7, 0.8])
    scores = score_vertices(predicted, measured, ceiling)
    found = score_region(scores, np.ones(5, dtype=bool), bootstrap_r(predicted, measured))
    r = np.array([np.corrcoef(predicted[:, v], measured[:, v])[0, 1] for v in (1, 2, 3, 4)])
    assert (found.vertices, found.undefined, found.without_ceiling) == (5, 1, 1)
    assert found.r == pytest.approx(r.mean())
    assert found.negative == pytest.approx(0.25)
    shares = [min(r[0] ** 2 / 0.6, 1), min(r[2] ** 2 / 0.7, 1), 0.0]  # a negative r counts as 0
    assert found.accuracy == pytest.approx(np.mean(shares))
    assert found.r_low < found.r < found.r_high
    raw = score_vertices(predicted, measured)
    assert score_region(raw, np.ones(5, dtype=bool), bootstrap_r(predicted, measured)).accuracy is (
        None
    )


def test_the_better_layer_speaks_for_its_vertices():
    validation = np.array([[0.6, 0.1, np.nan], [0.2, 0.4, 0.0]])
    weights = layer_weights(validation)
    np.testing.assert_allclose(weights.sum(0), 1.0)
    assert weights[0, 0] == pytest.approx(1 / (1 + np.exp(-40 * 0.4)))
    assert weights[0, 2] == pytest.approx(0.5)  # an undefined r is no vote
    runs = [np.full((4, 3), value) for value in (1.0, 3.0)]
    np.testing.assert_array_equal(average_runs(runs), np.full((4, 3), 2.0))
    combined = combine_layers(runs, weights)
    np.testing.assert_allclose(combined[0], weights[0] + 3 * weights[1])
    with pytest.raises(ValueError, match="must be of 1 layers"):
        combine_layers(runs[:1], weights)


def test_regression_on_components_sees_the_training_images_alone():
    """A copy of the test images in a table of its own changes nothing; more components do."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(50, 2, 3, 4)).astype(np.float32)
    y = features.reshape(50, -1)[:, :2] @ rng.normal(size=(2, 3)).astype(np.float32)
    options = RidgeOptions(folds=3)
    train, test = np.arange(40), np.arange(40, 50)
    own, new = Flat(features, train), Flat(features, test)
    exact = pca_regression(own, y[:40], new, components=24, options=options).numpy()
    np.testing.assert_allclose(exact, y[40:], atol=1e-3)  # all 24 components: least squares
    alone = Flat(features[40:] * 1.0)
    np.testing.assert_allclose(
        pca_regression(own, y[:40], alone, components=24, options=options).numpy(), exact, atol=1e-5
    )
    few = pca_regression(own, y[:40], new, components=2, options=options).numpy()
    assert np.abs(few - y[40:]).mean() > 0.1
    pooled = ridge_mean_token(features[:40], y[:40], features[40:], options).numpy()
    assert pooled.shape == (10, 3)
    assert np.abs(pooled - y[40:]).mean() > 0.1  # the mean token does not know which one counts


def test_values_find_their_place_on_the_surface():
    index = np.array([2, 5, 163_000])
    whole = on_surface(np.array([0.1, 0.2, 0.3]), index)
    assert whole.shape == (SURFACE,)
    assert whole[index].tolist() == [0.1, 0.2, 0.3]
    assert np.isnan(whole).sum() == SURFACE - 3


@pytest.mark.bad_input
def test_values_need_a_place_each_on_the_surface():
    with pytest.raises(ValueError, match="index must be from 0 to 163841"):
        on_surface(np.ones(1), np.array([SURFACE]))
    with pytest.raises(ValueError, match=r"index must be of \(2,\) vertices"):
        on_surface(np.ones(2), np.array([2, 5, 163_000]))


def test_a_flat_map_shows_the_values_where_they_are():
    pytest.importorskip("nilearn")
    index = np.arange(COARSE)
    colours = []
    for values in (np.where(index < 5000, 0.8, 0.0), np.where(index < 5000, 0.0, 0.8)):
        figure = draw_surface(values, index, hemisphere="lh", title="r")
        (mesh,) = figure.axes[0].collections
        colours.append(np.asarray(mesh.get_facecolor())[:, :3].mean(axis=1))
        assert COARSE < len(colours[-1]) < 2 * COARSE - 4  # triangles: a surface that is cut open
    differ = np.abs(colours[0] - colours[1]) > 0.1
    assert differ.mean() > 0.9
    assert np.corrcoef(colours[0], colours[1])[0, 1] < -0.9  # bright where the other is dark
    with pytest.raises(ValueError, match="index must name a vertex of fsaverage5"):
        draw_surface(np.full(3, np.nan), np.arange(3), hemisphere="lh")
    with pytest.raises(ValueError, match="index must name a vertex of fsaverage5"):
        draw_surface(np.ones(1), np.array([COARSE]), hemisphere="rh")


def test_the_rest_are_the_vertices_of_no_region():
    found = with_rest({"a": np.array([1, 0, 0, 1], bool), "b": np.array([0, 0, 1, 1], bool)}, 4)
    assert found.names == ("a", "b", "rest")
    assert found.members[2].tolist() == [False, True, False, False]
    assert found.overlap == 2


def block_design(*, lag: int, runs: int = 4, voxels: int = 30) -> BlockDesign:
    """Blocks of 6 volumes of three categories; the blood answers `lag` volumes late."""
    rng = np.random.default_rng(5)
    patterns = {name: rng.normal(size=voxels) for name in ("cat", "face", "shoe")}
    bold, labels, numbers = [], [], []
    for run in range(runs):
        names = [REST] * 4
        for name in rng.permutation(list(patterns)):
            names += [str(name)] * 6 + [REST] * 4
        clean = np.stack([patterns.get(name, np.zeros(voxels)) for name in names])
        late = np.concatenate([np.zeros((lag, voxels)), clean[: len(clean) - lag]])
        drift = np.linspace(0, 20, len(names))[:, None]
        bold.append(100 + late + drift + rng.normal(scale=0.8, size=clean.shape))
        labels += names
        numbers += [run] * len(names)
    return BlockDesign(bold=np.concatenate(bold), labels=np.array(labels), runs=np.array(numbers))


def test_categories_are_decoded_at_the_delay_of_the_blood():
    design = block_design(lag=3)
    found = decode_by_delay(design, (3, 9))
    assert found[3] == 1.0
    assert found[9] < 0.7  # the response is over
    decoded = decode(design, delay=3)
    assert decoded.categories == ("cat", "face", "shoe")
    assert sorted(set(decoded.runs.tolist())) == [0, 1, 2, 3]
    assert encode(design, delay=3).mean() > encode(design, delay=9).mean() + 0.2


def test_labels_are_shifted_within_a_run():
    design = block_design(lag=0, runs=2)
    moved = shifted(design, 2)
    half = len(moved) // 2
    assert moved[:2].tolist() == moved[half : half + 2].tolist() == [REST, REST]
    assert moved[2:half].tolist() == design.labels[: half - 2].tolist()


GOOD = {
    "bold": np.random.default_rng(0).normal(size=(8, 3)),
    "label": np.array(["a", "a", "b", "b"] * 2),
    "run": np.array([0] * 4 + [1] * 4),
}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": None}, "has no array 'run'"),
        ({"bold": np.zeros((7, 3))}, r"bold \(7, 3\)"),
        ({"bold": np.full((8, 3), np.nan)}, "NaN or infinite"),
        ({"run": np.zeros(8)}, "two categories and two runs"),
        ({"label": np.array(["a"] * 8)}, "two categories and two runs"),
        ({"bold": np.full((8, 3), 0.1) * [1, 2, 3]}, "no voxel that varies"),
        ({"bold": 1e308 * np.sign(GOOD["bold"])}, r"values above 1e\+100"),
        ({"run": np.array([0.0] * 4 + [1.0] * 3 + [np.nan])}, "infinite values in run"),
    ],
)
def test_a_broken_block_design_is_told_in_one_line(change, said: str, tmp_path: Path):
    path = tmp_path / "mine.npz"
    np.savez(path, **{k: v for k, v in {**GOOD, **change}.items() if v is not None})
    with pytest.raises(InputError, match=said) as caught:
        read_blocks(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="is not an archive"):
        read_blocks(path)


def test_a_voxel_that_does_not_vary_tells_nothing():
    """Rounding of its trend is no signal."""
    rng = np.random.default_rng(0)
    labels, runs = np.tile(np.repeat(["a", "b"], 6), 3), np.repeat([1, 2, 3], 12)
    bold = rng.normal(size=(36, 3))
    bold[:, 1] = 7.3
    bold[:, 2] = 1e4 + 0.1 * np.arange(36)
    design = BlockDesign(bold=bold, labels=labels, runs=runs)
    assert (clean(design)[:, 1:] == 0).all()
    assert clean(design)[:, 0].std() == pytest.approx(1.0)
    assert np.isfinite(encode(design, delay=0)).tolist() == [True, False, False]


def test_a_delay_that_leaves_no_blocks_is_refused():
    design = BlockDesign(bold=GOOD["bold"], labels=GOOD["label"], runs=GOOD["run"])
    for delay in (2, 3, 4, 6, 100):
        with pytest.raises(InputError, match=f"a delay of {delay} volumes leaves too few blocks"):
            decode(design, delay=delay)
    found = decode_by_delay(design, (1, 3))
    assert np.isnan(found[3])
    assert 0 <= found[1] <= 1


@pytest.mark.skipif(not HAXBY.is_file(), reason="needs the series of Haxby et al.; set HEED_DATA")
def test_the_series_of_haxby_is_decoded_as_well_as_published():
    """Its page names 0.708 (of 96 blocks; s.e. 0.046) for a shift of two volumes."""
    found = decode_by_delay(read_blocks(HAXBY), (0, 2))
    assert found[2] > 0.708 - 0.02
    # Categories can be told from the first labelled volume on: the labels follow the blood.
    assert found[0] > found[2]
