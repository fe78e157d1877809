"""Values from YAML, flags and keyword arguments as the types that dataclass fields declare.

Not pydantic's `TypeAdapter`, strict or lax: either takes values that are refused here (true as 1, "no" as false), or
refuses flags' strings, and each of these messages would still be a validator of ours.
"""

import difflib
import json
import reprlib
import types
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

_MAX_NUMBER = 1e38  # what float32 holds
_bounded = reprlib.Repr()
_bounded.maxlevel, _bounded.maxlist, _bounded.maxstring = 3, 10, 60


def finite_number(value: Any, low: float = -_MAX_NUMBER, high: float = _MAX_NUMBER) -> float:
    """A number from a file, within `[low, high]`. Raises `ValueError` for anything else, such as NaN, "1" and true."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):
        bounds = "" if (low, high) == (-_MAX_NUMBER, _MAX_NUMBER) else f" from {low:g} to {high:g}"
        raise ValueError(f"must be a finite number{bounds}, found {bounded_repr(value)}")
    return float(value)


def bounded_repr(value: Any) -> str:
    """`repr` of any value from a file, in bounded time and length."""
    try:
        return _bounded.repr(value)
    except ValueError:  # an int of more digits than Python writes
        return "a number of too many digits"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" where something known is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


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
    errors = []
    for type_hint in sorted(type_hints, key=_specificity):
        try:
            return _coerce_one(value, type_hint)
        except ValueError as error:
            errors.append(str(error))
    chosen = next((e for e in errors if e), None)
    raise ValueError(chosen or f"expected {_describe_types(type_hints)}, found {value!r}")


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
    """An element of a list or mapping whose type says what it holds; others are taken as they are."""
    return value if not hints or hints[0] is Any else coerce(value, hints[0])


def _match_choice(value: Any, choices: list[Any]) -> Any:
    if value in choices:
        return value
    names = [str(choice) for choice in choices]
    raise ValueError(f"must be one of {', '.join(names)}, found {value!r}{did_you_mean(str(value), names)}")


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError("")


def _to_int(value: Any) -> int:
    return int(_to_number(value, int))


def _to_float(value: Any) -> float:
    return _to_number(value, float)  # also strings: PyYAML reads 5e-6 as one


def _to_number(value: Any, kind: type[int] | type[float]) -> float:
    if isinstance(value, bool) or not isinstance(value, (kind, int, str)):
        raise ValueError("")
    try:
        return kind(value)
    except ValueError:
        raise ValueError("") from None


def _to_str(value: Any) -> str:
    if isinstance(value, (dict, list, tuple, set, bytes)):
        raise ValueError("")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _to_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not valid JSON ({error.msg}), found {value!r}") from None
    if not isinstance(value, dict):
        raise ValueError("")
    return value


def _to_list(value: Any) -> list[Any]:
    if isinstance(value, dict):
        raise ValueError("")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _describe_types(type_hints: Sequence[Any]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "a mapping"}
    texts = [names.get(get_origin(o) or o, "a list" if get_origin(o) is list else "") for o in type_hints]
    return " or ".join(t for t in texts if t) or "another value"
