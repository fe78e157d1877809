"""Starts the processes of a run, and checks what they need."""
