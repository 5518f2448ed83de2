import numpy as np
import pytest

from heed_lidar.regions import Region, parse_region


def test_regions():
    xyz = np.array([[1.0, 0, 0], [-1, 0, 0], [30, 0, 0], [0, 60, 0], [60, 0, 0]])

    def inside(text):
        return parse_region(text).contains(xyz).tolist()

    assert inside("all") == [True] * 5
    assert inside("forward") == [True, False, True, False, False]
    assert inside("forward:25") == [True, False, False, False, False]
    assert inside("-2:35,-1:1.5") == [True, True, True, False, False]
    for text in ("forward:0", "back", "1:2", "2:1,0:1", "forward:-3"):
        with pytest.raises(ValueError, match="region"):
            parse_region(text)
    assert parse_region("all") == Region()
