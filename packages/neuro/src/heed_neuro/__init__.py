"""Attention models for neuroscience: brain encoders, conditioning, in-context regression."""

__version__ = "0.1.0"
