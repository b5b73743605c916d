"""A bundle: an artifact with all that serves it."""
