"""Quantized variants of a float32 graph.

`precisions` is the table of precisions: a new one is one entry there. `settings` chooses the text to quantize with,
`float16` and `weight_only` convert a graph, the latter with the parts in `blocks`. `mixed_precision` searches block
formats and `evaluate` scores one.
"""
