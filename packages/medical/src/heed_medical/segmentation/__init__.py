"""Segmentation of pictures and volumes: data, slices, prediction, metrics, files written back.

The way of a datum: `find_cases` names the files, `read_case` makes arrays of them, `SliceData` cuts
training slices, `predict_volume` runs a network over a whole case, `score_case` compares,
`write_labels` writes.
"""
