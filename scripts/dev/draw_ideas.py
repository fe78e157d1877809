"""Draw the pictures of docs/ideas.md from a run that recorded, e.g. the demo's.

tsdkd demo --output_dir runs/demo && python scripts/dev/draw_ideas.py runs/demo docs/pictures
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tsdkd.analysis.figures import COLORS
from tsdkd.analysis.load import StepRecord, read_records

BLUE, RED, GREEN = COLORS[:3]


def main(run: Path, folder: Path) -> None:
    """Both pictures, of one completion of the first record."""
    record = read_records(run)[0]
    sample = int(np.argmin(np.abs(record.lengths - 33)))  # as many tokens as are legible
    own = record.columns["sample"] == sample
    folder.mkdir(parents=True, exist_ok=True)
    tsd_kd(record, own, folder / "tsd-kd.png")
    eopd(record, own, folder / "eopd.png")


def tsd_kd(record: StepRecord, own: np.ndarray, path: Path) -> None:
    """The student's entropy with opener and most uncertain tokens; gate and JSD."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True, layout="constrained")
    entropy, opener, chosen = (
        record.columns["student_entropy"][own],
        record.is_opener[own],
        record.is_high_entropy[own],
    )
    places = np.arange(len(entropy))
    top.axvspan(-0.5, opener.sum() - 0.5, color=BLUE, alpha=0.15, lw=0, label="opener: the ranking is learned here")
    top.bar(places, entropy, color=np.where(chosen, RED, "#bbbbbb"), width=0.7)
    top.bar(0, 0, color=RED, label="the 10 % whose entropy is minimized")
    top.set_ylabel("student's entropy,\nnats")
    divergence, gate = record.columns["divergence"][own], record.gate[own]
    bottom.bar(places, divergence, color="#bbbbbb", width=0.7, label="JSD")
    bottom.bar(places, gate * divergence, color=GREEN, width=0.45, label="gate x JSD: minimized on all tokens")
    bottom.set_ylabel("nats")
    _finish(top, bottom, record, own)
    figure.savefig(path, dpi=120)


def eopd(record: StepRecord, own: np.ndarray, path: Path) -> None:
    """The teacher's entropy with the trigger; the two terms."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True, layout="constrained")
    entropy, fires = record.columns["teacher_entropy"][own], record.is_triggered[own]
    places = np.arange(len(entropy))
    top.bar(places, entropy, color=np.where(fires, RED, "#bbbbbb"), width=0.7)
    top.bar(0, 0, color=RED, label="the teacher is uncertain: forward KL is added")
    top.axhline(record.options.entropy_threshold, color="black", lw=0.8, ls=":")
    top.set_ylabel("teacher's entropy,\nnats")
    reverse = (record.columns["student_logp"] - record.columns["teacher_logp"])[own]
    bottom.bar(places - 0.2, reverse, color=BLUE, width=0.4, label="log Q - log P of the sampled token, on all tokens")
    forward = np.where(fires, record.columns["forward_kl"][own], 0)
    bottom.bar(places + 0.2, forward, color=RED, width=0.4, label="forward KL over the teacher's top 16")
    bottom.set_ylabel("nats")
    _finish(top, bottom, record, own)
    figure.savefig(path, dpi=120)


def _finish(top: Axes, bottom: Axes, record: StepRecord, own: np.ndarray) -> None:
    texts = [record.texts[token].strip() for token in record.columns["token"][own]]
    bottom.set_xticks(range(len(texts)), texts, fontsize=8, rotation=90)
    bottom.set_xlim(-0.7, len(texts) - 0.3)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
