"""Policies: their schema, file, stored form, description and plugins."""
