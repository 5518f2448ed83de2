"""Colours of classes, values and comparisons, and open3d where it is installed."""

import os
from pathlib import Path

import numpy as np
import pytest

from heed_core.errors import InputError
from heed_lidar.drawing import Line, perspective
from heed_lidar.labels import BUILTIN
from heed_lidar.pictures import (
    FALSE_ALARM,
    HIT,
    MISS,
    REST,
    STREET_COLOURS,
    PictureSize,
    class_colours,
    draw_comparison,
    draw_scan,
    draw_values,
    heat_colours,
    heat_table,
    shown_region,
    value_limits,
)

SMALL = PictureSize(map_px=300, view_px=(320, 200))
DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[4] / "shared" / "data"))


def has(picture, colour):
    return (np.abs(picture.astype(int) - colour).max(-1) < 12).sum()


def blocks():
    """Four dense squares of points beside each other, and the number of each one."""
    side = np.linspace(0, 3, 40)
    x, y = (grid.reshape(-1) for grid in np.meshgrid(side, side))
    corners = [(4, 6), (4, 1), (4, -4), (4, -9)]
    xyz = np.concatenate([np.stack([x + a, y + b, 0 * x - 1.7], -1) for a, b in corners])
    return xyz, np.repeat(np.arange(4), len(x))


def test_a_scan_is_drawn_in_the_colours_of_its_classes():
    xyz, number = blocks()
    names = BUILTIN["curb"].names
    line = np.array([[10.0, -5, -1.7], [10, 5, -1.7]])
    drawn = draw_scan(
        xyz, number, names=names, colours=BUILTIN["curb"].colours, curbs=[line], size=SMALL
    )
    assert set(drawn) == {"birds-eye", "perspective"}
    assert drawn["birds-eye"].shape[1] > 300
    assert drawn["perspective"].shape == (200, 320, 3)
    for name in ("ignore", "curb", "road", "sidewalk"):
        assert has(drawn["birds-eye"], STREET_COLOURS[name]) > 300
    assert has(drawn["birds-eye"], (255, 255, 255)) > 30
    without = draw_scan(xyz, number, names=names, colours=BUILTIN["curb"].colours, size=SMALL)
    assert (without["perspective"] != drawn["perspective"]).any()
    # A class that is absent is not in the legend.
    assert has(without["birds-eye"], STREET_COLOURS["others"]) < 5


def test_classes_of_other_maps_keep_their_hue_and_are_visible():
    table = BUILTIN["semantic-kitti"]
    shown = class_colours(table.names, table.colours)
    assert (shown @ (0.3, 0.59, 0.11) > 60).all()
    car = table.class_named("car")
    assert shown[car].tolist() == table.colours[car].tolist()
    assert shown[table.class_named("road")].tolist() == list(STREET_COLOURS["road"])


def test_a_comparison_tells_hits_misses_and_false_alarms_apart():
    xyz, number = blocks()
    drawn = draw_comparison(xyz, (number == 1) | (number == 2), number >= 2, size=SMALL)
    areas = [has(drawn["birds-eye"], colour) for colour in (REST, MISS, HIT, FALSE_ALARM)]
    assert min(areas) > 200
    columns = [
        np.nonzero(np.abs(drawn["birds-eye"][100:].astype(int) - c).max(-1) < 12)[1].mean()
        for c in (MISS, HIT, FALSE_ALARM)
    ]
    assert columns == sorted(columns)


def test_values_are_drawn_in_the_order_of_their_colours():
    xyz, number = blocks()
    drawn = draw_values(xyz, number.astype(float), name="share", limits=(0.0, 3.0), size=SMALL)
    for value in range(4):
        colour = heat_colours(np.array([float(value)]), limits=(0.0, 3.0))[0]
        assert has(drawn["birds-eye"], colour) > 300


def test_heat_is_linear_between_its_limits():
    table = heat_table()
    colours = heat_colours(np.array([0.0, 0.5, 1.0, -9.0, 9.0, np.nan]), limits=(0.0, 1.0))
    expected = [table[0], table[128], table[255], table[0], table[255], REST]
    assert colours.tolist() == [[int(c) for c in colour] for colour in expected]
    brightness = heat_table().astype(float) @ (0.3, 0.59, 0.11)
    assert (np.diff(brightness) > -0.5).all()
    signed = heat_table(signed=True).astype(float)
    assert signed[0, 2] > signed[0, 0]
    assert signed[-1, 0] > signed[-1, 2]
    assert signed[128].sum() < min(signed[0].sum(), signed[-1].sum())


def test_limits_leave_out_the_extremes_and_what_is_unknown():
    values = np.concatenate([np.linspace(0, 1, 1001), [50.0, np.nan, np.inf]])
    low, high = value_limits(values)
    assert (low, high) == pytest.approx((0.01, 0.99), abs=0.002)
    low, high = value_limits(-values, signed=True)
    assert low == -high
    assert value_limits(np.array([np.nan])) == (0.0, 1.0)
    equal = heat_colours(np.array([2.0, 2.0]), limits=(2.0, 2.0))
    assert (equal[0] == equal[1]).all()


def test_the_region_holds_the_scan():
    ahead = np.random.default_rng(0).uniform((0, -12, -2), (25, 12, 0), (5000, 3))
    region = shown_region(ahead)
    assert (region.x_low, region.x_high) == (0, 25)
    assert region.y_high == -region.y_low == 15
    far = shown_region(ahead * 100)
    assert (far.x_high, far.y_high) == (50, 30)


def test_empty_scans_are_drawn():
    nothing, none = np.zeros((0, 3)), np.zeros(0)
    table = BUILTIN["curb"]
    for drawn in (
        draw_scan(nothing, none.astype(int), names=table.names, colours=table.colours, size=SMALL),
        draw_values(nothing, none, name="x", size=SMALL),
        draw_comparison(nothing, none > 0, none > 0, size=SMALL),
    ):
        assert all(picture.size for picture in drawn.values())


def test_a_real_scan_is_drawn():
    path = DATA / "restricted" / "lidar" / "000000.bin"
    if not path.is_file():
        pytest.skip(f"no real scan at {path}")
    points = np.fromfile(path, "<f4").reshape(-1, 4)
    table = BUILTIN["curb"]
    classes = table.classes_of(np.fromfile(path.with_suffix(".label"), "<u4"))
    xyz = points[:, :3].astype(np.float64)
    drawn = draw_scan(xyz, classes, names=table.names, colours=table.colours)
    for picture in drawn.values():
        assert has(picture, STREET_COLOURS["road"]) + has(picture, STREET_COLOURS["sidewalk"]) > 500


@pytest.mark.bad_input
def test_tiny_pictures_are_refused():
    with pytest.raises(ValueError, match="at least 100 pixels"):
        PictureSize(map_px=10)


def test_a_window_needs_a_display(monkeypatch):
    pytest.importorskip("open3d")
    from heed_lidar.drawing3d import show

    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="no display"):
        show(np.zeros((1, 3)), np.zeros((1, 3), np.uint8))


@pytest.mark.slow
def test_open3d_draws_the_same_view():
    pytest.importorskip("open3d")
    from heed_lidar.drawing3d import open3d_perspective, why_not_open3d

    reason = why_not_open3d()
    if reason is not None:
        pytest.skip(f"open3d cannot draw here: {reason}")
    xyz, _ = blocks()
    white = np.full((len(xyz), 3), 255, np.uint8)
    line = Line(points=np.array([[12.0, -5, -1.7], [12, 5, -1.7]]), colour=(255, 0, 0))
    size = (400, 300)
    theirs = open3d_perspective(xyz, white, size=size, polylines=[line])
    ours = perspective(xyz, white, size=size, polylines=[line], fog_m=None)
    lit = [picture.min(-1) > 150 for picture in (ours, theirs)]
    overlap = (lit[0] & lit[1]).sum() / (lit[0] | lit[1]).sum()
    assert overlap > 0.7
    assert (theirs[..., 0].astype(int) - theirs[..., 1] > 100).sum() > 50
