"""Attacks: data."""

ATTACKS = {}
