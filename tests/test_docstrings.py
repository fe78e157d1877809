"""What a docstring's sections `Args:` and `Attributes:` name is there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src/tsdkd"
ENTRY = re.compile(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*): ", re.MULTILINE)


def documented(text: str) -> Iterator[str]:
    for section in re.findall(r"(?:Args|Attributes):\n((?:    .*\n?|\n)+)", text):
        for entry in ENTRY.findall(section):
            yield from (name.strip("* ") for name in entry.split(","))


def parameters(function: ast.FunctionDef) -> set[str]:
    arguments = function.args
    variadic = {a.arg for a in (arguments.vararg, arguments.kwarg) if a}
    return {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)} | variadic


def members(owner: ast.ClassDef) -> set[str]:
    names = set()
    for node in owner.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
            if node.name in ("__init__", "__new__"):
                stored = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
                names |= parameters(node) | {n.attr for n in stored}
    return names


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_what_a_docstring_names_exists(path: Path) -> None:
    wrong = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            known = parameters(node) if isinstance(node, ast.FunctionDef) else members(node)
            wrong += [
                f"{node.name}: {name}" for name in documented(ast.get_docstring(node) or "") if name not in known
            ]
    assert wrong == []
