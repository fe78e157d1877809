"""Absurd texts and values, and ways to damage a file: drawn at random, for attacks on what reads them."""

import json
import math
import os
import random
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def any_text(rng: random.Random) -> str:
    """A name or a text that is meant for a terminal, a formula, markup, HTML, a table, or nobody."""
    control = chr(rng.choice([*range(1, 32), *range(127, 160), 0x2028, 0x202E, 0x2066, 0xD800 + rng.randrange(2048)]))
    dangerous = [
        "$",
        "$$",
        r"$\frac{",
        "_",
        "__proto__",
        "[red]",
        "[/]",
        "[link=x]",
        "<script>",
        "<!--",
        "&lt;",
        "|",
        "\\|",
    ]
    dangerous += [
        "\n",
        "\t",
        "\x1b[2J",
        "\x1b]0;x\x07",
        "\x9b1m",
        ":smile:",
        "漢",
        "́" * 30,
        " ",
        "%s",
        "{0}",
        "{{x}}",
        control,
    ]
    words = "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randrange(6)))
    return "".join(rng.choices([*dangerous, words], k=rng.randint(1, 5)))


def any_file_name(rng: random.Random) -> str:
    name = any_text(rng).replace("/", "").replace("\0", "")
    bad = bytes(rng.choices(range(128, 256), k=rng.choice([0, 0, 3])))
    name = os.fsdecode(name.encode("utf-8", "replace") + bad)
    return name if name.strip(".") else "run"


def any_value(rng: random.Random) -> Any:
    """Anything that JSON can hold where something else belongs."""
    numbers = [0, -1, 1, 2**31, 2**40, 2**63, -(2**70), 10**400, 10 ** rng.randrange(1, 4000), rng.uniform(-3, 3)]
    numbers += [1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf, rng.randrange(-(2**33), 2**33), 0.5, -0.0]
    others = [
        None,
        True,
        False,
        "",
        "1",
        "nan",
        any_text(rng),
        "x" * 10_000,
        [],
        {},
        [[]],
        [None],
        {"a": {"b": []}},
        [1] * 1000,
    ]
    return rng.choice(rng.choice([numbers, others]))


def mutate(rng: random.Random, node: Any, level: int = 0) -> Any:
    """One value within, at any depth: replaced, removed, doubled, renamed."""
    if isinstance(node, (dict, list)) and node and (level == 0 or rng.random() < 0.85):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        action = rng.random()
        if action < 0.1:
            del node[key]
        elif action < 0.2 and isinstance(node, dict):
            node[any_text(rng)] = node[key]
        elif action < 0.2:
            node.insert(key, node[key])
        else:
            node[key] = mutate(rng, node[key], level + 1)
        return node
    return any_value(rng)


def damage_json(rng: random.Random, path: Path) -> None:
    content = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 2, 5])):
        content = mutate(rng, content)
    sys.set_int_max_str_digits(0)
    try:
        path.write_text(json.dumps(content))
    finally:
        sys.set_int_max_str_digits(4300)


def damage_bytes(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    action = rng.randrange(6)
    if action == 0:
        content = content[: rng.randrange(len(content))]
    elif action == 1:
        content = content[rng.randrange(len(content)) :]
    elif action == 2:
        content = bytearray(content.decode("latin-1").encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"])))
    else:
        for _ in range(rng.choice([1, 3, 30])):
            place = rng.randrange(len(content))
            content[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            content = content or bytearray(b"\0")
    path.write_bytes(content)


def put_no_file(rng: random.Random, path: Path) -> None:
    """Something that isn't a file, or a file that is no such one."""
    path.unlink()
    depth = rng.randrange(500, 100_000)
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ("[{a: ", "}]")])
    rng.choice(
        [
            lambda: path.mkdir(),
            lambda: os.mkfifo(path),
            lambda: path.symlink_to(
                rng.choice(["/dev/zero", "/dev/full", path.name, "nowhere", "/", "/proc/self/mem"])
            ),
            lambda: path.write_text(opening * depth + "1" + closing * rng.choice([0, depth])),
            lambda: (path.touch(), os.truncate(path, rng.randrange(2**26, 2**36))),
            lambda: path.write_bytes(rng.randbytes(rng.randrange(5000))),
            lambda: path.write_text(rng.choice(["", "null", "[]", "{}", "9" * 9000, '"a"', "\ufeff{}", "a: &a [*a]"])),
        ]
    )()


def damage_record(rng: random.Random, path: Path) -> None:
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[b"tsdkd"])
    if rng.random() < 0.4:
        sys.set_int_max_str_digits(0)
        text = json.dumps(mutate(rng, metadata))
        sys.set_int_max_str_digits(4300)
        pq.write_table(table.replace_schema_metadata({"tsdkd": text}), path)
        return
    name = rng.choice(table.column_names)
    place, column = table.column_names.index(name), table[name].combine_chunks()
    size = getattr(column.type, "list_size", None)
    numbers = (column.flatten() if size else column).to_numpy(zero_copy_only=False)
    numbers = numbers.astype(rng.choice([numbers.dtype, np.int64, np.float64, np.float32]))
    bad = [-1, 0, 5, 2**31 - 1] + ([math.nan, math.inf, -math.inf, 1e30] if numbers.dtype.kind == "f" else [])
    numbers[rng.randrange(len(numbers))] = rng.choice(bad)
    width = rng.choice([size, 1, 2, len(numbers) // len(table)]) if size else 0
    array = pa.array(numbers[: len(table) * width] if size else numbers)
    changed = pa.FixedSizeListArray.from_arrays(array, width) if size else array
    table = rng.choice(
        [
            lambda: table.set_column(place, name, changed),
            lambda: table.set_column(place, name, changed),
            lambda: table.set_column(place, name, pa.nulls(len(table), column.type)),
            lambda: table.set_column(place, name, pa.array([rng.choice(["a", "", None]) for _ in range(len(table))])),
            lambda: table.set_column(place, name, pa.array([[i] * (i % 3) for i in range(len(table))])),
            lambda: table.drop_columns([name]),
            lambda: table.append_column(rng.choice([name, any_text(rng)]), table[name]),
            lambda: table.slice(*sorted(rng.choices(range(len(table)), k=2))),
            lambda: table.take(rng.choices(range(len(table)), k=rng.randrange(20))),
            lambda: pa.concat_tables([table] * rng.choice([2, 1000, 100_000])),
        ]
    )()
    if all(ord(character) < 0xD800 for column in table.column_names for character in column):
        pq.write_table(table, path)


def damage_config(rng: random.Random, path: Path) -> None:
    """One setting, and what YAML has that JSON hasn't."""
    names = ("method", "beta", "seed", "dataset_name", "opener_ratio", "gate_temperature", "entropy_threshold", "x")
    sys.set_int_max_str_digits(0)
    text = path.read_text() + f"{rng.choice(names)}: {json.dumps(any_value(rng))}\n"
    sys.set_int_max_str_digits(4300)
    odd = [
        "? [a]\n: 1\n",
        "1: 2\n",
        "null: 3\n",
        "d: 2020-01-01\n",
        "b: !!binary YQ==\n",
        "s: !!set {a}\n",
        f"n: 0x{'f' * 9000}\n",
    ]
    odd += [
        "p: !!python/object:os.system x\n",
        "t: !!timestamp x\n",
        "beta: 1e999\n",
        "method: [a]\n",
        "z: \0\n",
        "u: \x85\n",
    ]
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    path.write_text(text + rng.choice([*odd, bomb, ""]))
