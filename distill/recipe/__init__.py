"""Recipes: the TOML schema, its checks, and the plan of students."""
