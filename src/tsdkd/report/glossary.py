"""The words on the page that a newcomer can't know, in one line each."""

GLOSSARY = (
    ("Rollout", "The student writes completions for the prompts of a training step; the teacher then scores them."),
    ("Nat", "Unit of entropies, divergences and log-probabilities, with the natural logarithm. One nat is 1.44 bits."),
    (
        "Entropy",
        "How uncertain a model is about the next token, in nats. 0: it is sure of one token; 0.69: two tokens are "
        "equally likely.",
    ),
    (
        "KL, forward and reverse",
        "Distance between two distributions: forward weighs the teacher's likely tokens, reverse the student's.",
    ),
    (
        "JSD",
        "Generalized Jensen-Shannon divergence of student and teacher. beta moves it from forward to reverse KL.",
    ),
    ("Opener", "The first tokens of a completion, up to a share opener_ratio of its total entropy (TSD-KD)."),
    (
        "Gate",
        "Weight of a token in direct distillation, from 0 to 1. It is above 0.5 where the student is less sure than "
        "the teacher (TSD-KD, Eq. 11).",
    ),
    ("Trigger", "EOPD adds forward KL at tokens where the teacher's entropy exceeds entropy_threshold."),
    (
        "Candidates",
        "The student's ten most likely next tokens. Kendall's tau compares their order in both models: "
        "1 is the same order, -1 the reverse.",
    ),
    ("Stop token", "Ends a completion. A completion without one was cut off at the length limit."),
    ("Greedy", "One answer per problem, always with the most likely token."),
    ("avg@8", "Mean share of right answers among eight sampled answers per problem."),
    ("pass@8", "Share of problems that at least one of eight sampled answers solves."),
    (
        "95 % interval, p",
        "The range that chance alone would explain; a difference counts as clear if p < 0.05.",
    ),
    ("Gradient norm", "Length of the gradient. It shows how strongly a loss, or one of its terms, moves the student."),
)
