"""Load YAML files that may be untrusted: plain values of bounded size, or a one-line error."""

from pathlib import Path
from typing import Any

import yaml

from ..files import read_small_file
from .coercion import MAX_DEPTH, is_plain_text

MAX_BYTES = 2**18
"""Limit for a file, before and after its aliases are expanded. The largest shipped file has 5,000."""
_MAX_NUMBER = 100  # characters; Python parses long numbers in quadratic time
_MAX_KEY = 200
_PREFIX = "tag:yaml.org,2002:"


def load_yaml(path: Path) -> Any:
    """Load a YAML file. Mapping keys and dates are returned as strings, exactly as written.

    Raises:
        ValueError: the file is not a regular file of at most `MAX_BYTES`, is not valid YAML, or contains duplicate
            keys, other types, more than `MAX_DEPTH` levels, aliases that expand too far, or a very long number.
    """
    content = read_small_file(path, MAX_BYTES)
    try:
        return yaml.load(content.decode("utf-8"), Loader=_PlainLoader)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())[:300]}") from error


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, which YAML silently accepts, and bounds memory and time."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag.removeprefix(_PREFIX) not in ("timestamp", "value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._measures: dict[int, tuple[int, int]] = {}  # id of a node -> characters and depth, with aliases expanded

    def compose_node(self, parent: Any, index: Any) -> Any:
        line, is_alias = self.peek_event().start_mark.line + 1, self.check_event(yaml.AliasEvent)
        self._level += 1
        _refuse(self._level > MAX_DEPTH, line, f"more than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._level -= 1
        if not is_alias:
            self._measures[id(node)] = self._measure(node)
        _refuse(id(node) not in self._measures, line, "an alias refers to a node that contains it")
        size, depth = self._measures[id(node)]
        _refuse(size > MAX_BYTES, line, f"its aliases expand to more than {MAX_BYTES:,} characters")
        _refuse(self._level + depth > MAX_DEPTH, line, f"more than {MAX_DEPTH} levels")
        return node

    def _measure(self, node: Any) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            _refuse(not is_plain_text(node.value), node.start_mark.line + 1, "a text with \\0 or a lone surrogate")
            return len(node.value) + 1, 0
        children = node.value
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            children = [child for pair in node.value for child in pair]
        measures = [self._measures[id(child)] for child in children]
        return 1 + sum(size for size, _ in measures), 1 + max((depth for _, depth in measures), default=0)


def _refuse(condition: bool, line: int, problem: str) -> None:
    if condition:
        raise yaml.YAMLError(f"{problem}, line {line}")


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        _refuse(not isinstance(key, yaml.ScalarNode), line, "a key must be a string, found a collection")
        _refuse(len(key.value) > _MAX_KEY, line, f"a key of {len(key.value):,} characters")
        _refuse(key.value in seen and key.value != "<<", line, f"duplicate key {key.value!r}")
        seen.add(key.value)


def _construct_mapping(loader: _PlainLoader, node: yaml.MappingNode) -> dict[str, Any]:
    loader.flatten_mapping(node)  # `<<`
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


def _construct_scalar(loader: _PlainLoader, node: yaml.ScalarNode) -> int | float | bool:
    kind, line = node.tag.removeprefix(_PREFIX), node.start_mark.line + 1
    _refuse(len(node.value) > _MAX_NUMBER, line, f"a number of {len(node.value):,} characters")
    try:
        value: int | float | bool = getattr(loader, f"construct_yaml_{kind}")(node)
    except (ValueError, LookupError):  # from an explicit tag
        raise yaml.YAMLError(f"{node.value!r} is not a valid {kind}, line {line}") from None
    _refuse(kind == "int" and abs(value) >= 2**63, line, "a number of more than 64 bits")
    return value


_PlainLoader.yaml_constructors = {
    f"{_PREFIX}{kind}": yaml.SafeLoader.yaml_constructors[f"{_PREFIX}{kind}"] for kind in ("null", "seq", "str")
} | {None: yaml.SafeLoader.construct_undefined}
for _kind in ("bool", "int", "float"):
    _PlainLoader.add_constructor(f"{_PREFIX}{_kind}", _construct_scalar)
_PlainLoader.add_constructor(f"{_PREFIX}map", _construct_mapping)
