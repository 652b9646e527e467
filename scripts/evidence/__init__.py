"""Evidence: what token labels bring, in tables. `tables` lists what is trained, the rest trains it and writes it down.

A further table is a further entry in `tables.TABLES`: rows, arms, and the settings of the recipe that tell them apart.
"""
