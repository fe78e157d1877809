"""Write docs/configuration.md from the dataclasses: every key that tsdkd adds or gives another default.

python scripts/dev/configuration_reference.py > docs/configuration.md
"""

import dataclasses
import textwrap
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trl import ModelConfig

from tsdkd.compare.config import Comparison
from tsdkd.config.aliases import ALIASES
from tsdkd.config.base import DataArguments, TokenSelectiveConfig
from tsdkd.config.inherited import UNSUPPORTED_OPTIONS
from tsdkd.config.launch import LaunchArguments
from tsdkd.config.options import get_default, get_help
from tsdkd.config.validation import get_rules
from tsdkd.methods import METHODS

HEAD = """# Configuration

Every key of a YAML file is also a flag: `beta: 0.5`, `--beta 0.5`. This page lists the options that tsdkd adds to
[transformers' TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer), or whose default it
changes. All others work as in transformers (`learning_rate`, `report_to`, `save_steps`, `eval_strategy`, …), except
[those that are refused](#refused). The page is generated from the dataclasses.
"""


def main() -> None:
    """Print the page."""
    common = {f.name for f in dataclasses.fields(TokenSelectiveConfig)} - {"beta"}
    parts = [HEAD, "## Models\n", "TRL's `ModelConfig`. The keys of LoRA need `use_peft: true`.\n"]
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in UNSUPPORTED_OPTIONS]
    hints = get_type_hints(ModelConfig)
    cells = [(f"`{name}`", type_of(hints[name]), value(get_default(ModelConfig, name))) for name in names]
    parts.append(table(("key", "type", "default"), cells))
    parts += ["## Data\n", options(DataArguments, [f.name for f in dataclasses.fields(DataArguments)])]
    parts += ["## Processes\n", "How accelerate starts the processes ([clusters](cluster.md)).\n"]
    parts.append(options(LaunchArguments, [f.name for f in dataclasses.fields(LaunchArguments)]))
    parts += [
        "## All methods\n",
        "`method` is one of the methods below (default: `tsd-kd`)\n"
        "or [one of your own](guide.md#a-method-of-your-own).\n",
    ]
    parts.append(options(TokenSelectiveConfig, TokenSelectiveConfig.method_options()))
    parts += ["## Each method\n", "The options of a method, and those above whose default it changes.\n"]
    for name, trainer in METHODS.items():
        cls = trainer.config_class
        parts.append(f"### `{name}`\n\n{(cls.__doc__ or '').splitlines()[0]} ({cls.paper})\n")
        parts.append(options(cls, sorted(cls.method_options(), key=lambda option: option in common)))
        if cls.unsupported_options:
            refused = sorted(cls.unsupported_options.items())
            parts.append("Not available:\n\n" + "".join(item(f"- `{key}`: {why}") for key, why in refused))
    parts += ["## Comparisons\n", "The file of `tsdkd compare` ([guide](guide.md#comparisons)).\n"]
    parts.append(options(Comparison, [f.name for f in dataclasses.fields(Comparison)]))
    parts += ["## Refused\n", "Options of TRL and transformers that would have no effect, or a wrong one.\n"]
    parts.append("".join(item(f"- `{key}`: {why}") for key, why in sorted(UNSUPPORTED_OPTIONS.items())))
    parts += [
        "## Other names\n",
        "These keys are accepted as aliases. A renamed key is refused, with its new name.\n",
    ]
    parts.append(table(("key", "alias of"), [(f"`{key}`", f"`{name}`") for key, name in sorted(ALIASES.items())]))
    print("\n".join(parts), end="")


def options(cls: Any, names: Iterable[str]) -> str:
    """A list of options with their types, defaults, meanings and rules."""
    hints, rules = get_type_hints(cls), get_rules(cls)
    items = []
    for name in names:
        rule, no_effect = rules[name]
        default = value(get_default(cls, name))
        sentences = [get_help(cls, name)]
        sentences += [f"M{rule[1].removeprefix('m')}."] if rule else []
        sentences += [f"No effect if {no_effect[1]}."] if no_effect else []
        about = f"{type_of(hints[name])}{f', default {default}' if default else ''}"
        items.append(item(f"- **`{name}`** ({about}): {' '.join(sentences)}"))
    return "".join(items)


def item(text: str) -> str:
    """An item of a list, wrapped."""
    return textwrap.fill(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) + "\n"


def table(heads: Iterable[str], cells: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(heads), ["---"] * len(list(heads)), *map(list, cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def type_of(hint: Any) -> str:
    """As one would write it in YAML."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_of(part) for part in get_args(hint) if part is not type(None)))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is not None:
        hint = get_origin(hint)
    plain = {str: "text", int: "whole number", float: "number", bool: "true, false", list: "list", dict: "mapping"}
    return plain.get(hint, "text")  # an enumeration of transformers


def value(default: Any) -> str:
    """A default as YAML has it."""
    if default is None or default == "":
        return ""
    return f"`{str(getattr(default, 'value', default)).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    main()
