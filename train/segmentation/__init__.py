"""Semantic segmentation: a decoder on any backbone, trained with masks and scored by the mean of the classes' IoU."""
