"""The teacher's outputs: its distributions, run locally or behind an endpoint, retokenized or not, and its texts."""
