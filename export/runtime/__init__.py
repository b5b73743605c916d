"""The torch-free runtime: sessions, caches, batches, sampling, text."""
