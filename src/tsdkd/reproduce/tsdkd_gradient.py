"""TSD-KD, App. A.2 (Eq. 20 to 23): the effect of the gate on the gradient of forward KL, from formulas and autograd.

The paper uses the feedback to a logit, `p_i - q_i`, which is the negative gradient.
"""

from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from ..config.console import PlainConsole
from ..losses import FORWARD_KL, token_entropy
from ..selection import entropy_gap_gate

_VOCAB_SIZE = 50


@dataclass
class GradientCheck:
    """Feedback to the logit of the correct token, for a weaker student q and a stronger student q'.

    Attributes:
        title: title of the table.
        values: equation -> (value of the paper's formula, value from autograd).
    """

    title: str
    values: dict[str, tuple[float, float]]


def logit_feedback(student: Tensor, teacher: Tensor, token: int, gated: bool) -> float:
    """Return the negative derivative of (gated) forward KL with respect to the token's logit, from autograd."""
    logits = student.clone().requires_grad_()
    loss = FORWARD_KL(logits, teacher)
    if gated:
        loss = loss * entropy_gap_gate(token_entropy(logits), token_entropy(teacher))
    (gradient,) = torch.autograd.grad(loss, logits)
    return -float(gradient[token])


def compare_gradients(title: str, weaker: Tensor, stronger: Tensor, teacher: Tensor) -> GradientCheck:
    """Compute both sides of each equation. Logits are `[V]`, float64. The correct token is the teacher's top token."""
    token = int(teacher.argmax())
    p, q, q2 = (float(x.softmax(-1)[token]) for x in (teacher, weaker, stronger))
    entropies = [float(token_entropy(x)) for x in (teacher, weaker, stronger)]
    h, hq, hq2 = (torch.tensor(x, dtype=torch.float64) for x in entropies)
    gate, gate2 = (float(torch.sigmoid(x - h)) for x in (hq, hq2))
    plain = [logit_feedback(x, teacher, token, gated=False) for x in (weaker, stronger)]
    gated = [logit_feedback(x, teacher, token, gated=True) for x in (weaker, stronger)]
    c = float(((-h).exp() + (-hq2).exp()) / ((-h).exp() + (-hq).exp()))
    return GradientCheck(
        title,
        {
            "Eq. 20, p - q": (p - q, plain[0]),
            "rescaling, (p - q) / (p - q')": ((p - q) / (p - q2), plain[0] / plain[1]),
            "Eq. 21, gate x (p - q)": (gate * (p - q), gated[0]),
            "Eq. 22, gated rescaling": (gate * (p - q) / (gate2 * (p - q2)), gated[0] / gated[1]),
            "Eq. 23, C": (c, (gated[0] / gated[1]) / (plain[0] / plain[1])),
        },
    )


def build_cases() -> list[GradientCheck]:
    """Compare an early student with a later one, and vice versa."""
    make = torch.Generator().manual_seed(0)
    teacher, noise = (torch.randn(_VOCAB_SIZE, generator=make, dtype=torch.float64) for _ in range(2))
    teacher[7] += 6.0
    early, late = 0.2 * teacher + 0.5 * noise, 0.7 * teacher + 0.1 * noise
    return [
        compare_gradients(
            "q is the early student, q' the later one: C > 1, a stronger gradient", early, late, teacher
        ),
        compare_gradients("vice versa: C < 1, a weaker gradient", late, early, teacher),
    ]


def reproduce() -> None:
    """Print both sides of each equation."""
    console = PlainConsole()
    for case in build_cases():
        table = Table(title=case.title)
        table.add_column("")
        for column in ("paper's formula", "autograd"):
            table.add_column(column, justify="right")
        for name, (formula, found) in case.values.items():
            table.add_row(name, f"{formula:.12f}", f"{found:.12f}")
        console.print(table)
