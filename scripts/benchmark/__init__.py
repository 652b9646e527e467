"""How fast each part is, against what one would use instead: `python -m scripts.benchmark`."""
