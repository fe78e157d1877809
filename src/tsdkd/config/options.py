"""Declares options: default, help, and the rules for their values."""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from typing import Any, NamedTuple

ValueRule = tuple[Callable[[Any], bool], str]
"""A condition on a value, and its text in messages ("must be at least 1")."""

NoEffectRule = tuple[Callable[[Mapping[str, Any]], bool], str]
"""A condition on all values under which an option has no effect, and its text in messages ("gate is false")."""

ConflictRule = tuple[tuple[str, ...], Callable[[Mapping[str, Any]], bool], str]
"""Options, a condition on all values under which they contradict each other, and its text in messages."""

POSITIVE: ValueRule = (lambda v: v > 0, "must be greater than 0")
AT_LEAST_ONE: ValueRule = (lambda v: v >= 1, "must be at least 1")
NON_NEGATIVE: ValueRule = (lambda v: v >= 0, "must be at least 0")
FRACTION: ValueRule = (lambda v: 0 <= v <= 1, "must be in [0, 1]")
POSITIVE_FRACTION: ValueRule = (lambda v: 0 < v <= 1, "must be in (0, 1]")
OPEN_FRACTION: ValueRule = (lambda v: 0 < v < 1, "must be in (0, 1)")
BELOW_ONE: ValueRule = (lambda v: 0 <= v < 1, "must be in [0, 1)")
SEQUENCE_LENGTH: ValueRule = (lambda v: v >= 2, "must be at least 2 (a prompt and a completion token)")
PORT: ValueRule = (lambda v: 0 < v < 2**16, "must be a port, 1 to 65535")
SERVER_URLS: ValueRule = (
    lambda v: bool(v) and all(re.match(r"https?://[^/\s]+", url) for url in v),
    "must be a URL such as http://127.0.0.1:8001, or a list of URLs",
)
IMPORT_PATH: ValueRule = (
    lambda v: re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", v) is not None and ".py:" not in v,
    "must be package.module:name, without a folder and without .py",
)
_RESERVED_TEMPLATE_KWARGS = (
    *("add_generation_prompt", "continue_final_message", "padding", "return_assistant_tokens_mask", "return_dict"),
    *("return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "truncation"),
)
TEMPLATE_KWARGS: ValueRule = (
    lambda v: v.keys().isdisjoint(_RESERVED_TEMPLATE_KWARGS),
    f"must not contain {', '.join(_RESERVED_TEMPLATE_KWARGS)}: tsdkd sets them",
)


class Rules(NamedTuple):
    """The rules of an option; None if there is nothing to check."""

    value: ValueRule | None = None
    no_effect: NoEffectRule | None = None


def option(
    default: Any, help: str | None = None, rule: ValueRule | None = None, no_effect: NoEffectRule | None = None
) -> Any:
    """Declare an option as a dataclass field.

    A class that gives an inherited option another default names the default only: help and rules are inherited from
    the overridden declaration (`get_help`, `declared_rules`).

    Args:
        default: the paper's value, if it gives one. A callable is used as `default_factory`.
        help: the option's only description: one or two short sentences, for `--help_keys` and docs/configuration.md.
        rule: the rule that its values must fulfil.
        no_effect: when the option has no effect.
    """
    metadata = {"help": help, "rules": Rules(rule, no_effect)}
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


def get_default(cls: type, name: str) -> Any:
    """The default of a dataclass field, or None."""
    for f in fields(cls):
        if f.name == name:
            return (
                f.default if f.default is not MISSING else f.default_factory() if callable(f.default_factory) else None
            )
    raise KeyError(name)


def get_help(cls: type, name: str) -> str:
    """The help of an option, from the nearest declaration that has one."""
    return next((text for metadata in _declarations(cls, name) if (text := metadata.get("help"))), "")


def is_option(cls: type, name: str) -> bool:
    """Whether a class or one of its bases declares the field with `option`."""
    return any("rules" in metadata for metadata in _declarations(cls, name))


def declared_rules(cls: type, name: str) -> Rules:
    """The rules of an option, each from the nearest declaration that has one."""
    found = [metadata["rules"] for metadata in _declarations(cls, name) if "rules" in metadata]
    return Rules(*(next((rule for rule in rules if rule), None) for rules in zip(*found, strict=True)))


def _declarations(cls: type, name: str) -> list[Mapping[str, Any]]:
    """The metadata of a field in a class and its bases, the nearest first."""
    known = [vars(base).get("__dataclass_fields__", {}).get(name) for base in cls.__mro__]
    return [f.metadata for f in known if f is not None]


def enum_value(value: Any) -> Any:
    """The value of an enumeration member; anything else unchanged."""
    return getattr(value, "value", value)
