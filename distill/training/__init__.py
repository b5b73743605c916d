"""The training loop: trainer, callbacks, optimizer, budget, several processes."""
