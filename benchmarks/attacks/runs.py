"""Attacks: runs."""

ATTACKS = {}
