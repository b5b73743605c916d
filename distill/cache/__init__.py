"""The teacher cache: what a teacher's outputs are stored as, read from and listed by."""
