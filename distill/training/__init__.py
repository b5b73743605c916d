"""The training loop: trainer, callbacks, optimizer, budget, on-policy text, several processes."""
