"""Limbeck: distil a large language model into a small one that keeps its quality. Rooms are `limbeck.<room>`."""
