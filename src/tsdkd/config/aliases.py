"""Options with two names, and renamed options."""

from collections.abc import Mapping
from typing import Any

from .coercion import shorten

ALIASES = {
    "max_new_tokens": "max_completion_length",  # GKDConfig's name; TRL's other trainers have ours
    "activation_checkpointing": "gradient_checkpointing",  # transformers' name since 5.24; before, only the other
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Accepted alias -> canonical name."""

RENAMED = {
    "clip_epsilon": "epsilon",
    "epochs_per_rollout": "num_iterations",
    "own_share": "on_policy_share",
    "own_share_step": "on_policy_share_step",
    "discount": "gamma",
}
"""Old name, no longer accepted -> current name."""


def resolve_aliases(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Move values given under an alias to the canonical name. Adds contradictions to `problems`."""
    resolved = {name: value for name, value in values.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if alias not in values:
            continue
        if name in values and values[name] != values[alias]:
            problems.append(describe_alias_conflict(alias, values[name], values[alias]))
        resolved.setdefault(name, values[alias])
    return resolved


def describe_alias_conflict(alias: str, value: Any, alias_value: Any) -> str:
    """The message for an option that is given under both names with different values."""
    found = f"{shorten(value)} and {shorten(alias_value)}"
    return f"{ALIASES[alias]}, {alias}: two names of one option, found {found}; remove one"


def rename_deprecated(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration that an earlier version wrote, with the current names."""
    return {{**ALIASES, **RENAMED}.get(name, name): value for name, value in dict(values).items()}
