"""How a method's options are declared, beside its objective: default, help, and the values that make sense."""

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

Check = tuple[Callable[[Any], bool], str]
"""What a value must fulfil, and how to say so."""

Pointless = tuple[Callable[[Mapping[str, Any]], bool], str]
"""When an option has no effect, of all values of a configuration, and how to say so."""

POSITIVE: Check = (lambda v: v > 0, "must be greater than 0")
AT_LEAST_ONE: Check = (lambda v: v >= 1, "must be at least 1")
NON_NEGATIVE: Check = (lambda v: v >= 0, "must be at least 0")
FRACTION: Check = (lambda v: 0 <= v <= 1, "must be in [0, 1]")
POSITIVE_FRACTION: Check = (lambda v: 0 < v <= 1, "must be in (0, 1]")
OPEN_FRACTION: Check = (lambda v: 0 < v < 1, "must be in (0, 1)")


def option(
    default: Any,
    help: str,
    rule: Check | None = None,
    no_effect: Pointless | None = None,
) -> Any:
    """A dataclass field.

    Args:
        default: the paper's value, where it gives one; a class makes a new one each time.
        help: one line for `--help_keys` and docs/configuration.md.
        valid: what its values must fulfil.
        pointless: when the option has no effect.
    """
    metadata = {"help": help, "valid": rule, "pointless": no_effect}
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


def enum_value(value: Any) -> Any:
    """An enumeration's member as its value, anything else as it is."""
    return getattr(value, "value", value)
