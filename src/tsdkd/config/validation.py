"""Validates the values of a configuration, and reports all problems at once.

The rules are where the options are declared, those of TRL's and transformers' options in `tsdkd.config.inherited`.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .aliases import ALIASES
from .coercion import shorten
from .inherited import CONFLICTS, INHERITED_RULES, UNSUPPORTED_OPTIONS
from .options import Rules, declared_rules, get_default, is_option


def declared_fields(cls: type) -> list[str]:
    """The fields that are declared with `option`, without aliases, those of subclasses first."""
    annotated = dict.fromkeys(name for base in cls.__mro__ for name in inspect.get_annotations(base))
    names = {f.name for f in fields(cls) if is_option(cls, f.name)} - ALIASES.keys()
    return [name for name in annotated if name in names]


def get_rules(cls: type) -> dict[str, Rules]:
    """The rules of a configuration's options, by name."""
    rules = {}
    for f in fields(cls):
        declared, inherited = declared_rules(cls, f.name), INHERITED_RULES.get(f.name, Rules())
        rules[f.name] = Rules(*(a or b for a, b in zip(declared, inherited, strict=True)))
    return rules


def validate_options(cls: Any, values: Mapping[str, Any]) -> list[str]:
    """All problems of a configuration's values, whose types are correct: range, support, contradictions."""
    rules = get_rules(cls)
    problems = [
        f"{name}: {text}, found {shorten(values[name])}"
        for name in sorted(rules.keys() & values.keys())
        if (text := _explain_value(rules[name], values[name]))
    ]
    unsupported_options = getattr(cls, "unsupported_options", {})
    for name in sorted(rules.keys() & values.keys()):
        no_effect = rules[name].no_effect
        if values[name] == get_default(cls, name):
            continue
        if name in UNSUPPORTED_OPTIONS:
            problems.append(f"{name}: not supported here ({UNSUPPORTED_OPTIONS[name]})")
        if name in unsupported_options:
            problems.append(f"{name}: not an option of {cls.method}: {unsupported_options[name]}; remove it")
        elif no_effect and no_effect[0](values):
            remedy = "" if ";" in no_effect[1] else "; remove it"
            problems.append(f"{name}: {shorten(values[name])} has no effect because {no_effect[1]}{remedy}")
    if getattr(cls, "teacher_samples", False) and values.get("teacher_placement") == "server":
        problems.append(f"teacher_placement: must be replica, because {cls.method} samples with the teacher")
    for names, is_violated, text in (*CONFLICTS, *getattr(cls, "conflicts", ())):
        has_all = rules.keys() >= set(names) and unsupported_options.keys().isdisjoint(names)
        if has_all and is_violated(values):
            problems.append(f"{', '.join(names)}: {text}")
    return problems


def _explain_value(rules: Rules, value: Any) -> str | None:
    """Explain why a single value is invalid, or return None."""
    if value is not None and rules.value and not rules.value[0](value):
        return rules.value[1]
    return "must be finite" if isinstance(value, float) and not math.isfinite(value) else None
