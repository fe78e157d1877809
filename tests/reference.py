"""The papers' equations as plain float64 loops: what the library is measured against.

Nothing here is vectorised and nothing here imports torch, so that no mistake can be shared with the code under test.
Distributions are lists of logits, responses are lists of such rows (`[L][V]`), batches are lists of responses. Tensors
become them with `tensor.double().tolist()`: the reference then sees exactly the numbers that the library saw, whatever
their dtype was.

TSD-KD is the ICLR 2026 paper, EOPD is arXiv 2603.07079. P is the teacher, Q the student, all logarithms are natural.

Gradients come from `central_difference`. Quantities behind a stop-gradient (gate, opener, positions of L_EM, shaped
advantage) must not move with the probe: the two objectives take them from `constant_logits` where it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

Vector = Sequence[float]
Matrix = Sequence[Vector]


# Distributions -------------------------------------------------------------------------------------------------------


def logsumexp(values: Vector) -> float:
    peak = max(values)
    return peak + math.log(math.fsum(math.exp(value - peak) for value in values))


def log_softmax(logits: Vector) -> list[float]:
    # The peak goes first: with logits around 1e4, `logit - (peak + log(sum))` would lose the digits of log(sum).
    peak = max(logits)
    log_total = math.log(math.fsum(math.exp(logit - peak) for logit in logits))
    return [(logit - peak) - log_total for logit in logits]


def kl_divergence(log_p: Vector, log_q: Vector) -> float:
    """KL(p || q) from log-probabilities; 0 log 0 = 0."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True) if math.exp(a) > 0.0)


def token_entropy(logits: Vector) -> float:
    """H_t(p), TSD-KD Eq. 10, in nats."""
    return -math.fsum(math.exp(logp) * logp for logp in log_softmax(logits) if math.exp(logp) > 0.0)


# TSD-KD, one position ------------------------------------------------------------------------------------------------


def generalized_jsd(student: Vector, teacher: Vector, beta: float) -> float:
    """JSD(beta), TSD-KD Eq. 1: beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q.

    Both ends of Eq. 1 are identically zero, so they stand for the limits of its gradient: KL(P || Q) at 0, KL(Q || P)
    at 1.
    """
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    if beta == 0.0:
        return kl_divergence(log_p, log_q)
    if beta == 1.0:
        return kl_divergence(log_q, log_p)
    log_m = log_mixture(log_p, log_q, beta)
    return beta * kl_divergence(log_p, log_m) + (1.0 - beta) * kl_divergence(log_q, log_m)


def skew_forward_kl(student: Vector, teacher: Vector, skew: float = 0.1) -> float:
    """DistiLLM's SKL: KL(P || skew P + (1 - skew) Q)."""
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    return kl_divergence(log_p, log_mixture(log_p, log_q, skew))


def skew_reverse_kl(student: Vector, teacher: Vector, skew: float = 0.1) -> float:
    """DistiLLM's SRKL: KL(Q || (1 - skew) P + skew Q)."""
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    return kl_divergence(log_q, log_mixture(log_p, log_q, 1.0 - skew))


def log_mixture(log_p: Vector, log_q: Vector, share: float) -> list[float]:
    """log(share p + (1 - share) q)."""
    return [logsumexp([math.log(share) + a, math.log(1.0 - share) + b]) for a, b in zip(log_p, log_q, strict=True)]


def entropy_gap_gate(student_entropy: float, teacher_entropy: float, temperature: float = 1.0) -> float:
    """w_t, the gate in TSD-KD Eq. 11."""
    return sigmoid((student_entropy - teacher_entropy) / temperature)


def sigmoid(value: float) -> float:
    if value >= 0.0:
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) / (1.0 + math.exp(value))


def teacher_ranking(student: Vector, teacher: Vector, top_k: int) -> list[int]:
    """The student's top-k ids in the teacher's order, best first (section 3.1); ties keep the student's order."""
    candidates = sorted(range(len(student)), key=lambda v: -student[v])[:top_k]
    return sorted(candidates, key=lambda v: -teacher[v])  # sorted() is stable: that is the rule for ties


def plackett_luce_nll(student: Vector, teacher: Vector, top_k: int = 10) -> float:
    """-log P_PL, TSD-KD Eq. 4: at step j the j-th choice competes with the items that are not placed yet."""
    scores = [student[v] for v in teacher_ranking(student, teacher, top_k)]
    return math.fsum(logsumexp(scores[j:]) - scores[j] for j in range(len(scores)))


# TSD-KD, one response ------------------------------------------------------------------------------------------------


def exactly(ratio: float) -> Fraction:
    """The number that was written down: 0.1 means one tenth, not the nearest double (0.28 * 25 > 7)."""
    return Fraction(repr(float(ratio)))


def opener_length(entropies: Vector, ratio: float = 0.1) -> int:
    """m, section 3.1: the smallest m with sum_{t<=m} H_t >= ratio * sum_{t<=L} H_t; at least 1 if there are tokens.

    Rational arithmetic, because equality is not rare here: equal entropies meet it at every tenth token.
    """
    bound = exactly(ratio) * sum(Fraction(entropy) for entropy in entropies)
    reached = Fraction(0)
    for m, entropy in enumerate(entropies, start=1):
        reached += Fraction(entropy)
        if reached >= bound:
            return m
    return len(entropies)


def top_entropy_positions(entropies: Vector, ratio: float = 0.1) -> list[int]:
    """I of TSD-KD Eq. 12: the ceil(ratio * L) positions of largest entropy, the earlier of two equal ones first."""
    count = min(len(entropies), max(1, math.ceil(exactly(ratio) * len(entropies))))
    return sorted(sorted(range(len(entropies)), key=lambda t: -entropies[t])[:count])


def difficulty(student_entropies: Vector, teacher_entropies: Vector) -> float:
    """C of a response, A.7: the sigmoid of the gap between the mean entropies."""
    return sigmoid(mean(student_entropies) - mean(teacher_entropies))


def adaptive_opener_ratio(moving_average: float) -> float:
    """c, A.7, from the moving average of C over the last 5 responses."""
    for bound, ratio in ((0.25, 0.05), (0.50, 0.10), (0.75, 0.15)):
        if moving_average < bound:
            return ratio
    return 0.20


def mean(values: Vector) -> float:
    return math.fsum(values) / len(values)


# TSD-KD, the objective -----------------------------------------------------------------------------------------------


def tsd_kd_loss(
    student_logits: Sequence[Matrix],
    teacher_logits: Sequence[Matrix],
    lengths: Sequence[int] | None = None,
    *,
    alpha: float = 0.1,
    beta: float = 0.9,
    top_k: int = 10,
    opener_ratio: float | Vector = 0.1,
    gate: bool = True,
    gate_temperature: float = 1.0,
    entropy_weight: float = 1.0,
    entropy_ratio: float = 0.1,
    indirect_reduction: str = "mean",
    constant_logits: Sequence[Matrix] | None = None,
) -> dict[str, float]:
    """TSD-KD Eq. 13 over a batch of responses, each term averaged over the responses that have tokens.

    `lengths` cuts padded responses; an `opener_ratio` for each response is what adaptive c yields. Returns the three
    unweighted terms `indirect` (Eq. 5), `direct` (Eq. 11), `entropy` (Eq. 12), and the weighted sum `loss` (Eq. 13).
    """
    terms: list[tuple[float, float, float]] = []
    for i, (student, teacher) in enumerate(zip(student_logits, teacher_logits, strict=True)):
        length = len(student) if lengths is None else lengths[i]
        if length == 0:
            continue
        student, teacher = student[:length], teacher[:length]
        constant = (student if constant_logits is None else constant_logits[i])[:length]
        ratio = opener_ratio if isinstance(opener_ratio, int | float) else opener_ratio[i]
        terms.append(
            (
                indirect_term(student, teacher, constant, top_k, ratio, indirect_reduction),
                direct_term(student, teacher, constant, beta, gate, gate_temperature),
                entropy_term(student, constant, entropy_ratio),
            )
        )
    indirect, direct, entropy = (mean(values) for values in zip(*terms, strict=True)) if terms else (0.0, 0.0, 0.0)
    loss = alpha * indirect + direct + entropy_weight * entropy
    return {"indirect": indirect, "direct": direct, "entropy": entropy, "loss": loss}


def indirect_term(
    student: Matrix, teacher: Matrix, constant: Matrix, top_k: int, ratio: float, reduction: str
) -> float:
    """L_Indirect, TSD-KD Eq. 5; `reduction` "sum" is the equation, "mean" the scale that alpha = 0.1 belongs to."""
    opener = opener_length([token_entropy(row) for row in constant], ratio)
    total = math.fsum(plackett_luce_nll(student[t], teacher[t], top_k) for t in range(opener))
    return total / {"sum": 1, "mean": opener, "length": len(student)}[reduction]


def direct_term(
    student: Matrix, teacher: Matrix, constant: Matrix, beta: float, gate: bool, temperature: float
) -> float:
    """L_Direct, TSD-KD Eq. 11; without the gate it is GKD's Eq. 2."""
    values: list[float] = []
    for row, teacher_row, constant_row in zip(student, teacher, constant, strict=True):
        weight = (
            entropy_gap_gate(token_entropy(constant_row), token_entropy(teacher_row), temperature) if gate else 1.0
        )
        values.append(weight * generalized_jsd(row, teacher_row, beta))
    return mean(values)


def entropy_term(student: Matrix, constant: Matrix, ratio: float) -> float:
    """L_EM, TSD-KD Eq. 12."""
    positions = top_entropy_positions([token_entropy(row) for row in constant], ratio)
    return mean([token_entropy(student[t]) for t in positions])


# EOPD ----------------------------------------------------------------------------------------------------------------


def clipped_reverse_kl(logp: float, old_logp: float, teacher_logp: float, clip_epsilon: float = 0.2) -> float:
    """L_OPD, EOPD Eq. 8, with the advantage log P(y_t) - log Q_old(y_t)."""
    return clipped_surrogate(math.exp(logp - old_logp), teacher_logp - old_logp, clip_epsilon)


def clipped_surrogate(ratio: float, advantage: float, clip_epsilon: float) -> float:
    """PPO's pessimistic bound as a loss, hence the maximum."""
    clipped = min(max(ratio, 1.0 - clip_epsilon), 1.0 + clip_epsilon)
    return max(-ratio * advantage, -clipped * advantage)


def topk_forward_kl(student: Vector, teacher: Vector, top_k: int = 16) -> float:
    """L_FKL, EOPD Eq. 10: the teacher renormalised on its top-k ids, the student's full softmax left as it is."""
    ids = sorted(range(len(teacher)), key=lambda v: -teacher[v])[:top_k]
    log_p = log_softmax([teacher[v] for v in ids])
    log_q = log_softmax(student)
    return kl_divergence(log_p, [log_q[v] for v in ids])


def shaped_advantage(advantage: float, student_entropy: float, alpha: float, kappa: float = 2.0) -> float:
    """A_t + psi(H_t), EOPD Eq. 11 (appendix): a bonus for uncertain tokens that can't turn the sign of A_t."""
    return advantage + min(alpha * student_entropy, abs(advantage) / kappa)


def eopd_loss(
    student_logits: Sequence[Matrix],
    teacher_logits: Sequence[Matrix],
    tokens: Sequence[Sequence[int]],
    old_logps: Sequence[Vector],
    lengths: Sequence[int] | None = None,
    *,
    clip_epsilon: float = 0.2,
    entropy_threshold: float = 0.8,
    top_k: int = 16,
    placement: str | Sequence[Sequence[bool]] = "entropy",
    entropy_bonus: float = 0.0,
    advantage_shaping: float = 0.0,
    constant_logits: Sequence[Matrix] | None = None,
    importance: Sequence[Vector] | None = None,
) -> dict[str, float]:
    """EOPD Eq. 9 under the token mean of Algorithm 1 line 13 (over all tokens of the batch, not over responses).

    `placement` says where the forward KL acts: "entropy" (the paper), "all", "none" (OPD alone), or explicit positions
    (Table 6's random ones). `advantage_shaping` is Eq. 11's alpha, its kappa is 2. `importance` weighs the sampled
    tokens' term where another distribution than `old_logps` sampled them. Returns the token means `opd` and
    `fkl` (zero where it doesn't act), the student's `entropy`, and `loss` = opd + fkl - entropy_bonus * entropy.
    """
    opd: list[float] = []
    fkl: list[float] = []
    entropies: list[float] = []
    for i, (student, teacher) in enumerate(zip(student_logits, teacher_logits, strict=True)):
        for t in range(len(student) if lengths is None else lengths[i]):
            token, old_logp = tokens[i][t], old_logps[i][t]
            advantage = log_softmax(teacher[t])[token] - old_logp
            if advantage_shaping:
                constant = student[t] if constant_logits is None else constant_logits[i][t]
                advantage = shaped_advantage(advantage, token_entropy(constant), advantage_shaping)
            ratio = math.exp(log_softmax(student[t])[token] - old_logp)
            weight = 1.0 if importance is None else importance[i][t]
            opd.append(weight * clipped_surrogate(ratio, advantage, clip_epsilon))
            placed = forward_kl_acts(
                teacher[t], placement if isinstance(placement, str) else placement[i][t], entropy_threshold
            )
            fkl.append(topk_forward_kl(student[t], teacher[t], top_k) if placed else 0.0)
            entropies.append(token_entropy(student[t]))
    terms = {"opd": opd, "fkl": fkl, "entropy": entropies}
    means = {name: mean(values) if values else 0.0 for name, values in terms.items()}
    return {**means, "loss": means["opd"] + means["fkl"] - entropy_bonus * means["entropy"]}


def forward_kl_acts(teacher: Vector, placement: str | bool, entropy_threshold: float) -> bool:
    """The trigger of EOPD Eq. 9 and the strategies of its Table 6; strictly greater, over the full vocabulary."""
    if isinstance(placement, bool):
        return placement
    return {"entropy": token_entropy(teacher) > entropy_threshold, "all": True, "none": False}[placement]


# What their tables compare with --------------------------------------------------------------------------------------


def kd_loss(
    student_logits: Sequence[Matrix],
    teacher_logits: Sequence[Matrix],
    tokens: Sequence[Sequence[int]],
    cross_entropy_weight: float = 0.5,
    forward_kl_weight: float = 0.5,
    top_k: int = 16,
) -> float:
    """EOPD's KD, Table 7: cross-entropy and top-k forward KL, a mean over tokens."""
    values: list[float] = []
    for student, teacher, ids in zip(student_logits, teacher_logits, tokens, strict=True):
        for row, teacher_row, token in zip(student, teacher, ids, strict=True):
            forward_kl = topk_forward_kl(row, teacher_row, top_k)
            values.append(-cross_entropy_weight * log_softmax(row)[token] + forward_kl_weight * forward_kl)
    return mean(values)


def minillm_advantages(
    student_logps: Sequence[Vector],
    teacher_logps: Sequence[Vector],
    scaling: float = 0.5,
    clip: float = 100.0,
    discount: float = 0.95,
) -> list[list[float]]:
    """MiniLLM: discounted rewards from each token on, over the number of tokens from it on, whitened over all."""
    returns: list[list[float]] = []
    for student, teacher in zip(student_logps, teacher_logps, strict=True):
        rewards = [max(-clip, min(clip, (p - q) / scaling)) for q, p in zip(student, teacher, strict=True)]
        length = len(rewards)
        returns.append(
            [
                math.fsum(discount ** (s - t) * rewards[s] for s in range(t, length)) / (length - t)
                for t in range(length)
            ]
        )
    every = [value for row in returns for value in row]
    centre = mean(every)
    spread = mean([(value - centre) ** 2 for value in every])
    return [[(value - centre) / math.sqrt(spread + 1e-8) for value in row] for row in returns]


def minillm_loss(
    student_logits: Sequence[Matrix],
    teacher_logits: Sequence[Matrix],
    tokens: Sequence[Sequence[int]],
    old_logits: Sequence[Matrix],
    mixture: float = 0.2,
    clip_epsilon: float = 0.2,
) -> float:
    """MiniLLM's clipped policy gradient, its ratio against the mixture that sampled, plus reverse KL; token mean."""

    def sampled(logits: Sequence[Matrix]) -> list[list[float]]:
        return [
            [log_softmax(r)[t] for r, t in zip(one, ids, strict=True)] for one, ids in zip(logits, tokens, strict=True)
        ]

    new, old, teacher = sampled(student_logits), sampled(old_logits), sampled(teacher_logits)
    advantages = minillm_advantages(old, teacher)
    values: list[float] = []
    for i, row in enumerate(new):
        for t, logp in enumerate(row):
            mixed = mixture * math.exp(teacher[i][t]) + (1.0 - mixture) * math.exp(old[i][t])
            policy = clipped_surrogate(math.exp(logp) / mixed, advantages[i][t], clip_epsilon)
            values.append(policy + generalized_jsd(student_logits[i][t], teacher_logits[i][t], 1.0))
    return mean(values)


# Gradients -----------------------------------------------------------------------------------------------------------


def central_difference(function: Callable[[list[float]], float], point: Vector, step: float = 1e-5) -> list[float]:
    """The gradient of `function` at `point`, good to about ten digits for values of order one."""
    gradient: list[float] = []
    for i in range(len(point)):
        ahead, behind = list(point), list(point)
        ahead[i] += step
        behind[i] -= step
        gradient.append((function(ahead) - function(behind)) / (2.0 * step))
    return gradient
