"""Bags of patch features of whole slides: readers of the usual layouts, splits, checks, scores."""
