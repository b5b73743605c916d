"""What a student minimises: divergences, hidden states, the loss over chunks of the vocabulary."""
