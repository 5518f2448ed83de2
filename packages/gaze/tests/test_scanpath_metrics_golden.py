"""Scores of scanpaths and maps beside the stored numbers of the implementations in use."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from heed_gaze.metrics import saliency
from heed_gaze.metrics.behaviour import behaviours, delta, next_object_similarity
from heed_gaze.metrics.multimatch import multimatch
from heed_gaze.metrics.scanmatch import ScanMatch, scanmatch, string
from heed_gaze.metrics.sequences import levenshtein, sequence_score, string_edit_distance
from heed_gaze.metrics.simplification import Simplification
from heed_gaze.metrics.symbols import label_symbols, nearest_symbols, repeat_whole
from heed_gaze.metrics.warping import scaled_time_delay_embedding, time_delay_embedding
from heed_gaze.scanpaths import Scanpath

FOLDER = Path(__file__).parent / "golden" / "scanpath_metrics"
STORED = {
    name: np.array(value) for name, value in load_file(FOLDER / "fixture.safetensors").items()
}
META = json.loads((FOLDER / "meta.json").read_text())
SIZE = (256, 160)
EXACT, FLOAT32 = 1e-9, 1e-6


def path_of(rows: np.ndarray) -> Scanpath:
    return Scanpath(image="", subject="", xy_px=rows[:, :2].copy(), duration_s=rows[:, 2] / 1000)


FIRST, SECOND = (
    [path_of(STORED[f"input.pair{k}.{side}"]) for k in range(6)] for side in ("first", "second")
)


def stored(name: str) -> np.ndarray:
    """The numbers of all pairs."""
    return np.array([np.squeeze(STORED[f"output.pair{k}.{name}"]) for k in range(6)])


def assert_close(found: np.ndarray, name: str, tolerance: float = EXACT) -> None:
    np.testing.assert_allclose(found, stored(name), rtol=0, atol=tolerance, equal_nan=True)


def test_multimatch():
    assert_close(multimatch(FIRST, SECOND, size_px=SIZE), "multimatch_gaze")


def test_multimatch_simplified():
    grouped = META["grouped"]
    settings = Simplification(
        direction_deg=grouped["TDir"],
        duration_s=grouped["TDur_s"],
        amplitude=grouped["TAmp_px"] / float(np.hypot(*SIZE)),
    )
    found = multimatch(FIRST, SECOND, size_px=SIZE, simplification=settings)
    compared = 0
    for k, row in enumerate(found):
        wanted = STORED[f"output.pair{k}.multimatch_gaze_grouped"]
        if f"pair{k}.multimatch_gaze_grouped" in META["undefined"]:
            assert np.isfinite(row).all()  # the stored program stops with an error here
        else:
            np.testing.assert_allclose(row, wanted, rtol=0, atol=EXACT, equal_nan=True)
            compared += np.isfinite(row).all()
    assert compared == 3


def test_multimatch_is_the_same_without_durations_but_for_the_last_number():
    bare = [Scanpath(image="", subject="", xy_px=path.xy_px) for path in FIRST]
    found = multimatch(bare, SECOND, size_px=SIZE)
    np.testing.assert_allclose(found[:, :4], stored("multimatch_gaze")[:, :4], atol=EXACT)
    assert np.isnan(found[:, 4]).all()


@pytest.mark.parametrize("gap", [0.0, -0.5])
@pytest.mark.parametrize("bin_s", [None, 0.05])
def test_scanmatch(gap: float, bin_s: float | None):
    settings = ScanMatch(
        bins=tuple(META["scanmatch_bins_xy"]),
        threshold=META["scanmatch_threshold"],
        gap=gap,
        duration_bin_s=bin_s,
    )
    name = "scanmatch" + ("" if bin_s is None else "_50ms")
    found = scanmatch(FIRST, SECOND, size_px=SIZE, settings=settings)
    assert_close(found, name + ("" if gap == 0 else f"_gap{gap}"))
    for k, path in enumerate(FIRST):
        wanted = STORED[f"output.pair{k}.{name}.sequence_first"]
        assert string(path, SIZE, settings).tolist() == wanted.tolist()


def test_string_edit_distance():
    assert_close(string_edit_distance(FIRST, SECOND, size_px=SIZE), "string_edit_distance")
    finer = string_edit_distance(FIRST, SECOND, size_px=SIZE, cells=8)
    assert_close(finer, "string_edit_distance_n8")


def test_sequence_score_over_clusters_and_over_labels():
    centres = STORED["input.cluster_centres_xy"]
    block = META["segmentation_block_px"]
    labels = np.kron(
        STORED["input.segmentation_labels_of_blocks"], np.ones((block, block), dtype=np.int64)
    )
    for side, paths in (("first", FIRST), ("second", SECOND)):
        for k, path in enumerate(paths):
            wanted = STORED[f"output.pair{k}.clusters_{side}"]
            assert nearest_symbols(path, centres).tolist() == wanted.tolist()
    clusters = [[nearest_symbols(p, centres) for p in paths] for paths in (FIRST, SECOND)]
    assert_close(sequence_score(*clusters), "sequence_score", FLOAT32)
    assert_close(levenshtein(*clusters), "edit_distance_clusters")
    timed = [
        [repeat_whole(s, p.duration_s, 0.05) for s, p in zip(symbols, paths, strict=True)]
        for symbols, paths in zip(clusters, (FIRST, SECOND), strict=True)
    ]
    assert_close(sequence_score(*timed), "sequence_score_time_50ms", FLOAT32)
    assert_close(levenshtein(*timed), "edit_distance_clusters_time_50ms")
    semantic = [[label_symbols(p, labels, SIZE) for p in paths] for paths in (FIRST, SECOND)]
    assert_close(sequence_score(*semantic), "semantic_sequence_score", FLOAT32)
    assert_close(levenshtein(*semantic), "semantic_edit_distance")


@pytest.mark.parametrize("how", ["mean", "hausdorff"])
def test_time_delay_embedding(how):
    compared = 0
    for window in (1, 2, 3):
        found = time_delay_embedding(FIRST, SECOND, window=window, how=how)
        for k, value in enumerate(found):
            name = f"output.pair{k}.tde_k{window}_{how}"
            if name in STORED:
                assert value == pytest.approx(STORED[name].item(), abs=EXACT)
                compared += 1
            else:
                assert np.isnan(value)
    assert compared == 15


def test_scaled_time_delay_embedding():
    found = scaled_time_delay_embedding(FIRST, SECOND, size_px=SIZE)
    assert_close(found[:, 0], "stde_similarity")
    assert_close(found[:, 1], "stde_distance")


def objects(kind: str) -> list[np.ndarray]:
    return [STORED[f"input.objects{k}.{kind}"] for k in range(5)]


def test_behaviour_over_objects():
    targets = [int(t.item()) for t in objects("target")]
    found = {kind: behaviours(objects(kind), targets) for kind in ("human", "model")}
    for kind, rows in found.items():
        wanted = [STORED[f"output.objects{k}.behaviour_{kind}"] for k in range(5)]
        np.testing.assert_allclose(rows, wanted, atol=FLOAT32)
        np.testing.assert_allclose(rows[:, 2:].sum(axis=1), 1.0)
    value, used = delta(found["model"].mean(axis=0), found["human"].mean(axis=0))
    assert used == 5
    assert value == pytest.approx(STORED["output.objects.delta"].item(), abs=FLOAT32)
    assert delta(found["human"].mean(axis=0), found["human"].mean(axis=0)) == (0.0, 5)


def test_strings_of_objects():
    wanted = {
        name: [STORED[f"output.objects{k}.{name}"].item() for k in range(5)]
        for name in ("sequence_score", "levenshtein")
    }
    pair = objects("human"), objects("model")
    np.testing.assert_allclose(sequence_score(*pair), wanted["sequence_score"], atol=FLOAT32)
    np.testing.assert_allclose(levenshtein(*pair), wanted["levenshtein"])


def test_multimatch_over_the_cells_of_a_grid():
    rows, columns = META["objects_grid_rows_cols"]
    first, second = (
        [
            Scanpath(
                image="",
                subject="",
                xy_px=np.stack([p % columns, p // columns], axis=1).astype(np.float64),
            )
            for p in objects(kind)
        ]
        for kind in ("human", "model")
    )
    found = multimatch(first, second, size_px=(columns, rows))
    for k, row in enumerate(found):
        wanted = STORED[f"output.objects{k}.multimatch_grid"]
        np.testing.assert_allclose(row[:4], wanted, atol=EXACT, equal_nan=True)


def test_probability_of_the_next_object():
    found = next_object_similarity(
        STORED["input.sim.probabilities"], STORED["input.sim.next_object"]
    )
    assert found == pytest.approx(STORED["output.sim"].item(), abs=EXACT)
    even = np.full((4, 9), 1 / 9)
    assert next_object_similarity(even, STORED["input.sim.next_object"]) == pytest.approx(1 / 9)


def test_maps():
    values, other = STORED["input.map.saliency"], STORED["input.map.other_map"]
    fixations = STORED["input.map.fixations_xy"]
    x, y = fixations.T
    free = np.ones(values.shape, dtype=bool)
    free[y, x] = False
    found = {
        "nss": saliency.nss(values, fixations),
        "auc_judd_thresholds": saliency.auc_judd(values, fixations),
        "auc_all_pixels_negative": saliency.auc(values[y, x], values.ravel()),
        "auc_nonfixated_negative": saliency.auc(values[y, x], values[free]),
        "sauc": saliency.auc_shuffled(
            values, fixations, STORED["input.map.other_image_fixations_xy"]
        ),
        "cc": saliency.correlation(values, other),
        "sim": saliency.similarity(values, other),
        "kldiv_mit": saliency.kl_divergence(other, values),
        "info_gain_bits_mean": saliency.information_gain(
            values, STORED["input.map.baseline_density"], fixations
        ),
    }
    for name, value in found.items():
        assert value == pytest.approx(STORED[f"output.map.{name}"].item(), abs=EXACT), name
