"""The teacher cache: how a teacher's outputs are encoded, stored, read and listed."""
