"""Write docs/configuration.md from the dataclasses: every key that tsdkd adds or gives another default.

python scripts/dev/configuration_reference.py > docs/configuration.md
"""

import dataclasses
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

Every key of a YAML file is a flag too: `beta: 0.5`, `--beta 0.5`. Below is what tsdkd adds to
[transformers' TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer), or gives another
default; all others work as they do there (`learning_rate`, `report_to`, `save_steps`, `eval_strategy`, …), but for
[those refused](#refused). The page is generated from the dataclasses.
"""


def main() -> None:
    """Print the page."""
    common = {f.name for f in dataclasses.fields(TokenSelectiveConfig)} - {"beta"}
    parts = [HEAD, "## Models\n", "TRL's `ModelConfig`; LoRA's keys need `use_peft: true`.\n"]
    parts.append(
        table(
            ModelConfig,
            [f.name for f in dataclasses.fields(ModelConfig) if f.name not in UNSUPPORTED_OPTIONS],
            meanings=False,
        )
    )
    parts += ["## Data\n", table(DataArguments, [f.name for f in dataclasses.fields(DataArguments)])]
    parts += ["## Processes\n", "How they are started, by accelerate ([clusters](cluster.md)).\n"]
    parts.append(table(LaunchArguments, [f.name for f in dataclasses.fields(LaunchArguments)]))
    parts += [
        "## All methods\n",
        "`method` names one of those below (none: `tsd-kd`), or [one of your own](guide.md#a-method-of-your-own);\n"
        "`teacher_model_name_or_path` names the teacher.\n",
    ]
    parts.append(table(TokenSelectiveConfig, TokenSelectiveConfig.method_options()))
    parts += ["## Each method\n", "Its own options, and where its defaults differ from those above.\n"]
    for name, trainer in METHODS.items():
        cls = trainer.config_class
        parts.append(f"### `{name}`\n\n{(cls.__doc__ or '').splitlines()[0]} ({cls.paper})\n")
        options = sorted(cls.method_options(), key=lambda option: option in common)
        parts.append(table(cls, options))
        if cls.unsupported_options:
            parts.append("".join(f"- no `{key}`: {why}\n" for key, why in sorted(cls.unsupported_options.items())))
    parts += ["## Comparisons\n", "The file of `tsdkd compare` ([guide](guide.md#comparisons)).\n"]
    parts.append(table(Comparison, [f.name for f in dataclasses.fields(Comparison)]))
    parts += ["## Refused\n", "Options of TRL and transformers that would have no effect, or a wrong one.\n"]
    parts.append(rows(("key", "why"), [(f"`{key}`", why) for key, why in sorted(UNSUPPORTED_OPTIONS.items())]))
    parts += [
        "## Other names\n",
        "Each is accepted as the key that it stands for. A key that was renamed is refused with its new name.\n",
    ]
    parts.append(rows(("key", "the same as"), [(f"`{key}`", f"`{name}`") for key, name in sorted(ALIASES.items())]))
    print("\n".join(parts), end="")


def table(cls: Any, names: Iterable[str], meanings: bool = True) -> str:
    """Keys with their types, defaults, meanings and rules."""
    hints, rules = get_type_hints(cls), get_rules(cls)
    found = []
    for name in names:
        cells = [f"`{name}`", type_of(hints[name]), value(get_default(cls, name))]
        if meanings:
            rule, no_effect = rules[name]
            sentences = [get_help(cls, name)]
            sentences += [f"M{rule[1].removeprefix('m')}."] if rule else []
            sentences += [f"No effect if {no_effect[1]}."] if no_effect else []
            cells.append(" ".join(sentences))
        found.append(cells)
    return rows(("key", "type", "default", "meaning")[: 4 if meanings else 3], found)


def rows(heads: Iterable[str], cells: Iterable[Iterable[str]]) -> str:
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
