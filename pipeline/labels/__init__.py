"""Label maps to targets: rows of the store, cropped to the token grid of each view."""
