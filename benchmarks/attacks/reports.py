"""Attacks: reports."""

ATTACKS = {}
