"""The roles of the demo's tokens, for `tsdkd analyze --token_roles demo`."""

from .task import CONNECTIVES, DIGITS, EOS, NAMES, OPERATIONS


def assign_roles(tokens: list[str], prompt: str) -> list[str]:
    """Return the role of each token of a completion of the demo's task.

    Args:
        tokens: the decoded tokens.
        prompt: not needed.
    """
    words = [token.strip() for token in tokens]
    return [_assign_role(word, words[i - 1] if i else "") for i, word in enumerate(words)]


def _assign_role(word: str, previous: str) -> str:
    if word in CONNECTIVES:
        return "connective"
    if word in NAMES:
        return "chain choice" if previous in CONNECTIVES else "other chain"
    if word in OPERATIONS or word in ("+", "-"):
        return "operation"
    if word in DIGITS:
        return {"=": "result digit", "answer": "answer digit"}.get(previous, "copied digit")
    return {"=": "=", ".": "step end", ";": "step end", "answer": "answer", EOS: "end"}.get(word, "other")
