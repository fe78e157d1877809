"""Runs: from a configuration to a trained student."""
