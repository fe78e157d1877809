"""Computes token statistics and their gradients in the output layer, from hidden states."""
