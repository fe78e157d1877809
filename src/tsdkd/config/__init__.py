"""Configuration: the options, and the rules that their values must fulfil."""
