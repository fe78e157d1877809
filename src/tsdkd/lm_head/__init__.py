"""Statistics of tokens, and their gradients, where hidden states become logits."""
