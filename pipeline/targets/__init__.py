"""Targets from label maps: rows of the store, cropped to the token grid of each view."""
