"""Attention models for LiDAR: curb detection from raw scans to polylines."""

__version__ = "0.1.0"
