"""The papers' figures: what each shows, in numbers, and how it is drawn."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

from ..errors import escape_line
from ..trainer.token_records import MASS_TOP_K
from .load import StepRecord

ENTROPY_THRESHOLD, HIGH_ENTROPY = 0.8, 1.0  # nats: EOPD's trigger, and what its Sec. 3.1 calls high
ENTROPY_BINS = np.linspace(0.0, 4.0, 41)  # and a bin for all that is above
# Okabe and Ito's, the light ones darker, so that a thin line is seen on white
COLORS = ("#0072b2", "#d55e00", "#009170", "#b9628f", "#b27a00", "#3a8fc4")

_MAX_LABEL = 60

RecordsByRun = dict[str, list[StepRecord]]
FigureData = dict[str, Any]


@dataclass(frozen=True)
class FigureSpec:
    """A figure.

    Attributes:
        name: of its file.
        title: what it shows.
        paper: the paper's figure.
        compute: records of runs -> the numbers, for JSON.
        plot: the numbers on an axis.
    """

    name: str
    title: str
    paper: str
    compute: Callable[[RecordsByRun], FigureData]
    plot: Callable[[Axes, FigureData], None]


def plot_figure(spec: FigureSpec, data: FigureData) -> Figure:
    """The figure, for the caller to save."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.subplots()
    spec.plot(axis, data)
    plain_ticks(axis)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize="small")
    return figure


def plain_ticks(axis: Axes) -> None:
    """Write every number at its tick, such as 5e-06; matplotlib would write an offset or a factor beside the axis."""
    for side in (axis.xaxis, axis.yaxis):
        if isinstance(side.get_major_formatter(), ScalarFormatter):
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))


def label(name: str) -> str:
    """A name as matplotlib draws it: not as a formula, and in legends, which otherwise leave out `_name`."""
    text = escape_line(name[: _MAX_LABEL + 1])
    text = text if len(text) <= _MAX_LABEL else f"{text[: _MAX_LABEL - 1]}…"
    return f"{' ' * text.startswith('_')}{text}".replace("$", r"\$")


def save_figure(figure: Figure, target: Any, **options: Any) -> None:
    """`Figure.savefig` without its warnings about characters that the font lacks and about many names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font|constrained_layout not applied")
        figure.savefig(target, **options)


# The numbers --------------------------------------------------------------------------------------------------------


def _entropy_by_position(runs: RecordsByRun) -> FigureData:
    """Mean entropies at each twentieth of a completion."""

    def means(record: StepRecord, name: str) -> list[float | None]:
        place = record.columns["position"] / record.lengths[record.columns["sample"]]
        bins = np.minimum((place * 20).astype(int), 19)
        sums, counts = np.bincount(bins, record.columns[name], 20), np.bincount(bins, minlength=20)
        return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]

    return {
        run: {who: means(records[-1], f"{who}_entropy") for who in ("student", "teacher")}
        for run, records in runs.items()
    }


def _entropy_histogram(runs: RecordsByRun) -> FigureData:
    def shares(values: np.ndarray) -> FigureData:
        counts, _ = np.histogram(np.maximum(values, 0.0), [*ENTROPY_BINS, np.inf])
        return {"share": (counts / max(len(values), 1)).tolist(), "above": float((values >= HIGH_ENTROPY).mean())}

    return {
        run: {who: shares(records[-1].columns[f"{who}_entropy"]) for who in ("student", "teacher")}
        for run, records in runs.items()
    }


def _over_steps(value: Callable[[StepRecord], float | None]) -> Callable[[RecordsByRun], FigureData]:
    def compute(runs: RecordsByRun) -> FigureData:
        return {
            run: {"step": [r.step for r in records], "value": [value(r) for r in records]}
            for run, records in runs.items()
        }

    return compute


def _uncertain_forward_kl(record: StepRecord) -> float | None:
    chosen = record.columns["forward_kl"][record.columns["teacher_entropy"] > ENTROPY_THRESHOLD]
    return float(chosen.mean()) if len(chosen) else None


def _top_k_mass(runs: RecordsByRun) -> FigureData:
    means = {
        run: np.mean([r.columns["teacher_mass"].mean(axis=0) for r in records], axis=0).tolist()
        for run, records in runs.items()
    }
    # an id of 8 bytes and a log-probability of 4 for each of k tokens, as torch gives them
    return {"k": list(MASS_TOP_K), "bytes": [12 * k for k in MASS_TOP_K], "mass": means}


def _opener_lengths(runs: RecordsByRun) -> FigureData:
    def lengths(record: StepRecord) -> list[int]:
        return np.bincount(record.columns["sample"][record.is_opener], minlength=len(record.samples)).tolist()

    return {run: {"length": lengths(records[-1]), "of": records[-1].lengths.tolist()} for run, records in runs.items()}


def _gate_histogram(runs: RecordsByRun) -> FigureData:
    bins = np.linspace(0.0, 1.0, 41)
    return {run: (np.histogram(r[-1].gate, bins)[0] / len(r[-1].gate)).tolist() for run, r in runs.items()}


# The plots ----------------------------------------------------------------------------------------------------------


def _plot_entropy_by_position(axis: Axes, data: FigureData) -> None:
    places = np.arange(20) * 5 + 2.5
    for (run, curve), color in zip(data.items(), _color_cycle(), strict=False):
        for who, style in (("student", "-"), ("teacher", ":")):
            values = np.array(curve[who], dtype=float)  # NaN where no completion has a token
            axis.plot(places, values, color=color, ls=style, label=f"{label(run)}: {who}")
    axis.set(xlabel="position in the completion, %", ylabel="mean entropy, nats", xlim=(0, 100))


def _plot_entropy_histogram(axis: Axes, data: FigureData) -> None:
    most, width = ENTROPY_BINS[-1], ENTROPY_BINS[1]
    for (run, curve), color in zip(data.items(), _color_cycle(), strict=False):
        for who, style in (("student", "-"), ("teacher", ":")):
            text = f"{label(run)}: {who}, {100 * curve[who]['above']:.1f} % at {HIGH_ENTROPY} nat or more"
            axis.stairs(curve[who]["share"], [*ENTROPY_BINS, most + width], color=color, ls=style, label=text)
    axis.set(xlabel="entropy of a token, nats", ylabel="share of tokens", yscale="log", xlim=(0, most + width))
    axis.set_xticks([*range(int(most)), most + width / 2], [*map(str, range(int(most))), f"≥ {most:g}"])


def _plot_over_steps(title: str) -> Callable[[Axes, FigureData], None]:
    def plot(axis: Axes, data: FigureData) -> None:
        for (run, curve), color in zip(data.items(), _color_cycle(), strict=False):
            axis.plot(curve["step"], np.array(curve["value"], dtype=float), ".-", color=color, label=label(run))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(xlabel="optimizer step", ylabel=title)

    return plot


def _plot_top_k_mass(axis: Axes, data: FigureData) -> None:
    for (run, mass), color in zip(data["mass"].items(), _color_cycle(), strict=False):
        axis.plot(data["bytes"], mass, "o-", color=color, label=label(run))
    for k, size in zip(data["k"], data["bytes"], strict=True):
        lowest = min(m[data["k"].index(k)] for m in data["mass"].values())
        axis.annotate(
            f"k = {k}", (size, lowest), (0, -7), textcoords="offset points", fontsize=7, ha="center", va="top"
        )
    axis.margins(y=0.15)
    axis.set(xlabel="bytes per token", ylabel="teacher's probability in its top k", xscale="log")
    axis.set_xticks(data["bytes"], [str(size) for size in data["bytes"]])
    axis.minorticks_off()


def _plot_opener_lengths(axis: Axes, data: FigureData) -> None:
    for (run, lengths), color in zip(data.items(), _color_cycle(), strict=False):
        shares = 100 * np.array(lengths["length"]) / np.maximum(lengths["of"], 1)
        axis.hist(
            shares,
            bins=20,
            range=(0, 100),
            histtype="step",
            color=color,
            label=f"{label(run)}: mean {np.mean(shares):.1f} %",
        )
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="opener's share of a completion's tokens, % (bins of 5)", ylabel="completions", xlim=(0, 100))


def _plot_gate_histogram(axis: Axes, data: FigureData) -> None:
    for (run, shares), color in zip(data.items(), _color_cycle(), strict=False):
        axis.stairs(shares, np.linspace(0.0, 1.0, 41), color=color, label=label(run))
    axis.set(xlabel="gate of a token (0: ignored, 1: full weight)", ylabel="share of tokens", xlim=(0, 1))


def _color_cycle() -> Iterator[str]:
    return cycle(COLORS)


FIGURES = (
    FigureSpec(
        "entropy_by_position",
        "Token entropy by position",
        "TSD-KD, Figure 1",
        _entropy_by_position,
        _plot_entropy_by_position,
    ),
    FigureSpec(
        "entropy_histogram",
        "Token entropies of student and teacher",
        "EOPD, Figure 3",
        _entropy_histogram,
        _plot_entropy_histogram,
    ),
    FigureSpec(
        "policy_entropy",
        "Student's mean entropy over training",
        "EOPD, Figure 4",
        _over_steps(lambda r: float(r.columns["student_entropy"].mean())),
        _plot_over_steps("mean entropy, nats"),
    ),
    FigureSpec(
        "uncertain_forward_kl",
        f"Forward KL where the teacher's entropy is above {ENTROPY_THRESHOLD} nats",
        "EOPD, Figures 5 and 11",
        _over_steps(_uncertain_forward_kl),
        _plot_over_steps("mean forward KL, nats"),
    ),
    FigureSpec(
        "uncertain_share",
        "Share of tokens at which EOPD's trigger fires",
        "EOPD, Figure 9",
        _over_steps(lambda r: float(r.is_triggered.mean())),
        _plot_over_steps("share of tokens"),
    ),
    FigureSpec(
        "top_k_mass",
        "Probability in the teacher's top k, and its cost in bytes",
        "EOPD, Figure 10",
        _top_k_mass,
        _plot_top_k_mass,
    ),
    FigureSpec("opener_length", "Length of the opener", "TSD-KD, Sec. 3.1", _opener_lengths, _plot_opener_lengths),
    FigureSpec("gate", "Gate values", "TSD-KD, Eq. 11", _gate_histogram, _plot_gate_histogram),
)
