"""Cost: measured speed and memory, FLOPs, prices, payback."""
