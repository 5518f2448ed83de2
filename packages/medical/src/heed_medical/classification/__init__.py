"""Scores of classifiers: per class, over thresholds, of the probabilities, with intervals."""
