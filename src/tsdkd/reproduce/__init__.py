"""The papers' small experiments."""
