"""Ray casting against closed forms, and made data sets against what they claim."""

import json
import math

import numpy as np
import pytest

from heed_core.errors import InputError
from heed_lidar.scenes.centreline import Centreline
from heed_lidar.scenes.curb_lines import true_curbs
from heed_lidar.scenes.files import SceneSet, scene_of, write_scenes
from heed_lidar.scenes.objects import Box, Cylinder, Ellipsoid
from heed_lidar.scenes.plans import KINDS, draw_scene
from heed_lidar.scenes.sensor import Scene, Sensor, Surfaces, ground_distance, sweep
from heed_lidar.scenes.street import (
    DroppedCurb,
    Edge,
    Patch,
    Relief,
    SideStreet,
    SpeedBump,
    Street,
)

EXACT = {"range_noise_m": 0.0, "dropout": 0.0}
SMOOTH = Surfaces(grain_m=0.0)


def flat_street(**changes):
    edge = Edge(depth_m=0.2, face_m=0.05)
    return Street(**{"cross_fall": 0.0, "undulation_m": 0.0, "left": edge, "right": edge} | changes)


def scan(street=None, *, things=(), seed=0, sensor=None, **changes):
    scene = Scene(street=street or flat_street(), things=things, surfaces=SMOOTH, **changes)
    return sweep(
        scene, sensor or Sensor(azimuth_step_deg=1.0, **EXACT), np.random.default_rng(seed)
    )


def points(*xy):
    return tuple(np.array(column, float) for column in zip(*xy, strict=True))


def test_rings_on_flat_ground_are_where_their_elevation_meets_it():
    sensor = Sensor(azimuth_step_deg=1.0, **EXACT)
    seen = scan(flat_street(curb_height_m=0.0), sensor=sensor)
    np.testing.assert_allclose(seen.xyz[:, 2], -1.73, atol=1e-9)
    elevation = np.radians(sensor.elevations_deg)
    for ring in np.unique(seen.ring):
        expected = 1.73 / math.tan(-elevation[ring])
        radius = np.hypot(seen.xyz[seen.ring == ring, 0], seen.xyz[seen.ring == ring, 1])
        np.testing.assert_allclose(radius, expected, rtol=1e-9)
        assert len(radius) == 360
    hit = 1.73 / np.sin(-elevation[elevation < 0]) <= 80
    assert len(np.unique(seen.ring)) == hit.sum()


def test_points_come_ring_by_ring_turning_left_from_the_front():
    seen = scan(flat_street(curb_height_m=0.0))
    assert (np.diff(seen.ring) >= 0).all()
    azimuth = np.degrees(np.arctan2(seen.xyz[:, 1], seen.xyz[:, 0])) % 360
    for ring in np.unique(seen.ring):
        np.testing.assert_allclose(azimuth[seen.ring == ring], np.arange(360), atol=1e-6)


@pytest.mark.parametrize("bend", [0.0, 1 / 900, -1 / 900])
def test_rays_end_on_sloping_bent_ground(bend):
    street = flat_street(relief=Relief(grade=0.05, cross=-0.03, bend_per_m=bend))
    origin = np.array([1.0, -2.0, 2.0])
    rng = np.random.default_rng(1)
    rays = rng.normal(size=(2000, 3)) * (1, 1, 0.15)
    rays /= np.linalg.norm(rays, axis=1)[:, None]
    distance = ground_distance(street, origin, rays, limit_m=60.0)
    hit = np.isfinite(distance)
    assert 400 < hit.sum() < 1900
    end = origin + distance[hit, None] * rays[hit]
    np.testing.assert_allclose(end[:, 2], street.height(end[:, 0], end[:, 1]), atol=1e-6)
    # Nothing on the way there is under the ground, and what misses stays above it to the end.
    reach = np.where(hit, distance, 60.0)
    for share in np.linspace(0.05, 0.999, 40):
        way = origin + (share * reach)[:, None] * rays
        assert (way[:, 2] - street.height(way[:, 0], way[:, 1]) > -1e-6).all()


def test_rays_end_on_a_street_with_everything():
    street = Street(
        centreline=Centreline(radius_m=30.0, start_m=5.0, angle_rad=1.2),
        side_streets=(SideStreet(u_m=12.0, side="right"),),
        dropped=(DroppedCurb(u_m=-10.0, side="left"),),
        bumps=(SpeedBump(u_m=9.0),),
    )
    seen = scan(street)
    pose = Scene(street=street).pose(1.73)
    world = seen.xyz @ pose[:3, :3].T + pose[:3, 3]
    np.testing.assert_allclose(world[:, 2], street.height(world[:, 0], world[:, 1]), atol=2e-4)
    assert {3, 40, 48, 49, 72} <= set(seen.raw.tolist())


def test_a_wall_is_hit_at_its_face():
    wall = Box(x=11.0, y=0.0, low=-1.0, high=9.0, raw=50, length_m=2.0, width_m=500.0)
    seen = scan(things=(wall,))
    at = seen.raw == 50
    assert at.sum() > 3000
    np.testing.assert_allclose(seen.xyz[at, 0], 10.0, atol=1e-9)
    assert seen.xyz[:, 0].max() <= 10.0 + 1e-9


def test_a_box_hides_what_is_behind_it():
    box = Box(x=8.0, y=-2.0, low=0.0, high=1.5, raw=10, instance=7, length_m=4.0, width_m=1.8)
    with_box, without = scan(things=(box,)), scan()
    hit = with_box.raw == (10 | 7 << 16)
    assert hit.any()
    # The sensor stands at y = -2: in its frame the box spans |y| < 0.9 from x = 6 to 10.
    bearing = np.abs(np.arctan2(with_box.xyz[:, 1], with_box.xyz[:, 0]))
    inside = bearing < math.atan2(0.9, 10.0) - 0.01
    # The shadow reaches as far as the line over the rear upper edge: 10 / (1.73 - 1.5) * 1.73.
    shadow = inside & (with_box.xyz[:, 0] > 10.01) & (with_box.xyz[:, 0] < 75)
    assert not shadow.any()
    bare = np.abs(np.arctan2(without.xyz[:, 1], without.xyz[:, 0])) < 0.1
    assert (bare & (without.xyz[:, 0] > 10.01)).sum() > 100


def test_the_nearest_of_ground_and_things_wins():
    near = Box(x=8.0, y=-2.0, low=-1.0, high=1.5, raw=10, length_m=2.0, width_m=3.0)
    far = Box(x=14.0, y=-2.0, low=-1.0, high=1.0, raw=50, length_m=2.0, width_m=2.0)
    buried = Box(x=5.0, y=-2.0, low=-3.0, high=-0.1, raw=80, length_m=30.0, width_m=30.0)
    seen = scan(things=(near, far, buried))
    again = scan(things=(buried, far, near))
    assert (seen.xyz == again.xyz).all()
    assert (seen.raw == again.raw).all()
    assert (seen.raw == 10).sum() > 100
    assert not np.isin(seen.raw, (50, 80)).any()


def test_cylinders_and_ellipsoids_are_hit_on_their_surface():
    rng = np.random.default_rng(0)
    rays = rng.normal(size=(5000, 3)) * (0.2, 0.2, 0.2) + (1, 0, 0)
    rays /= np.linalg.norm(rays, axis=1)[:, None]
    pole = Cylinder(x=10.0, y=0.0, low=-2.0, high=1.0, raw=80, radius_m=0.5)
    near, cosine = pole.hit(np.zeros(3), rays)
    end = near[np.isfinite(near), None] * rays[np.isfinite(near)]
    assert len(end) > 100
    np.testing.assert_allclose(np.hypot(end[:, 0] - 10, end[:, 1]), 0.5, atol=1e-9)
    assert end[:, 2].min() >= -2
    assert end[:, 2].max() <= 1
    assert ((cosine >= 0) & (cosine <= 1)).all()
    crown = Ellipsoid(x=10.0, y=0.0, low=-1.0, high=3.0, raw=70, radius_m=1.5)
    near, _ = crown.hit(np.zeros(3), rays)
    end = near[np.isfinite(near), None] * rays[np.isfinite(near)]
    surface = ((end - (10, 0, 1)) / (1.5, 1.5, 2)) ** 2
    np.testing.assert_allclose(surface.sum(-1), 1.0, atol=1e-9)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("angle", [0.6, 1.6, 3.0])
def test_street_coordinates_and_places_are_inverse(left, angle):
    line = Centreline(radius_m=20.0, left=left, start_m=-4.0, angle_rad=angle)
    rng = np.random.default_rng(0)
    u, v = rng.uniform(-20, 50, 500), rng.uniform(-9, 9, 500)
    found_u, found_v = line.locate(*line.point(u, v))
    np.testing.assert_allclose(found_u, u, atol=1e-9)
    np.testing.assert_allclose(found_v, v, atol=1e-9)
    x, y = line.point(u, np.zeros(500))
    step_x, step_y = line.point(u + 1e-6, np.zeros(500))
    heading = np.array([line.heading(value) for value in u])
    np.testing.assert_allclose(np.arctan2(step_y - y, step_x - x), heading, atol=1e-6)


def test_labels_and_heights_at_known_places():
    street = flat_street(
        half_width_m=4.0,
        curb_height_m=0.15,
        dropped=(DroppedCurb(u_m=20.0, side="left"),),
        bumps=(SpeedBump(u_m=30.0, height_m=0.08),),
        right=Edge(curbed=False, sidewalk_m=2.0),
    )
    places = {
        (0, 0): (40, 0.0),
        (0, 3.99): (40, 0.0),
        (0, 4.025): (3, 0.075),  # half-way up a face of 0.05 m
        (0, 4.1): (3, 0.15),
        (0, 4.19): (3, 0.15),
        (0, 4.21): (48, 0.15),
        (0, 6.19): (48, 0.15),
        (0, 6.21): (72, 0.15),
        (20, 4.1): (48, 0.15 * 0.12),
        (30, 0): (49, 0.08),
        (0, -4.1): (48, 0.0),
        (0, -6.1): (72, 0.0),
    }
    x, y = points(*places)
    assert street.labels(x, y).tolist() == [raw for raw, _ in places.values()]
    np.testing.assert_allclose(street.height(x, y), [z for _, z in places.values()], atol=1e-9)


def test_corners_of_a_side_street_are_round():
    joining = SideStreet(u_m=10.0, side="left", half_width_m=3.0, fillet_m=5.0)
    street = flat_street(half_width_m=4.0, side_streets=(joining,))
    places = points((10, 8), (10, 40), (10, -5), (5.5, 4.5))
    assert street.labels(*places).tolist() == [40, 40, 48, 40]
    # The corner's centre is 5 m from either edge; the curb runs 5 m around it.
    angle = np.linspace(0.05, math.pi / 2 - 0.05, 20)
    for radius, expected in ((5.02, 40), (4.9, 3), (4.7, 48)):
        x, y = 2 + radius * np.cos(angle), 9 - radius * np.sin(angle)
        assert set(street.labels(x, y).tolist()) == {expected}
    np.testing.assert_allclose(street.place(*points((2, 9))).s, 5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_true_curbs_run_along_the_upper_edge(kind):
    for seed in range(3):
        scene = draw_scene(np.random.default_rng(seed), kind=kind)
        curbs = true_curbs(scene.street, around=scene.sensor_xy, reach_m=50.0)
        assert curbs
        for curb in curbs:
            x, y, z = curb.polyline.T
            place = scene.street.place(x, y)
            edge = scene.street.left if curb.side == "left" else scene.street.right
            np.testing.assert_allclose(place.s, edge.face_m, atol=1e-4)
            np.testing.assert_allclose(z, scene.street.height(x, y), atol=1e-9)
            assert set(scene.street.labels(x, y).tolist()) == {3}
            assert (np.hypot(*np.diff(curb.polyline[:, :2], axis=0).T) < 0.8).all()


def test_true_curbs_leave_out_driveways_mouths_and_flush_edges():
    street = flat_street(
        half_width_m=4.0,
        right=Edge(curbed=False),
        dropped=(DroppedCurb(u_m=-10.0, side="left", half_length_m=2.0),),
        side_streets=(SideStreet(u_m=15.0, side="left", half_width_m=3.0, fillet_m=5.0),),
    )
    curbs = true_curbs(street, around=(0.0, 0.0), reach_m=40.0)
    assert {curb.side for curb in curbs} == {"left"}
    x, y = np.concatenate([curb.polyline[:, :2] for curb in curbs]).T
    straight = np.abs(y - 4.05) < 0.01
    assert not (straight & (np.abs(x + 10) < 2)).any()
    assert not (straight & (np.abs(x - 15) < 7.9)).any()
    for there in (-30, -15, 0, 6):
        assert (straight & (np.abs(x - there) < 0.5)).any()
    assert (np.hypot(x, y) <= 40).all()
    corner = (np.hypot(x - 7, y - 9) < 5) & (x < 12.1) & (y < 9.1) & (x > 7)
    assert corner.sum() > 10


def step_at_the_curb(scene):
    """Height behind the true curb lines less that before them, metres."""
    steps = []
    for curb in true_curbs(scene.street, around=scene.sensor_xy, reach_m=20.0):
        x, y, _ = curb.polyline.T
        u, v = scene.street.centreline.locate(x, y)
        for_sure = np.abs(np.abs(v) - scene.street.half_width_m) < 0.2
        before = scene.street.centreline.point(u, v - np.sign(v) * 0.11)
        steps.append((scene.street.height(x, y) - scene.street.height(*before))[for_sure])
    return np.concatenate(steps)


def test_curb_height_zero_takes_away_the_step_and_nothing_else():
    high = draw_scene(np.random.default_rng(3), kind="straight", curb_height_m=0.15)
    flat = draw_scene(np.random.default_rng(3), kind="straight", curb_height_m=0.0)
    assert np.median(step_at_the_curb(high)) > 0.14
    assert np.abs(step_at_the_curb(flat)).max() < 0.01
    assert [(t.x, t.y, t.raw) for t in high.things] == [(t.x, t.y, t.raw) for t in flat.things]
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-30, 30, (2, 4000))
    assert (high.street.labels(x, y) == flat.street.labels(x, y)).all()
    seen = sweep(flat, Sensor(azimuth_step_deg=1.0), np.random.default_rng(0))
    assert (seen.raw == 3).sum() > 100


def test_noise_and_losses_have_the_stated_size():
    street = flat_street(curb_height_m=0.0)
    exact = scan(street)
    lost = scan(street, sensor=Sensor(azimuth_step_deg=1.0, range_noise_m=0.0, dropout=0.05))
    share = 1 - len(lost.xyz) / len(exact.xyz)
    spread = math.sqrt(0.05 * 0.95 / len(exact.xyz))
    assert abs(share - 0.05) < 4 * spread
    noisy = scan(street, sensor=Sensor(azimuth_step_deg=1.0, range_noise_m=0.02, dropout=0.0))
    error = np.linalg.norm(noisy.xyz, axis=1) - np.linalg.norm(exact.xyz, axis=1)
    assert abs(error.mean()) < 4 * 0.02 / math.sqrt(len(error))
    assert error.std() == pytest.approx(0.02, rel=0.05)
    along = np.cross(noisy.xyz, exact.xyz)
    np.testing.assert_allclose(along, 0, atol=1e-9)
    assert ((exact.remission >= 0) & (exact.remission <= 1)).all()


def test_patches_change_the_remission_of_the_road_alone():
    patch = Patch(u_m=(5.0, 15.0), v_m=(-4.0, 0.0), change=0.4)
    plain, patched = scan(), scan(flat_street(patches=(patch,)))
    change = patched.remission - plain.remission
    inside = (plain.xyz[:, 0] > 5.1) & (plain.xyz[:, 0] < 14.9)
    inside &= (plain.xyz[:, 1] - 2 > -3.9) & (plain.xyz[:, 1] - 2 < -0.1)
    assert change[inside].mean() == pytest.approx(0.35, abs=0.05)
    assert np.abs(change[plain.raw != 40]).max() == 0


def test_scans_of_a_full_sensor_have_the_size_of_real_ones():
    scene = draw_scene(np.random.default_rng(5))
    seen = sweep(scene, Sensor(azimuth_step_deg=0.18), np.random.default_rng(0))
    assert 90_000 < len(seen.xyz) < 128_000
    assert len(np.unique(seen.ring)) >= 60
    counts = {int(k): int((seen.raw & 0xFFFF == k).sum()) for k in (3, 40, 48)}
    assert counts[40] > 15_000
    assert 0.005 < counts[3] / len(seen.xyz) < 0.08


def test_a_sector_is_part_of_the_circle():
    whole = scan(sensor=Sensor(azimuth_step_deg=1.0, **EXACT))
    half = scan(sensor=Sensor(azimuth_step_deg=1.0, field_of_view_deg=180.0, **EXACT))
    assert half.xyz[:, 0].min() > 0
    assert len(half.xyz) == pytest.approx(len(whole.xyz) / 2, rel=0.02)


def test_few_beams():
    seen = scan(sensor=Sensor(beams=2, azimuth_step_deg=5.0, **EXACT))
    assert set(seen.ring.tolist()) == {1}
    np.testing.assert_allclose(
        np.degrees(np.arcsin(seen.xyz[:, 2] / np.linalg.norm(seen.xyz, axis=1))), -24.8
    )


def test_a_scene_depends_on_its_seed_alone():
    sensor = Sensor(azimuth_step_deg=2.0)
    first, again, other = (
        sweep(draw_scene(np.random.default_rng(seed)), sensor, np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    assert (first.xyz == again.xyz).all()
    assert (first.raw == again.raw).all()
    assert first.xyz.shape != other.xyz.shape


def test_things_stand_off_the_road_and_the_sensor():
    for seed in range(12):
        scene = draw_scene(np.random.default_rng(seed))
        for thing in scene.things:
            if thing.raw in (50, 80, 71):
                place = scene.street.place(np.array([thing.x]), np.array([thing.y]))
                assert place.s[0] > 0
            inside = math.dist((thing.x, thing.y), scene.sensor_xy)
            assert inside > 0.5 * min(getattr(thing, "width_m", 0.0), 3)


def test_scenes_hold_steps_that_are_no_curbs_and_curbs_that_are_no_steps():
    scenes = [draw_scene(np.random.default_rng(seed)) for seed in range(40)]
    low = [
        t for scene in scenes for t in scene.things if t.raw in (49, 51) and t.high - t.low < 0.8
    ]
    assert len(low) > 40
    assert any(scene.street.bumps for scene in scenes)
    assert any(not (s.street.left.curbed and s.street.right.curbed) for s in scenes)
    assert any(scene.street.dropped for scene in scenes)
    assert {scene.name for scene in scenes} == set(KINDS)


@pytest.fixture(scope="module")
def small_set():
    return SceneSet(
        sequences={"00": 3, "02": 1},
        frames_per_street=2,
        sensor=Sensor(beams=16, azimuth_step_deg=2.0),
        seed=4,
    )


def test_a_data_set_has_the_layout_of_semantic_kitti(tmp_path, small_set):
    written = write_scenes(tmp_path, small_set)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "sequences/00/velodyne/000000.bin",
        "sequences/00/velodyne/000001.bin",
        "sequences/00/velodyne/000002.bin",
        "sequences/02/velodyne/000000.bin",
    ]
    for path in written:
        cloud = np.fromfile(path, "<f4").reshape(-1, 4)
        folder, stem = path.parents[1], path.stem
        raw = np.fromfile(folder / "labels" / f"{stem}.label", "<u4")
        assert len(cloud) == len(raw) > 300
        assert set((raw & 0xFFFF).tolist()) <= {3, 10, 40, 48, 49, 50, 51, 70, 71, 72, 80}
        assert cloud[:, 3].min() >= 0
        assert cloud[:, 3].max() <= 1
        record = json.loads((folder / "curbs" / f"{stem}.json").read_text())
        assert record["curbs"]
        lines = np.concatenate([np.array(curb["polyline"]) for curb in record["curbs"]])
        curb = cloud[(raw & 0xFFFF) == 3, :3]
        near = curb[np.hypot(curb[:, 0], curb[:, 1]) < 45]
        away = np.linalg.norm(near[:, None, :2] - lines[None, :, :2], axis=-1).min(1)
        assert np.quantile(away, 0.95) < 0.5  # vertices are 0.5 m apart, stones 0.3 m deep


def test_poses_lead_from_frame_to_frame(tmp_path, small_set):
    write_scenes(tmp_path, small_set)
    folder = tmp_path / "sequences" / "00"
    poses = np.loadtxt(folder / "poses.txt").reshape(3, 3, 4)
    np.testing.assert_allclose(poses[0], np.eye(3, 4), atol=1e-12)
    # Camera axes: z is forward. The second frame is 2 m on, the third is another street.
    assert np.linalg.norm(poses[1][:, 3]) == pytest.approx(2.0, abs=0.3)
    assert poses[1][2, 3] > 1.5
    assert np.linalg.norm(poses[2][:, 3]) > 900
    for pose in poses:
        np.testing.assert_allclose(pose[:, :3] @ pose[:, :3].T, np.eye(3), atol=1e-9)
    entries = dict(line.split(":") for line in (folder / "calib.txt").read_text().splitlines())
    assert set(entries) == {"P0", "P1", "P2", "P3", "Tr"}
    assert all(len(values.split()) == 12 for values in entries.values())
    assert len((folder / "times.txt").read_text().split()) == 3
    # The same pole of the same street is at the same place of the map in both frames.
    to_camera = np.vstack([np.array(entries["Tr"].split(), float).reshape(3, 4), [0, 0, 0, 1]])
    maps = []
    for number in (0, 1):
        record = json.loads((folder / "curbs" / f"{number:06d}.json").read_text())
        lines = np.concatenate([np.array(curb["polyline"]) for curb in record["curbs"]])
        pose = np.vstack([poses[number], [0, 0, 0, 1]])
        moved = np.linalg.inv(to_camera) @ pose @ to_camera
        maps.append(lines @ moved[:3, :3].T + moved[:3, 3])
    first = maps[0][np.hypot(maps[0][:, 0], maps[0][:, 1]) < 30]
    gap = np.linalg.norm(first[:, None] - maps[1][None], axis=-1).min(1)
    assert gap.max() < 0.3


def test_the_same_settings_give_the_same_bytes_and_a_longer_set_begins_alike(tmp_path, small_set):
    write_scenes(tmp_path / "a", small_set)
    write_scenes(tmp_path / "b", small_set)
    longer = SceneSet(
        sequences={"00": 4, "02": 1}, frames_per_street=2, sensor=small_set.sensor, seed=4
    )
    write_scenes(tmp_path / "c", longer)
    other = SceneSet(
        sequences={"00": 3, "02": 1}, frames_per_street=2, sensor=small_set.sensor, seed=5
    )
    write_scenes(tmp_path / "d", other)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 4 * 3 + 2 * 3
    for name in files:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        if name.suffix in (".bin", ".label", ".json"):
            assert content == (tmp_path / "c" / name).read_bytes()
            assert content != (tmp_path / "d" / name).read_bytes()


def test_kinds_take_turns():
    scenes = SceneSet()
    assert [scene_of(scenes, "00", k).name for k in range(5)] == [*KINDS, KINDS[0]]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, small_set):
    (tmp_path / "sequences").write_text("in the way")
    with pytest.raises(InputError, match=r"sequences/00: cannot be written"):
        write_scenes(tmp_path, small_set)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sensor(beams=63), "beams"),
        (lambda: Sensor(beams=512, azimuth_step_deg=0.1), "beams .* 1843200 shots"),
        (lambda: Sensor(range_m=1e4), "range_m"),
        (lambda: Sensor(height_m=float("inf")), "height_m"),
        (lambda: Sensor(range_noise_m=5.0), "range_noise_m"),
        (lambda: Sensor(azimuth_step_deg=0.0), "azimuth_step_deg"),
        (lambda: Sensor(dropout=1.0), "dropout"),
        (lambda: Sensor(height_m=-1.0), "height_m"),
        (lambda: Sensor(range_noise_m=float("nan")), "range_noise_m"),
        (lambda: Sensor(field_of_view_deg=0.0), "field_of_view_deg"),
        (lambda: SceneSet(sequences={}), "sequences"),
        (lambda: SceneSet(sequences={"00": 1_000_001}), "sequences"),
        (lambda: SceneSet(seed=-1), "seed"),
        (lambda: SceneSet(curb_height_m=-0.1), "curb_height_m"),
        (lambda: SceneSet(frame_step_m=float("inf")), "frame_step_m"),
        (lambda: SceneSet(frames_per_street=0), "frames_per_street"),
        (lambda: SceneSet(frame_step_m=0.0), "frame_step_m"),
        (lambda: Street(curb_height_m=-0.1), "curb_height_m"),
        (lambda: Street(half_width_m=0.0), "half_width_m"),
        (lambda: Edge(face_m=0.4), "face_m"),
        (lambda: Centreline(radius_m=0.0), "radius_m"),
        (lambda: Centreline(angle_rad=4), "angle_rad"),
    ],
)
def test_impossible_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
