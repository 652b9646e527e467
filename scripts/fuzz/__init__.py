"""Random damage to what users may be given: stores, recipes, image lists, checkpoints."""
