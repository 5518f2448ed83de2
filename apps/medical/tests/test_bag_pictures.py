"""The picture of the attention over a slide: what its colours say and how large it is."""

from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb

from heed_medical.bags.prediction import BagPrediction
from heed_medical_cli.bag_pictures import draw_heatmaps
from heed_runtime.report import save_figure


def prediction(attention: np.ndarray) -> BagPrediction:
    count = attention.shape[1]
    coords = np.stack([np.arange(count) % 4, np.arange(count) // 4], axis=1) * 64
    return BagPrediction(
        name="s", probabilities=(0.2, 0.8), attention=attention, coords=coords, patch_size=64
    )


def test_even_attention_has_the_colour_between_less_and_more():
    even = np.full((3, 16), 1 / 16, np.float32)
    peaked = even.copy()
    peaked[:, 5] += 0.5
    peaked /= peaked.sum(1, keepdims=True)
    for attention in (even, peaked):
        figure = draw_heatmaps(prediction(attention), None, ("benign", "malignant"))
        for axes in figure.axes:
            for drawn in axes.get_images():
                assert drawn.norm(1.0) == 0.5
                assert drawn.norm(0.0) == 0.0
                assert drawn.norm.vmax >= 2.0
                red, _, blue = to_rgb(drawn.cmap(drawn.norm(drawn.norm.vmax)))
                assert red > blue


def test_the_map_of_the_slide_is_larger_than_those_of_branches(tmp_path: Path):
    attention = np.random.default_rng(0).dirichlet(np.ones(16), 3).astype(np.float32)
    thumbnail = (np.full((256, 256, 3), 200, np.uint8), (256, 256))
    for shown in (thumbnail, None):
        figure = draw_heatmaps(prediction(attention), shown, ("benign", "malignant"))
        save_figure(figure, tmp_path / "a.png")
        sizes = {
            axes.get_title(): axes.get_window_extent().width
            for axes in figure.axes
            if axes.get_title()
        }
        wanted = {"called malignant (0.80)", "branch 1", "branch 2", "branch 3"}
        assert set(sizes) == wanted | ({"s"} if shown else set())
        assert sizes["called malignant (0.80)"] > 1.4 * sizes["branch 1"]
    alone = draw_heatmaps(prediction(attention[:1]), None, ("benign", "malignant"))
    assert not any("branch" in axes.get_title() for axes in alone.axes)


def test_the_slide_under_a_map_is_grey_so_that_colours_are_attention():
    attention = np.random.default_rng(0).dirichlet(np.ones(16), 1).astype(np.float32)
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[..., 0] = 200
    figure = draw_heatmaps(prediction(attention), (picture, (256, 256)), ("benign", "malignant"))
    slide, overall = (
        next(axes for axes in figure.axes if axes.get_title().startswith(start))
        for start in ("s", "called")
    )
    np.testing.assert_array_equal(slide.get_images()[0].get_array(), picture)
    under = np.asarray(overall.get_images()[0].get_array())
    assert under.ndim == 2 or (under == under[..., :1]).all()
