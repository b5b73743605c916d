"""Weights in blocks: their formats, their nodes, and the codes that GPTQ or the weights themselves give."""
