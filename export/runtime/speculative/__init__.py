"""Speculative decoding: several tokens are proposed, and the model checks them in one run."""
