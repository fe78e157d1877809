"""Which metrics a chart has, and how it is titled and explained."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ChartSpec:
    """A chart of one or more metrics.

    Attributes:
        title: for people; empty: the metric's name.
        metrics: names in the log; one that ends in "/", "_" or "@" is a prefix.
        help: one line that explains the chart.
        unit: of the values.
        scale: factor from the log's values to `unit`.
        shared_by: which runs may share an axis. "same loss": only runs whose loss is the same function.
        is_log: whether the y axis is logarithmic.
        together: whether all metrics are lines of one chart; otherwise each has a chart.
    """

    title: str
    metrics: tuple[str, ...]
    help: str = ""
    unit: str = ""
    scale: float = 1.0
    shared_by: Literal["all runs", "same loss", "one run"] = "all runs"
    is_log: bool = False
    together: bool = True


MAIN_CHARTS = (
    ChartSpec(
        "Loss",
        ("loss",),
        "What training minimizes. Losses of different methods are different quantities: each has its own chart.",
        shared_by="same loss",
    ),
    ChartSpec(
        "Held-out accuracy",
        ("eval_accuracy",),
        "Share of held-out prompts that the student answers correctly. Step 0 is before training.",
        "%",
        100.0,
    ),
    ChartSpec(
        "Held-out accuracy of several completions",
        ("eval_avg@", "eval_pass@"),
        "avg@n: share of right completions among n of each prompt. pass@n: share of prompts with at least one.",
        "%",
        100.0,
    ),
    ChartSpec(
        "Entropy per token",
        ("entropy/student", "entropy/teacher"),
        "How uncertain each model is about the next token of the student's completions.",
        "nats",
    ),
    ChartSpec(
        "Completion length", ("completions/mean_length",), "Mean length of the student's completions.", "tokens"
    ),
    ChartSpec(
        "Completions that end with a stop token",
        ("completions/eos_share",),
        "The others were cut off at the length limit.",
        "%",
        100.0,
    ),
    ChartSpec(
        "Gradient norm of each loss term",
        ("grad_norm/",),
        "Terms include their weight. A term far below the others hardly changes the student.",
        shared_by="one run",
        is_log=True,
    ),
)
FOLDED_CHARTS = (
    (
        "Loss terms and evaluation loss",
        (ChartSpec("", ("loss/", "eval_loss", "eval_loss/"), shared_by="same loss", together=False),),
    ),
    (
        "Opener, gate and trigger",
        (ChartSpec("", ("gate", "opener/", "uncertain/"), together=False),),
    ),
    (
        "Optimization",
        (
            ChartSpec("Learning rate", ("learning_rate",)),
            ChartSpec("Gradient norm", ("grad_norm",), "Of the whole loss, before clipping.", shared_by="same loss"),
            ChartSpec("", ("policy/",), together=False),
        ),
    ),
    (
        "Speed",
        (
            ChartSpec(
                "Seconds per step",
                ("time/rollout_seconds", "time/teacher_seconds", "time/student_seconds"),
                "Time of an optimizer step: the rollout, the teacher's forward, the student's forward and backward.",
                "seconds",
                shared_by="one run",
            ),
            ChartSpec("", ("time/", "speed/", "padding"), together=False),
        ),
    ),
    ("Evaluation on held-out prompts", (ChartSpec("", ("eval_",), together=False),)),
    ("Other metrics", (ChartSpec("", ("",), together=False),)),
)
HIDDEN_METRICS = (  # prefixes: totals that are logged once, at the end, and the speed of evaluations
    "train_",
    "total_flos",
    "eval_speed/",
    "eval_time/",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
)
METRIC_HELP = {  # of charts of one metric; also of eval_<metric>
    "gate": "Mean weight of direct distillation over the tokens (TSD-KD, Eq. 11).",
    "opener/length": "Tokens in the opener, mean over completions.",
    "opener/share": "The opener's share of a completion's tokens.",
    "opener/top1_agreement": "How often the teacher prefers the same candidate as the student, in the opener.",
    "uncertain/share": "Share of tokens at which the teacher's entropy is above the threshold.",
    "uncertain/forward_kl": "Mean forward KL at those tokens, in nats.",
    "policy/clip_fraction": "Share of tokens whose loss is clipped: their probability has moved too far.",
    "policy/ratio": "Mean ratio of a token's probability now to that at the rollout.",
    "policy/approx_kl": "Estimate of how far the student moved since the rollout, in nats.",
    "speed/rollout_tokens_per_second": "Tokens that the student generates per second, per process.",
    "speed/teacher_tokens_per_second": "Tokens that the teacher scores per second, per process.",
    "speed/student_tokens_per_second": "Tokens that the student trains on per second, per process.",
    "padding": "Share of the positions of training forward passes that are padding.",
    "speed/weight_sync_seconds": "Time to send the student's weights to vLLM.",
    "completions/mean_length": "Mean length of the student's completions, in tokens.",
    "completions/eos_share": "Share of completions that end with a stop token.",
    "entropy/student": "How uncertain the student is about the next token, in nats.",
    "entropy/teacher": "How uncertain the teacher is about the next token, in nats.",
    "accuracy": "Share of sampled completions with the right answer.",
}
