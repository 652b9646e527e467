"""Recipes: typed settings, TOML files and overrides."""
