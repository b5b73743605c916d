"""The teacher's outputs: captured locally or through an endpoint, generated, retokenized."""
