"""Recipes: the TOML schema, its checks, and the grid of students it describes."""
