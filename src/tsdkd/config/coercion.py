"""Values from YAML, flags and keyword arguments as the types that dataclass fields declare.

Not pydantic's `TypeAdapter`, strict or lax: either takes values that are refused here (true as 1, "no" as false), or
refuses flags' strings, and each of these messages would still be a validator of ours.
"""

import difflib
import json
import math
import reprlib
import types
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

_MAX_SHOWN = 200  # characters of a value in a message
MAX_DEPTH = 50  # levels of a mapping or a list
_MAX_NUMBER = 1e38  # what float32 holds
_repr = reprlib.Repr()
_repr.maxlist = _repr.maxdict = 30
_repr.maxstring = _repr.maxlong = _repr.maxother = _MAX_SHOWN


def finite_number(value: Any, low: float = -_MAX_NUMBER, high: float = _MAX_NUMBER) -> float:
    """A number from a file, within `[low, high]`. Raises `ValueError` for anything else, such as NaN, "1" and true."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):
        bounds = "" if (low, high) == (-_MAX_NUMBER, _MAX_NUMBER) else f" from {low:g} to {high:g}"
        raise ValueError(f"must be a finite number{bounds}, found {shorten(value)}")
    return float(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" if a known word is close to `word`, otherwise empty."""
    close = difflib.get_close_matches(word[:100], list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def shorten(value: Any) -> str:
    """A value for a message, shortened: it may be long, deeply nested, or a number with a million digits."""
    try:
        text = _repr.repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} that is too long"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def coerce(value: Any, hint: Any) -> Any:
    """`value` (from YAML, or a string from a flag) as the type that a field declares.

    Raises:
        ValueError: saying what was expected and found.
    """
    type_hints = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(isinstance(o, type) and issubclass(o, Enum) for o in type_hints):
        type_hints = tuple(o for o in type_hints if o is not str)  # the names of the choices are its strings
    optional = types.NoneType in type_hints
    if (
        isinstance(value, str)
        and optional
        and (value == "null" or (value.lower() == "none" and str not in type_hints))
    ):
        value = None  # how a flag says it; `report_to none` means the word
    if value is None:
        if optional:
            return None
        raise ValueError(f"expected {_describe_types(type_hints)}, found nothing")
    errors: list[str] = []
    for type_hint in sorted(type_hints, key=_specificity):
        if type_hint is str and any(errors):
            break  # it was meant to be another type
        try:
            return _coerce_one(value, type_hint)
        except ValueError as error:
            errors.append(str(error))
    chosen = next((e for e in errors if e), None)
    raise ValueError(chosen or f"expected {_describe_types(type_hints)}, found {shorten(value)}")


def _specificity(type_hint: Any) -> int:
    """Strings take anything, so they are tried last."""
    return 1 if type_hint is str else 0


def _coerce_one(value: Any, type_hint: Any) -> Any:
    origin = get_origin(type_hint) or type_hint
    if origin is Literal:
        return _match_choice(value, list(get_args(type_hint)))
    if isinstance(origin, type) and issubclass(origin, Enum):
        # YAML 1.1 reads an unquoted no as false
        return _match_choice("no" if value is False else value, [choice.value for choice in origin])
    if origin is list:
        return [_coerce_element(element, get_args(type_hint)[:1]) for element in _to_list(value)]
    if origin is dict:
        return {key: _coerce_element(element, get_args(type_hint)[1:]) for key, element in _to_dict(value).items()}
    converters = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
    if origin not in converters:
        raise ValueError("")
    return converters[origin](value)


def _coerce_element(value: Any, hints: tuple[Any, ...]) -> Any:
    """Coerce an element of a typed list or mapping; elements of untyped ones are kept."""
    return value if not hints or hints[0] is Any else coerce(value, hints[0])


def _match_choice(value: Any, choices: list[Any]) -> Any:
    if value in choices:
        return value
    names = [str(choice) for choice in choices]
    raise ValueError(f"must be one of {', '.join(names)}, found {shorten(value)}{did_you_mean(str(value), names)}")


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError("")


def _to_int(value: Any) -> int:
    number = int(_to_number(value, int))
    if abs(number) >= 2**63:
        raise ValueError("expected a whole number of at most 64 bits, found a longer one")
    return number


def _to_float(value: Any) -> float:
    return _to_number(value, float)  # also strings: PyYAML reads 5e-6 as one


def _to_number(value: Any, kind: type[int] | type[float]) -> float:
    if isinstance(value, bool) or not isinstance(value, (kind, int, str)):
        raise ValueError("")
    try:
        return kind(value)
    except (ValueError, OverflowError):
        raise ValueError("") from None


def _to_str(value: Any) -> str:
    if isinstance(value, (dict, list, tuple, set, bytes)):
        raise ValueError("")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _to_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not valid JSON ({error.msg}), found {shorten(value)}") from None
        except RecursionError:
            raise ValueError(f"has more than {MAX_DEPTH} levels") from None
    if not isinstance(value, dict):
        raise ValueError("")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("has a key twice")
    return values


def is_plain_text(text: str) -> bool:
    """Whether a text has no NUL and no surrogates, so that files, paths and terminals can hold it."""
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)


def explain_unusual(value: Any, level: int = 1) -> str | None:
    """Why a text, mapping or list of a configuration can't be stored in a file, or None."""
    if isinstance(value, str) and not is_plain_text(value):
        return f"must be valid text without \\0, found {shorten(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"must hold finite numbers, found {value}"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "must hold numbers of at most 64 bits"
    if not isinstance(value, (dict, list)):
        return None
    if level > MAX_DEPTH:
        return f"has more than {MAX_DEPTH} levels"
    elements = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
    return next((problem for element in elements if (problem := explain_unusual(element, level + 1))), None)


def _to_list(value: Any) -> list[Any]:
    if isinstance(value, dict):
        raise ValueError("")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _describe_types(type_hints: Sequence[Any]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "a mapping"}
    texts = [names.get(get_origin(o) or o, "a list" if get_origin(o) is list else "") for o in type_hints]
    return " or ".join(t for t in texts if t) or "another value"
