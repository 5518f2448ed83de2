"""Made streets, seen by a made LiDAR: ray-cast scans with true labels and true curbs.

`draw_scene` makes a street at random, `sweep` casts the rays of a `Sensor` through it, and
`write_scenes` writes a data set in the SemanticKITTI layout with the class ids of 3D-Curb.
"""
