"""The token-role table: what the terms of TSD-KD and EOPD act on, and whether those tokens decide the answer."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ..config.coercion import shorten
from ..config.console import PlainConsole
from ..errors import ConfigError, escape_line, first_line
from ..files import write_atomically
from ..grading import Grader
from ..trainer.token_records import decode_in_context
from .decisive import Decisiveness, measure_decisiveness
from .load import SelectionOptions, StepRecord
from .record_pair import PairRecord

FILE_NAME = "token_roles.json"
CONSEQUENTIAL = 10.0
"""A role is consequential if another token changes the answer in at least this percentage of the tries."""
_SHARES = ("tokens", "L_EM", "opener", "trigger", "direct")

RoleFunction = Callable[[list[str], str], Any]
"""Takes the tokens of one completion, decoded, and its prompt. Returns the role of each token, a list of strings."""


@dataclass
class RoleTable:
    """The numbers of a token-role table. Shares and decisiveness are in percent, entropies in nats.

    Attributes:
        num_tokens, num_completions: how many there are.
        roles: role -> `tokens`, `L_EM`, `opener`, `trigger`, `direct` (its share of each; None if a term acts on no
            token), `student_entropy` and `teacher_entropy` (means), and, if decisiveness was measured, `num_tried`,
            `decisive_student` and `decisive_teacher` (None if no token was tried).
        totals: for each share, `mean_decisive`: the mean of `decisive_teacher` over what the term acts on, and
            `on_consequential`: its share on roles of at least `CONSEQUENTIAL`. Roles without a tried token are left
            out. None if decisiveness was not measured.
    """

    num_tokens: int
    num_completions: int
    roles: dict[str, dict[str, float | int | None]]
    totals: dict[str, dict[str, float | None]] | None


def compute_token_roles(record: PairRecord, function: RoleFunction, name: str, grader: Grader) -> RoleTable:
    """Compute the table of two models.

    Args:
        record: the models and the completions. If its rows have no `answer`, decisiveness is not measured.
        function: gives the role of each token.
        name: what messages call the function.
        grader: says whether a completion is right.

    Raises:
        ConfigError: the function or the grader fails.
    """
    token_roles = _assign_all_roles(record, function, name)
    flat = np.array([role for roles in token_roles for role in roles], dtype=object)
    quantities = _compute_quantities(record)
    table: dict[str, dict[str, float | int | None]] = {}
    for role in dict.fromkeys(flat):
        is_role = flat == role
        table[role] = {share: _percent(quantities[share][is_role].sum(), quantities[share].sum()) for share in _SHARES}
        for who in ("student_entropy", "teacher_entropy"):
            table[role][who] = float(quantities[who][is_role].mean())
    totals = None
    if "answer" in record.rows.column_names:
        totals = _add_decisiveness(table, measure_decisiveness(record, token_roles, grader))
    return RoleTable(len(flat), len(token_roles), table, totals)


def _assign_all_roles(record: PairRecord, function: RoleFunction, name: str) -> list[list[str]]:
    """Return the role of each token of each completion. Raises `ConfigError`."""
    decode = record.pair.tokenizer.decode
    texts = {i: decode_in_context(i, decode) for i in set(record.columns["token"].tolist())}
    return [
        _assign_roles(
            function, name, [texts[i] for i in c.completion], decode(c.prompt, skip_special_tokens=True), c.index
        )
        for c in record.completions
    ]


def _assign_roles(function: RoleFunction, name: str, tokens: list[str], prompt: str, row: int) -> list[str]:
    """Call the user's function for the completion of a row. Raises `ConfigError`."""
    where = f"for the completion of row {row}"
    try:
        roles = function(list(tokens), prompt)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)[:300]}"
        raise ConfigError([f"--token_roles: {name} raised {reason}, {where}"]) from error
    if not isinstance(roles, list | tuple) or not all(isinstance(role, str) for role in roles):
        raise ConfigError([f"--token_roles: {name} must return a list of strings, found {shorten(roles)}, {where}"])
    if len(roles) != len(tokens):
        raise ConfigError([f"--token_roles: {name} returned {len(roles)} roles for {len(tokens)} tokens, {where}"])
    return list(roles)


def _compute_quantities(record: PairRecord) -> dict[str, np.ndarray]:
    """What each share is a share of, and the entropies, of each token, `[N]` float64."""
    lengths = [len(c.completion) for c in record.completions]
    columns = {name: values.numpy() for name, values in record.columns.items()}
    columns["sample"] = np.repeat(np.arange(len(lengths)), lengths)
    training = vars(record.training)
    options = SelectionOptions(**{f.name: training[f.name] for f in fields(SelectionOptions) if f.name in training})
    selected = StepRecord(0, columns, [{} for _ in lengths], {}, options)
    entropy, divergence = (columns[name].astype(np.float64) for name in ("student_entropy", "divergence"))
    return {
        "tokens": np.ones_like(entropy),
        "L_EM": entropy * selected.is_high_entropy,
        "opener": selected.is_opener.astype(np.float64),
        "trigger": selected.is_triggered.astype(np.float64),
        "direct": divergence * (selected.gate.astype(np.float64) if training.get("gate", True) else 1.0),
        "student_entropy": entropy,
        "teacher_entropy": columns["teacher_entropy"].astype(np.float64),
    }


def _percent(part: float, total: float) -> float | None:
    return 100 * float(part) / float(total) if total > 0 else None


def _add_decisiveness(
    table: dict[str, dict[str, float | int | None]], decisive_by_role: dict[str, Decisiveness]
) -> dict[str, dict[str, float | None]]:
    """Add the columns to the table's roles. Returns the totals of `RoleTable`."""
    for role, row in table.items():
        measured = decisive_by_role.get(role)
        row["num_tried"] = measured.num_tried if measured else 0
        row["decisive_student"] = measured.student if measured else None
        row["decisive_teacher"] = measured.teacher if measured else None
    totals: dict[str, dict[str, float | None]] = {}
    for share in _SHARES:
        pairs = [(table[role][share] or 0.0, measured.teacher) for role, measured in decisive_by_role.items()]
        whole = sum(part for part, _ in pairs)
        on_consequential = _percent(sum(part for part, decisive in pairs if decisive >= CONSEQUENTIAL), whole)
        mean_decisive = sum(part * decisive for part, decisive in pairs) / whole if whole > 0 else None
        totals[share] = {"mean_decisive": mean_decisive, "on_consequential": on_consequential}
    return totals


def write_token_roles(table: RoleTable, folder: Path) -> None:
    """Print the table, and write its numbers to `token_roles.json` in a folder. Raises `OutputDirError`."""
    write_atomically(folder / FILE_NAME, json.dumps(vars(table), indent=1, allow_nan=False), "--output_dir")
    console = PlainConsole()
    console.print(f"{table.num_tokens:,} tokens of {table.num_completions:,} completions by role; shares in percent")
    console.print(_to_rich(table))
    if table.totals is None:
        console.print("no decisive columns: the data set has no answers (answer_column)")
    console.print(escape_line(f"wrote the numbers to {folder / FILE_NAME}"))


def _to_rich(table: RoleTable) -> Table:
    decisive = () if table.totals is None else ("decisive\nstudent", "\nteacher", "\ntried")
    rich_table = Table("role", box=box.HORIZONTALS, padding=0, show_edge=False)  # 80 columns are enough
    for header in ("tokens", "H(Q)", "H(P)", *_SHARES[1:], *decisive):
        rich_table.add_column(header, justify="right", no_wrap=True)
    for role, row in table.roles.items():
        cells = [_format(row["tokens"]), f"{row['student_entropy']:.2f}", f"{row['teacher_entropy']:.2f}"]
        cells += [_format(row[share]) for share in _SHARES[1:]]
        if decisive:
            cells += [_format(row["decisive_student"]), _format(row["decisive_teacher"]), str(row["num_tried"])]
        rich_table.add_row(escape_line(role), *cells)
    if table.totals is not None:
        rich_table.add_section()
        labels = {"mean_decisive": "mean decisive", "on_consequential": f"on ≥ {CONSEQUENTIAL:.0f} %"}
        for name, label in labels.items():
            first, *others = (_format(table.totals[share][name]) for share in _SHARES)
            rich_table.add_row(label, first, "", "", *others)
    return rich_table


def _format(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.1f}"
