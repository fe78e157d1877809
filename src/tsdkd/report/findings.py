"""Describes in sentences how a run went."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..evaluation.results import format_difference
from ..evaluation.suites import benchmark_title
from ..trainer.token_records import RECORDS_DIR
from .load import RunReport
from .trainer_state import Curve


@dataclass(frozen=True)
class Finding:
    """Something to know of a run.

    Attributes:
        level: "good", "note" or "warning".
        text: for people.
    """

    level: str
    text: str


def find_notable(run: RunReport) -> list[Finding]:
    """Collect the notable findings about a run, the most important first."""
    parts = (_progress, _accuracy, _benchmarks, _loss, _entropy, _completions, _nonfinite, _missing_data)
    findings = [finding for part in parts for finding in part(run)]
    return sorted(findings, key=lambda finding: ["warning", "good", "note"].index(finding.level))


def _progress(run: RunReport) -> Iterator[Finding]:
    if not run.state:
        yield Finding("note", "No log yet: it is written with the first checkpoint and at the end of training.")
    elif run.state.is_finished:
        yield Finding("good", f"Finished: {run.state.global_step} steps.")
    else:
        done, planned = run.state.global_step, run.state.max_steps
        yield Finding("warning", f"Not finished: the last checkpoint is at step {done} of {planned}.")


def _accuracy(run: RunReport) -> Iterator[Finding]:
    """Only what the summary's numbers don't say by themselves. "Before training" is step 0 and no other."""
    curve = run.accuracy
    if not curve:
        return
    (start, first), (end, last) = curve[0], curve[-1]
    if len(curve) > 1 and last <= first:
        since = "from before training" if start == 0 else f"from step {start}"
        text = f"Held-out accuracy did not improve {since} to step {end}: {100 * first:.1f} % to {100 * last:.1f} %."
        yield Finding("warning", text)
    if start > 0:
        text = f"Held-out accuracy was first measured at step {start}, not before training (eval_on_start)."
        yield Finding("note", text)


def _benchmarks(run: RunReport) -> Iterator[Finding]:
    """Better or worse than an evaluation's baseline, where chance is no explanation."""
    for entry in run.baseline_differences:
        if not entry["metric"].startswith(("accuracy", "avg@")):
            continue
        level, word = ("warning", "worse") if entry["difference"] < 0 else ("good", "better")
        if entry["p"] >= 0.05:
            level, word = "note", "no clear difference"
        score = f"{benchmark_title(entry['benchmark'])}: {entry['mean']:.1f} % ({entry['metric']})"
        yield Finding(level, f"{score}, against {entry['baseline']} {format_difference(entry)}: {word}.")


def _loss(run: RunReport) -> Iterator[Finding]:
    curve = run.curves.get("loss", [])
    if len(curve) >= 8:
        nonfinite_step = next((step for step, value in curve if not math.isfinite(value)), None)
        if nonfinite_step is not None:
            yield Finding("warning", f"The loss is not finite at step {nonfinite_step}.")
            return
        first, last = _quarter_means(curve)
        # the value of a policy gradient's loss says nothing
        is_policy_gradient = run.config.get("method") == "grpo" or "policy/ratio" in run.curves
        if last >= first and not is_policy_gradient:
            text = f"The loss did not fall: {first:.4g} in the first quarter of training, {last:.4g} in the last."
            yield Finding("warning", text)


def _entropy(run: RunReport) -> Iterator[Finding]:
    curve = run.curves.get("entropy/student", [])
    if len(curve) >= 8:
        first, last = _quarter_means(curve)
        if last < 0.25 * first:
            yield Finding("warning", f"The student's entropy collapsed, from {first:.3f} to {last:.3f} nats.")
        else:
            yield Finding("note", f"The student's entropy went from {first:.3f} to {last:.3f} nats.")


def _completions(run: RunReport) -> Iterator[Finding]:
    curve = run.curves.get("completions/eos_share", [])
    if curve and curve[-1][1] < 0.5:
        truncated = 100 * (1 - curve[-1][1])
        yield Finding("warning", f"{truncated:.0f} % of the last completions were cut off at the length limit.")


def _nonfinite(run: RunReport) -> Iterator[Finding]:
    if run.num_nonfinite_steps:
        steps = run.num_nonfinite_steps
        yield Finding(
            "warning", f"The loss or a gradient was not finite in {steps} steps: see nonfinite_step_*.jsonl."
        )


def _missing_data(run: RunReport) -> Iterator[Finding]:
    """Data that the report lacks, and why."""
    for reason in run.skipped:
        yield Finding("warning", f"Left out: {reason}.")
    if run.state and len(run.curves.get("loss", [])) < 2:
        every, steps = run.state.logging_steps, run.state.global_step
        yield Finding("note", f"No loss curve: the run took {steps} steps and logged every {every} (logging_steps).")
    if not run.records and not (run.folder / RECORDS_DIR).is_dir():
        yield Finding("note", "No token view and no analyses: the run didn't record any tokens (record_steps).")


def _quarter_means(curve: Curve) -> tuple[float, float]:
    size = len(curve) // 4
    first, last = curve[:size], curve[-size:]
    return sum(value for _, value in first) / size, sum(value for _, value in last) / size
