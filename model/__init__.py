"""Backbones and their operators. Imports none of the other packages."""
