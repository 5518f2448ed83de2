"""Whole slides: reading, tissue, tiles, features by a frozen encoder, overlays for viewers."""
