"""Scanpaths against viewers: every score with the viewers' own agreement and with chance."""
