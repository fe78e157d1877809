"""Attacks: sandbox."""

ATTACKS = {}
