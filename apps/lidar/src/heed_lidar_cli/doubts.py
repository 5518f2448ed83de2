"""Tell the user of scans that lose points, or lie elsewhere than where curbs are looked for."""

from __future__ import annotations

import logging

import numpy as np
from jaxtyping import Bool

from heed_lidar.checking import frame_doubts
from heed_lidar.scans import Scan
from heed_lidar_cli.settings import StreetData

logger = logging.getLogger(__name__)


class Doubts:
    """Says each kind of doubt once, of the first scan that has it: thousands may be alike.

    Args:
        data: How the scans were read.
        road: As `frame_doubts`.
    """

    def __init__(self, data: StreetData, *, road: bool) -> None:
        self._data, self._road = data, road
        self._told: set[str] = set()

    def tell(self, scan: Scan, seen: Bool[np.ndarray, " n"]) -> None:
        """Warn of a scan.

        Args:
            scan: What shall be predicted.
            seen: Its points that lie where the system looks.
        """
        for kind, line in frame_doubts(scan, self._data, seen, road=self._road).items():
            if kind not in self._told:
                self._told.add(kind)
                logger.warning("%s: %s (said once)", scan.name, line)


def tell_lost(scan: Scan) -> bool:
    """Warn of rows of a scan's file that are left out because they say no place.

    Returns:
        Whether there are any.
    """
    lost, rows = scan.cloud.not_finite, scan.cloud.rows_in_file
    if lost:
        logger.warning(
            "%s: %d of its %d rows (%.3g %%) have an x, y or z that is NaN or infinite, or beyond "
            "10^9 m; they are left out (said once)",
            *(scan.name, lost, rows, 100 * lost / rows),
        )
    return lost > 0
