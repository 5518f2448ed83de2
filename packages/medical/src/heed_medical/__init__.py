"""Attention models for medical images: networks, losses, data sets, metrics, file formats."""

__version__ = "0.1.0"
