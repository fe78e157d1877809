"""EOPD, Sec. 3.2 and App. B: a student with 80 logits learns from the reverse KL reward of two teachers.

One teacher has low and one has high entropy. The paper does not give the learning rate or the number of steps. With
0.2 and 1000, the results of many seeds are close to Table 1; the table does not determine the two values separately.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from ..config.console import PlainConsole
from ..errors import escape_line

VOCAB_SIZE, TOP_K = 80, 10
MODE_LOGITS = (1.7, 1.9, 2.1, 2.3, 2.5)
SCENARIO_TEMPERATURES = {"A, low teacher entropy": 0.3, "B, high teacher entropy": 1.0}  # the teacher's temperature
PAPER_TOP1_CHANGES = {"A, low teacher entropy": "7.3 ± 1.6", "B, high teacher entropy": "84.0 ± 16.7"}
_COLORS = ("#1f4e79", "#b03a2e")
_WINDOW = 25  # number of steps for the moving average in Figure 1


@dataclass
class ToyResult:
    """One seed of one scenario.

    Attributes:
        teacher, student: `[80]`, final distributions.
        top1_changes: number of changes of the student's most probable index.
        top10_rates: `[steps]`, Jaccard distance between the top-10 sets before and after each update.
    """

    teacher: np.ndarray
    student: np.ndarray
    top1_changes: int
    top10_rates: np.ndarray


def simulate_toy(temperature: float, seed: int, learning_rate: float = 0.2, steps: int = 1000) -> ToyResult:
    """Run the policy gradient of Sec. 3.2: sample from the student's top 10 and change its logit by the reward."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(VOCAB_SIZE)
    logits[rng.choice(VOCAB_SIZE, len(MODE_LOGITS), replace=False)] = MODE_LOGITS
    teacher = _softmax(logits / temperature)
    student = rng.standard_normal(VOCAB_SIZE)
    top, best = _top_k_indices(student), int(student.argmax())
    changes, rates = 0, np.zeros(steps)
    for step in range(steps):
        probs = _softmax(student[top])
        place = rng.choice(TOP_K, p=probs)
        student[top[place]] += learning_rate * (np.log(teacher[top[place]]) - np.log(probs[place]))
        now = _top_k_indices(student)
        shared = len(np.intersect1d(top, now))
        rates[step] = 1 - shared / (2 * TOP_K - shared)
        changes += int(student.argmax()) != best
        top, best = now, int(student.argmax())
    return ToyResult(teacher, _softmax(student), changes, rates)


def reproduce(folder: Path, seeds: int, learning_rate: float, steps: int) -> None:
    """Print Table 1 next to the paper's numbers, and write the plots of Figures 1 and 6 to `folder`."""
    runs = {
        name: [simulate_toy(temperature, seed, learning_rate, steps) for seed in range(seeds)]
        for name, temperature in SCENARIO_TEMPERATURES.items()
    }
    table = Table(title=f"Top-1 changes in {steps} steps, learning rate {learning_rate}")
    for column in ("teacher", "temperature", "paper, 3 seeds", f"here, {seeds} seed{'s' if seeds > 1 else ''}"):
        table.add_column(column)
    for name, results in runs.items():
        counts = [toy.top1_changes for toy in results]
        spread = f" ± {np.std(counts, ddof=1):.1f}" if seeds > 1 else ""
        table.add_row(
            name, str(SCENARIO_TEMPERATURES[name]), PAPER_TOP1_CHANGES[name], f"{np.mean(counts):.1f}{spread}"
        )
    console = PlainConsole()
    console.print(table)
    for path in (_plot_rates(runs, folder), _plot_distributions(runs, folder)):
        console.print(escape_line(f"wrote {path}"))


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()


def _top_k_indices(x: np.ndarray) -> np.ndarray:
    return np.argsort(-x, kind="stable")[:TOP_K]


def _plot_rates(runs: dict[str, list[ToyResult]], folder: Path) -> Path:
    """Plot Figure 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    kernel = np.ones(_WINDOW) / _WINDOW
    for (name, results), color in zip(runs.items(), _COLORS, strict=True):
        curves = np.array([np.convolve(toy.top10_rates, kernel, mode="valid") for toy in results])
        steps = np.arange(curves.shape[1]) + _WINDOW
        axis.plot(steps, curves.mean(0), color=color, label=name)
        axis.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)
    axis.set_xlabel("step")
    axis.set_ylabel(f"top-{TOP_K} change rate")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    path = folder / "eopd_toy_figure1.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _plot_distributions(runs: dict[str, list[ToyResult]], folder: Path) -> Path:
    """Plot Figure 6: final teacher and student of the first seed, sorted by the teacher's probability."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, (name, results), color in zip(axes, runs.items(), _COLORS, strict=True):
        order = np.argsort(-results[0].teacher)
        axis.bar(range(VOCAB_SIZE), results[0].teacher[order], color="#c8d0d8", width=1.0, label="teacher")
        axis.plot(range(VOCAB_SIZE), results[0].student[order], ".", color=color, label="student")
        axis.set_title(name, fontsize="medium")
        axis.set_xlabel("index, sorted by the teacher's probability")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    axes[0].set_ylabel("probability")
    path = folder / "eopd_toy_figure6.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
