"""Loss, training loop, evaluation and checkpoints. Imports `pipeline` and `model`."""
