"""Readers of the files in which eye-tracking data sets are shared; see `reading.read_scanpaths`."""
