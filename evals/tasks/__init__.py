"""lm-eval tasks: loaded, made from held-out text, checked for contamination."""
