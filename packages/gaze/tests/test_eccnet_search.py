"""Searching scenes: the official search, the rules, re-use of the surround."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from heed_core.errors import InputError
from heed_gaze.eccnet.network import EccNet, EccNetConfig
from heed_gaze.eccnet.retina import RetinaConfig
from heed_gaze.eccnet.search import (
    ChanceSearcher,
    EccNetSearcher,
    PixelMatchSearcher,
    Scene,
    SearchConfig,
    search,
)
from heed_gaze.eccnet.surround import Padded, WindowFeatures
from heed_gaze.eccnet.weights import load_weights

GOLDEN = Path(__file__).parent / "golden" / "eccnet"
TENSORS = load_file(GOLDEN / "fixture.safetensors")
META = json.loads((GOLDEN / "meta.json").read_text())["search"]


def grid(rows, columns, side):
    cells = np.zeros((rows * columns, rows * side, columns * side), dtype=bool)
    for number in range(rows * columns):
        y, x = divmod(number, columns)
        cells[number, y * side : (y + 1) * side, x * side : (x + 1) * side] = True
    return cells


def official_scene():
    return Scene(
        name="stored",
        image=TENSORS["input.search.image"].numpy(),
        target=TENSORS["input.search.target_image"].numpy(),
        truth=TENSORS["input.search.target_mask"].numpy() > 0,
        cells=grid(3, 4, 40),
    )


@pytest.mark.parametrize("reuse", [True, False])
def test_the_official_search_is_repeated(tmp_path, reuse):
    state = {k.removeprefix("weights."): v for k, v in TENSORS.items() if k.startswith("weights.")}
    save_file(state, tmp_path / "w.safetensors")
    net = EccNet(EccNetConfig(widths=tuple(META["widths"]), weights="keras-caffe")).eval()
    load_weights(net, tmp_path / "w.safetensors")
    scene, config = official_scene(), SearchConfig(max_fixations=13, background=255)
    searcher = EccNetSearcher(net, reuse_surround=reuse)
    found = search(scene, searcher, config, keep_steps=True)
    assert np.array_equal(found.fixations, TENSORS["output.fixations_row_col"].numpy())
    assert found.found_at == len(found.fixations) - 1 == META["steps"]
    for number, step in enumerate(found.steps):
        stored = TENSORS[f"output.step{number}.map_final_every8th"].double().numpy()
        # The stored map is of the window, every eighth pixel.
        top, left = (184 - at for at in step.fixation)
        rows = np.arange(0, 368, 8)
        inside = [(rows >= start) & (rows < start + n) for start, n in ((top, 120), (left, 160))]
        ours = step.values[np.ix_(rows[inside[0]] - top, rows[inside[1]] - left)]
        wanted = stored[np.ix_(*inside)]
        assert np.abs(ours - wanted).max() <= 1e-4 * stored.max()
        outside = stored.copy()
        outside[np.ix_(*inside)] = 0
        assert not outside.any()


@pytest.mark.parametrize(
    ("retina", "size", "background"),
    [
        (RetinaConfig(), (101, 150), 255),
        (RetinaConfig(px_per_degree=10), (90, 70), 27),
        (RetinaConfig(px_per_degree=10, pooling="max"), (97, 97), 0),
        (RetinaConfig(eccentricity=False), (64, 64), 255),
    ],
)
def test_the_surround_is_the_same_everywhere(retina, size, background):
    torch.manual_seed(0)
    net = EccNet(EccNetConfig(widths=(3, 4, 5, 6, 7), retina=retina)).eval()
    for conv in net.modules():
        if isinstance(conv, torch.nn.Conv2d):
            torch.nn.init.normal_(conv.bias)  # so that the border of the window is felt
    half = size[0] + 64
    windows = WindowFeatures(net, 2 * half, background)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    padded = Padded.around(image, half=half, background=background)
    with torch.inference_mode():
        for fixation in ((size[0] // 2, size[1] // 2), (0, 0), (size[0] - 1, 37), (3, size[1] - 1)):
            pairs = zip(windows.at(padded, fixation), windows.whole(padded, fixation), strict=True)
            for found, wanted in pairs:
                assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()))


def test_only_what_is_drawn_is_computed():
    """A small item on background, at the border too, and a picture without any."""
    torch.manual_seed(0)
    net = EccNet(EccNetConfig(widths=(3, 4, 5, 6, 7), retina=RetinaConfig(px_per_degree=10))).eval()
    for conv in net.modules():
        if isinstance(conv, torch.nn.Conv2d):
            torch.nn.init.normal_(conv.bias)
    height, width, background = 90, 260, 27
    windows = WindowFeatures(net, 2 * (height + 64), background)
    rng = np.random.default_rng(0)
    sizes, looked = [], 0
    net.blocks[0].relu1.register_forward_hook(lambda *of: sizes.append(of[2].shape[2:]))
    for rows, columns in (
        (slice(40, 60), slice(100, 130)),
        (slice(0, 9), slice(0, 4)),
        (None,) * 2,
    ):
        image = np.full((height, width, 3), background, dtype=np.uint8)
        if rows is not None:
            image[rows, columns] = rng.integers(0, 256, image[rows, columns].shape)
        padded = Padded.around(image, half=windows.side // 2, background=background)
        with torch.inference_mode():
            for fixation in ((45, 130), (0, 0), (89, 259)):
                wanted = windows.whole(padded, fixation)
                sizes.clear()
                for ours, whole in zip(windows.at(padded, fixation), wanted, strict=True):
                    assert torch.allclose(ours, whole, atol=2e-5 * float(whole.abs().max()))
                assert all(max(size) < 0.5 * windows.side for size in sizes[-1:])
                looked += len(sizes)
    # The empty window, the item thrice, the corner twice: it is out of one window.
    assert looked == 6


def test_what_a_shift_by_four_pixels_leaves_alike_is_kept():
    torch.manual_seed(0)
    net = EccNet(EccNetConfig(widths=(3, 4, 5, 6, 7), retina=RetinaConfig(px_per_degree=10))).eval()
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)
    fresh, kept = (WindowFeatures(net, 288, 255) for _ in range(2))
    looks = []
    net.blocks[0].relu1.register_forward_hook(lambda *_: looks.append(1))
    counts = []
    with torch.inference_mode():
        for fixation in ((40, 40), (44, 32), (45, 32), (41, 40)):
            padded = Padded.around(image, half=144, background=255)
            fresh.forget()
            wanted = fresh.at(padded, fixation)
            looks.clear()
            assert all(map(torch.equal, kept.at(padded, fixation), wanted))
            counts.append(len(looks))
        image[10:20, 10:20] = 255  # a picture that changes is looked at again
        padded = Padded.around(image, half=144, background=255)
        looks.clear()
        for ours, whole in zip(
            kept.at(padded, (40, 40)), fresh.whole(padded, (40, 40)), strict=True
        ):
            assert torch.allclose(ours, whole, atol=2e-5 * float(whole.abs().max()))
    assert counts == [2, 0, 1, 0]  # the first one sees the empty window too
    assert len(looks) == 2


class Oracle:
    """Attends to the target."""

    def prepare(self, scene, config):
        self.truth = scene.truth
        return self

    def look(self, image, fixation):
        return self.truth.astype(float)


class Uniform:
    """Attends to everything alike."""

    def prepare(self, scene, config):
        return self

    def look(self, image, fixation):
        self.last = image
        return np.ones(image.shape[:2])


def scene_of_cells(target_cell=11):
    cells = grid(3, 4, 20)
    image = np.random.default_rng(0).integers(0, 200, (60, 80, 3), dtype=np.uint8)
    return Scene(name="s", image=image, target=image[:9, :8], truth=cells[target_cell], cells=cells)


def test_an_oracle_needs_one_saccade():
    for cell in range(12):
        found = search(scene_of_cells(cell), Oracle(), SearchConfig())
        assert (found.saccades, found.found_at) == (1, 1)


def test_no_cell_is_fixated_twice_and_fixated_cells_are_painted():
    looker = Uniform()
    scene = scene_of_cells()
    found = search(scene, looker, SearchConfig(background=255))
    cells = [int(np.flatnonzero(scene.cells[:, y, x])[0]) for y, x in found.fixations[1:]]
    assert cells == list(range(12))  # ties: reading order of cells' first pixels
    assert found.found_at == 12
    assert (looker.last[:20] == 255).all()
    assert not (looker.last[40:, 60:] == 255).all()
    assert (scene.image <= 200).all()


def test_chance_ends_within_the_number_of_cells():
    counts = []
    for seed in range(40):
        found = search(scene_of_cells(), ChanceSearcher(seed), SearchConfig())
        assert found.found_at is not None
        assert found.found_at <= 12
        counts.append(found.found_at)
    assert 5 < np.mean(counts) < 8  # (12 + 1) / 2


def test_the_number_of_fixations_is_limited():
    found = search(scene_of_cells(), Uniform(), SearchConfig(max_fixations=4))
    assert len(found.fixations) == 4
    assert found.found_at is None


def test_without_cells_a_square_is_inhibited_and_the_start_is_tested():
    image = np.full((40, 50, 3), 90, dtype=np.uint8)
    image[30:36, 40:47] = np.arange(7, dtype=np.uint8)[None, :, None] * 30
    truth = np.zeros((40, 50), dtype=bool)
    truth[30:36, 40:47] = True
    scene = Scene(name="s", image=image, target=image[30:36, 40:47], truth=truth)
    config = SearchConfig(inhibition=16)
    found = search(scene, PixelMatchSearcher(), config)
    assert found.found_at == 1
    assert tuple(found.fixations[1]) == (33, 43)  # the middle of the target
    walked = search(Scene(name="s", image=image, target=image[:5, :5]), Uniform(), config)
    path = walked.fixations
    assert walked.found_at is None
    for late in range(1, len(path)):
        gaps = np.abs(path[:late] - path[late]).max(axis=1)
        assert (gaps >= 8).all()
    truth[:] = False
    truth[20, 25] = True
    start = search(
        Scene(name="s", image=image, target=image[:5, :5], truth=truth), Uniform(), config
    )
    assert start.found_at == 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": np.zeros((70, 8, 3), np.uint8)}, "target is 70 x 8"),
        ({"truth": np.zeros((60, 80), bool)}, "empty"),
        ({"truth": np.ones((6, 80), bool)}, "6 x 80"),
        ({"cells": np.ones((2, 60, 8), bool)}, "60 x 8"),
        ({"cells": np.zeros((2, 60, 80), bool)}, "no cell"),
    ],
)
def test_scenes_that_do_not_fit_are_refused(change, said):
    whole = scene_of_cells()
    with pytest.raises(InputError, match=said) as caught:
        Scene(**{**whole.__dict__, **change})
    assert str(caught.value).startswith("s: ")
