"""The rasteriser: known metres become known pixels, and the nearer point is seen."""

import math

import numpy as np
import pytest
from PIL import Image

from heed_lidar.drawing import (
    BACKGROUND,
    HEADER_PX,
    MARGIN_PX,
    Caption,
    ColourBar,
    Line,
    Region,
    birds_eye,
    perspective,
    write_png,
)

RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)
SQUARE = Region(x_low=-10.0, x_high=10.0, y_low=-10.0, y_high=10.0)


def cloud(*rows):
    return np.array(rows, float).reshape(-1, 3)


def inks(*colours):
    return np.array(colours, np.uint8).reshape(-1, 3)


def centre_of(picture, colour):
    """Mean (column, row) of the pixels of a colour."""
    rows, columns = np.nonzero(np.abs(picture.astype(int) - colour).max(-1) < 40)
    assert len(rows)
    return columns.mean() + 0.5, rows.mean() + 0.5


def on_map(x, y, *, scale, region=SQUARE):
    return MARGIN_PX + (region.y_high - y) * scale, HEADER_PX + (region.x_high - x) * scale


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.0), (5.0, -3.0), (-7.25, 8.5)])
def test_a_metre_of_the_map_is_a_known_number_of_pixels(x, y):
    picture = birds_eye(
        cloud((x, y, 0)), inks(RED), region=SQUARE, width=400, point_px=5.0, sensor=False
    )
    assert centre_of(picture, RED) == pytest.approx(on_map(x, y, scale=20), abs=0.6)


def test_forward_is_up_and_left_is_left():
    points = cloud((6, 0, 0), (0, 6, 0), (0, 0, 0))
    picture = birds_eye(points, inks(RED, GREEN, BLUE), region=SQUARE, point_px=7.0, sensor=False)
    (fx, fy), (lx, ly), (ox, oy) = (centre_of(picture, c) for c in (RED, GREEN, BLUE))
    assert fy < oy - 100
    assert lx < ox - 100
    assert (fx, ly) == pytest.approx((ox, oy), abs=1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_higher_of_two_points_is_seen_from_above(order):
    points, colours = cloud((0, 0, 1), (0, 0, 2))[list(order)], inks(RED, GREEN)[list(order)]
    picture = birds_eye(points, colours, region=SQUARE, point_px=9.0, sensor=False)
    column, row = (int(v) for v in centre_of(picture, GREEN))
    assert picture[row, column].tolist() == list(GREEN)
    assert not (np.abs(picture.astype(int) - RED).max(-1) < 40).any()


def test_emphasised_points_are_seen_over_higher_ones():
    points = cloud((0, 0, 1), (0, 0, 2))
    picture = birds_eye(
        points,
        inks(RED, GREEN),
        region=SQUARE,
        emphasis=np.array([True, False]),
        point_px=9.0,
        sensor=False,
    )
    centre_of(picture, RED)
    assert not (np.abs(picture.astype(int) - GREEN).max(-1) < 40).any()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearer_of_two_points_is_seen_through_the_pinhole(order):
    points, colours = cloud((5, 0, 0), (9, 0, 0))[list(order)], inks(RED, GREEN)[list(order)]
    picture = perspective(
        points,
        colours,
        eye=(0.0, 0.0, 0.0),
        look_at=(1.0, 0.0, 0.0),
        point_m=0.4,
        size=(300, 200),
        fog_m=None,
    )
    assert picture[100, 150].tolist() == list(RED)
    assert not (np.abs(picture.astype(int) - GREEN).max(-1) < 40).any()


def test_the_pinhole_has_the_stated_angle_of_view():
    # 90 degrees: the focal length is half the width, so y / x = 0.5 is a quarter of the width.
    points = cloud((10, 5, 0), (10, 0, 2))
    picture = perspective(
        points,
        inks(RED, GREEN),
        eye=(0.0, 0.0, 0.0),
        look_at=(1.0, 0.0, 0.0),
        fov_deg=90.0,
        size=(400, 200),
        point_m=0.2,
        fog_m=None,
    )
    assert centre_of(picture, RED) == pytest.approx((100, 100), abs=1)
    assert centre_of(picture, GREEN) == pytest.approx((200, 60), abs=1)


def test_points_behind_the_eye_are_not_drawn():
    picture = perspective(
        cloud((-5, 0, 0)), inks(RED), eye=(0.0, 0.0, 0.0), look_at=(1.0, 0.0, 0.0), size=(200, 120)
    )
    assert not (np.abs(picture.astype(int) - RED).max(-1) < 90).any()


def test_the_eye_may_look_straight_down():
    picture = perspective(
        cloud((0, 0, 0), (2, 0, 0)),
        inks(RED, GREEN),
        eye=(0.0, 0.0, 10.0),
        look_at=(0.0, 0.0, 0.0),
        size=(200, 200),
        point_m=0.5,
        fog_m=None,
    )
    column, row = centre_of(picture, RED)
    assert (column, row) == pytest.approx((100, 100), abs=1)
    assert centre_of(picture, GREEN)[1] < row - 10


def test_lines_run_where_their_points_are():
    line = Line(points=cloud((-8, 4, 0), (8, 4, 0)), colour=RED, width_px=3.0)
    picture = birds_eye(cloud(), inks(), region=SQUARE, width=400, polylines=[line], sensor=False)
    red = np.abs(picture.astype(int) - RED).max(-1) < 60
    column = round(on_map(0, 4, scale=20)[0])
    for x in (-7, 0, 7):
        assert red[round(on_map(x, 4, scale=20)[1]), column - 1 : column + 2].any()
    rows, columns = np.nonzero(red)
    assert np.ptp(columns) <= 4
    assert np.ptp(rows) == pytest.approx(16 * 20, abs=4)


def test_lines_are_cut_in_front_of_the_eye():
    line = Line(points=cloud((-10, 1, -1), (10, 1, -1), (-10, 1, -1)), colour=RED, width_px=3.0)
    picture = perspective(
        cloud(),
        inks(),
        eye=(0.0, 0.0, 0.0),
        look_at=(1.0, 0.0, 0.0),
        fov_deg=90.0,
        size=(400, 400),
        polylines=[line],
    )
    red = np.abs(picture.astype(int) - RED).max(-1) < 60
    rows, columns = np.nonzero(red)
    # The end (10, 1, -1) is a tenth of 200 pixels left of and below the middle.
    assert columns.max() == pytest.approx(180, abs=3)
    assert rows.min() == pytest.approx(220, abs=3)
    assert (columns < 200).all()
    assert (rows > 200).all()


@pytest.mark.parametrize("width", [300, 801])
def test_pictures_have_the_size_that_was_asked_for(width):
    region = Region(x_low=-5.0, x_high=25.0, y_low=-10.0, y_high=10.0)
    above = birds_eye(cloud(), inks(), region=region, width=width)
    assert above.shape == (
        round(30 * width / 20) + HEADER_PX + MARGIN_PX,
        width + MARGIN_PX + 16,
        3,
    )
    assert perspective(cloud(), inks(), size=(321, 123)).shape == (123, 321, 3)


def test_an_empty_cloud_gives_an_empty_map():
    picture = birds_eye(cloud(), inks(), region=SQUARE, sensor=False)
    assert picture.dtype == np.uint8
    assert (np.abs(picture.astype(int) - BACKGROUND).max(-1) == 0).mean() > 0.8


def test_captions_appear():
    caption = Caption(
        title="A street",
        legend=[("curb", RED), ("a long name of a class", GREEN)],
        bar=ColourBar(title="height (m)", low="-2", high="1", colours=inks(BLUE, BLUE)),
    )
    for bare, written in (
        (birds_eye(cloud(), inks()), birds_eye(cloud(), inks(), caption=caption)),
        (perspective(cloud(), inks()), perspective(cloud(), inks(), caption=caption)),
    ):
        changed = (bare != written).any(-1)
        assert changed[:HEADER_PX].any()
        for colour in (RED, GREEN, BLUE):
            assert (written[changed] == colour).all(-1).sum() > 50


def test_points_fade_with_distance():
    points = cloud((5, -1, 0), (60, 12, 0))
    picture = perspective(
        points,
        inks(RED, RED),
        eye=(0.0, 0.0, 0.0),
        look_at=(1.0, 0.0, 0.0),
        point_m=1.0,
        size=(400, 200),
    )
    red = picture[..., 0].astype(int)
    assert red[:, 200:].max() > red[:, :200].max() + 60


def test_later_rows_do_not_matter_where_depths_differ():
    rng = np.random.default_rng(0)
    points = rng.uniform(-9, 9, (3000, 3))
    colours = rng.integers(0, 256, (3000, 3), dtype=np.uint8)
    shuffled = rng.permutation(3000)
    for draw in (
        lambda p, c: birds_eye(p, c, region=SQUARE, width=200),
        lambda p, c: perspective(p, c, size=(200, 150)),
    ):
        assert (draw(points, colours) == draw(points[shuffled], colours[shuffled])).all()


def test_a_picture_is_written_without_loss(tmp_path):
    picture = birds_eye(cloud((1, 2, 3)), inks(RED), region=SQUARE, width=200)
    write_png(tmp_path / "map.png", picture)
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG"
        assert (np.asarray(image) == picture).all()


@pytest.mark.bad_input
def test_impossible_views_are_refused():
    with pytest.raises(ValueError, match="low < high"):
        Region(x_low=3.0, x_high=3.0)
    with pytest.raises(ValueError, match="fov_deg"):
        perspective(cloud(), inks(), fov_deg=180.0)
    with pytest.raises(ValueError, match="must differ"):
        perspective(cloud(), inks(), eye=(1.0, 1.0, 1.0), look_at=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="low < high"):
        Region(x_low=math.nan)
