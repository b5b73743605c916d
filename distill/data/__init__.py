"""Text and conversations, from files to packed blocks of tokens."""
