"""Transformer brain encoders: queries read a frozen network's tokens (arXiv 2505.17329)."""
