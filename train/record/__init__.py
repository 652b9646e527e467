"""Files of a run: checkpoints, metrics, curves."""
