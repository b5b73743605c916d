"""Models and tokenizers: loading, pruning, sampling, token alignment, licences."""
