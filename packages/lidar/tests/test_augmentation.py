"""Random changes of a scan: what they keep, how far they go, and what is cut out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heed_lidar.augmentation import Augmentation, Crop, augment, crop

STILL = Augmentation(rotate_deg=0.0, flip=False, scale=0.0, shift_m=0.0)
SEEDS = st.integers(0, 2**32 - 1)


def cloud(seed: int = 0, count: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3)) * [20.0, 20.0, 1.0]


def changed(seed: int, settings: Augmentation, xyz: np.ndarray) -> np.ndarray:
    return augment(xyz, np.random.default_rng(seed), settings)


@given(SEEDS)
def test_nothing_changes_where_every_amount_is_zero(seed):
    np.testing.assert_array_equal(changed(seed, STILL, cloud()), cloud())


@given(SEEDS)
def test_the_same_seed_gives_the_same_scan_and_the_input_stays(seed):
    xyz = cloud()
    first, second = (changed(seed, Augmentation(), xyz) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(xyz, cloud())


@given(SEEDS)
def test_a_change_keeps_shapes_up_to_one_factor(seed):
    xyz = cloud()
    new = changed(seed, Augmentation(shift_m=0.0), xyz)
    factor = np.linalg.norm(new[:, :2], axis=1) / np.linalg.norm(xyz[:, :2], axis=1)
    assert 0.95 <= factor.mean() <= 1.05
    np.testing.assert_allclose(factor, factor.mean())
    np.testing.assert_array_equal(new[:, 2], xyz[:, 2])


@given(SEEDS)
def test_turns_stay_within_the_angle(seed):
    settings = Augmentation(rotate_deg=30.0, flip=False, scale=0.0, shift_m=0.0)
    x, y, _ = changed(seed, settings, np.array([[1.0, 0.0, 0.5]]))[0]
    assert abs(np.degrees(np.arctan2(y, x))) <= 30.0 + 1e-9


def test_every_flip_occurs_equally_often():
    settings = Augmentation(rotate_deg=0.0, scale=0.0, shift_m=0.0)
    rng = np.random.default_rng(3)
    signs = [tuple(augment(np.ones((1, 3)), rng, settings)[0, :2]) for _ in range(400)]
    counts = {pair: signs.count(pair) for pair in set(signs)}
    assert set(counts) == {(1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)}
    assert min(counts.values()) > 70  # 100 each, standard deviation 8.7


@pytest.mark.bad_input  # the generator is one in name only
def test_the_turn_comes_before_the_flip_and_the_shift_last():
    class Fixed:
        def uniform(self, low, high):
            return high

        def integers(self, count):
            return 1  # mirror x

        def normal(self, size):
            return np.arange(1.0, size + 1.0)

    settings = Augmentation(rotate_deg=90.0, scale=0.5, shift_m=0.1)
    found = augment(np.array([[2.0, 1.0, 3.0]]), Fixed(), settings)
    # Turned: (-1, 2); mirrored: (1, 2); scaled by 1.5: (1.5, 3); shifted by (0.1, 0.2, 0.3).
    np.testing.assert_allclose(found, [[1.6, 3.2, 3.3]])


@given(SEEDS)
def test_a_change_that_is_left_out_leaves_the_others(seed):
    xyz = cloud()
    both = changed(seed, Augmentation(), xyz)
    unshifted = changed(seed, Augmentation(shift_m=0.0), xyz)
    shift = both - unshifted
    np.testing.assert_allclose(shift, np.broadcast_to(shift[0], shift.shape), atol=1e-9)


def test_a_forward_crop():
    xyz = np.array([[10.0, 0, 0], [10.0, 9.9, 0], [-10.0, 0, 0], [24.0, 8.0, 0], [1.0, -9.0, 5]])
    kept = crop(xyz, np.random.default_rng(0), Crop(range_m=25.0, sector_deg=90.0))
    assert kept.tolist() == [True, True, False, False, False]


def test_a_sector_may_span_the_seam_behind_the_sensor():
    xyz = np.array([[-10.0, 1.0, 0], [-10.0, -1.0, 0], [10.0, 0.0, 0]])
    rng = np.random.default_rng(0)
    kept = [crop(xyz, rng, Crop(sector_deg=60.0, facing="random")).tolist() for _ in range(20)]
    assert [True, True, False] in kept
    assert [False, False, True] in kept


@given(SEEDS, st.floats(1.0, 360.0))
def test_a_random_crop_of_a_scan_is_never_empty(seed, sector):
    settings = Crop(range_m=60.0, sector_deg=sector, facing="random")
    assert crop(cloud(), np.random.default_rng(seed), settings).any()


def test_an_empty_scan_stays_empty():
    rng = np.random.default_rng(0)
    assert augment(np.zeros((0, 3)), rng, Augmentation()).shape == (0, 3)
    assert crop(np.zeros((0, 3)), rng, Crop(facing="random")).shape == (0,)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Augmentation, {"rotate_deg": 181.0}),
        (Augmentation, {"scale": 1.0}),
        (Augmentation, {"shift_m": -0.1}),
        (Crop, {"range_m": 0.0}),
        (Crop, {"sector_deg": 361.0}),
        (Crop, {"facing": "back"}),
    ],
)
def test_bad_settings_are_named(kind, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        kind(**settings)
