"""GGUF files of llama.cpp: their metadata, and the config and tokenizer that it describes."""
