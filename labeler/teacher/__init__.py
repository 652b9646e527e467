"""Teachers: networks with their weights, and how they compute class scores for every location of an image."""
