"""Observing and steering models of other libraries, with nothing of their source changed."""
