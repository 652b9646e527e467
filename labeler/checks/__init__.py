"""Checks of a finished store: whether it is undamaged, fits its images, and says what its teacher says."""
