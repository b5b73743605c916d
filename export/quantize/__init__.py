"""Quantized variants of a graph, and how they are chosen."""
