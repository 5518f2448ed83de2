"""Attention models for gaze: scanpaths over objects, visual search with an eccentric retina."""

__version__ = "0.1.0"
