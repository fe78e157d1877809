"""The roles of the demo's tokens, for `tsdkd analyze --token_roles demo`."""

from collections.abc import Container

from .task import CELLS, EOS, MOVES

_ROLES: tuple[tuple[str, Container[str]], ...] = (
    ("first move", MOVES),
    ("cell 1", CELLS),
    ("last move", MOVES),
    ("cell 2", CELLS),
    ("end", (EOS,)),
)


def assign_roles(tokens: list[str], prompt: str) -> list[str]:
    """Return the role of each token of a completion of the demo's task: by its position, if it is of the right form.

    Args:
        tokens: the decoded tokens.
        prompt: not needed.
    """
    return [_assign_role(position, token.strip()) for position, token in enumerate(tokens)]


def _assign_role(position: int, word: str) -> str:
    role, expected = _ROLES[position] if position < len(_ROLES) else ("other", ())
    return role if word in expected else "other"
