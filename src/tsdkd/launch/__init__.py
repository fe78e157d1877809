"""Starts the processes of a run and checks their requirements."""
