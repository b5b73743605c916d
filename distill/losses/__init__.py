"""The loss a student minimises: divergences, hidden states, and the memory-saving head that computes it in chunks."""
