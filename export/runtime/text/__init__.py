"""Text and tokens: chat templates, special tokens, the bytes of tokens, incremental detokenization."""
