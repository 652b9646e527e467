"""Teachers: networks and their weights, and how they give a class score for every place of an image."""
