"""Reproduces small experiments of the papers."""
