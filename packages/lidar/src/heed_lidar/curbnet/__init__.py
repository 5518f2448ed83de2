"""CurbNet (arXiv 2403.16794): curbs, road and sidewalk in single LiDAR scans."""

from heed_lidar.curbnet.network import PRESETS, CurbNet, CurbNetConfig

__all__ = ["PRESETS", "CurbNet", "CurbNetConfig"]
