"""Radiology reports: their files, their words, and the scores of generated ones."""
