"""Cylinder3D (arXiv 2011.10033): segmentation of LiDAR scans in cylindrical voxels."""

from heed_lidar.cylinder3d.network import (
    PRESETS,
    Cylinder3d,
    Cylinder3dConfig,
    CylindricalNetwork,
    VoxelLogits,
)
from heed_lidar.cylinder3d.weights import load_official

__all__ = [
    "PRESETS",
    "Cylinder3d",
    "Cylinder3dConfig",
    "CylindricalNetwork",
    "VoxelLogits",
    "load_official",
]
