"""Checkpoints: folders with config.json, safetensors and a tokenizer, as transformers writes them."""
