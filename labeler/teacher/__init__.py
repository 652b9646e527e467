"""Teachers: networks with their weights, and how they compute class scores for every location of an image.

`build_classifier` finds the network of a name, `dense_maps` a way to get a map from it; `create_teacher` does both.
"""
