"""Models and tokenizers: loading, pruning, sampling, held-out scores, token alignment and licences."""
