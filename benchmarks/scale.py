"""How time and peak memory of a loss and its backward pass grow with tokens, vocabulary and top-k: ours and TRL's.

    python benchmarks/scale.py [--output scale.json] [--plot docs/pictures/scale.png] [--limit 120] [--repeats 1]
    python benchmarks/scale.py --tokens 1024 65536 --vocabulary 32768 262144 --top_k 10   # other points
    python benchmarks/scale.py --plot scale.png --from scale.json                         # plot again

The contestants are those of `head.py`: complete TSD-KD with the fused head and from whole logits, and TRL's JSDs,
which have no top-k. One dimension grows, the others stay at 1024 tokens, V 32768, top-k 10. The hidden sizes are small
(128 and 256) so that what grows is the work per (token, vocabulary entry). A point is left out, and named, where the
last two points predict that it would take longer than `--limit` seconds or more memory than there is.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import head
import psutil
import torch

HIDDEN = (128, 256)
BASE = {"tokens": 1024, "vocabulary": 32768, "top_k": 10}
POINTS = {
    "tokens": [1024, 4096, 16384, 65536],
    "vocabulary": [32768, 65536, 131072, 262144],
    "top_k": [2, 10, 50, 200],
}
CONTESTANTS = ["TSD-KD, fused head", "TSD-KD, whole logits", "JSD, TRL's chunked", "JSD, TRL's GKDTrainer"]
LABELS = {"tokens": "tokens", "vocabulary": "vocabulary", "top_k": "top-k"}
Series = list[dict[str, Any]]
"""Points of one contestant along one dimension: value, seconds, gib; or value and `left_out`, the reason."""


def measure(name: str, values: dict[str, int], dtype: str, repeats: int) -> dict[str, float]:
    """Seconds and GiB of one contestant at one point."""
    size = f"{values['vocabulary']}x{HIDDEN[0]}x{HIDDEN[1]}"
    contest = head.Contest(size, values["tokens"], dtype, values["top_k"])
    seconds = head.times({name: contest.contestants()[name]}, contest.forget, repeats)[name]
    if head.DEVICE == "cuda":
        gib = head.extra_gib(contest, name)
    else:
        del contest
        gib = head.alone(size, str(values["tokens"]), dtype, name, str(values["top_k"]))
    return {"seconds": seconds, "gib": gib}


def reason_to_leave_out(series: Series, value: int, limit: float) -> str:
    """Why the next point isn't measured: what the last points predict for it; "" if it is."""
    found = [point for point in series if "seconds" in point]
    if len(found) < len(series):
        return "smaller ones were left out"
    if len(found) < 2:
        return ""
    before, last = found[-2:]

    def predict(what: str) -> float:
        power = math.log(last[what] / before[what]) / math.log(last["value"] / before["value"])
        return float(last[what] * (value / last["value"]) ** max(power, 0.0))

    seconds, gib = predict("seconds"), predict("gib")
    total = torch.cuda.mem_get_info()[1] if head.DEVICE == "cuda" else psutil.virtual_memory().available
    if seconds > limit:
        return f"would take about {seconds:.0f} s"
    if gib > 0.8 * total / 2**30:
        return f"would take about {gib:.0f} GiB"
    return ""


def sweep(dimension: str, points: list[int], dtype: str, limit: float, repeats: int) -> dict[str, Series]:
    """Measure all contestants along one dimension."""
    found: dict[str, Series] = {name: [] for name in CONTESTANTS if dimension != "top_k" or name.startswith("TSD-KD")}
    for value in points:
        for name, series in found.items():
            reason = reason_to_leave_out(series, value, limit)
            point: dict[str, Any] = {"value": value}
            point |= {"left_out": reason} if reason else measure(name, {**BASE, dimension: value}, dtype, repeats)
            series.append(point)
            figures = reason or f"{point['seconds']:.3g} s | {point['gib']:.3g} GiB"
            print(f"| {LABELS[dimension]} | {value} | {name} | {figures} |", flush=True)
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """Time and memory along each dimension, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, len(results["sweeps"]), sharey="row")
    for column, (dimension, contestants) in enumerate(results["sweeps"].items()):
        for row, (what, unit) in enumerate({"seconds": "time, s", "gib": "peak memory, GiB"}.items()):
            axis = axes[row][column]
            for name, series in contestants.items():
                points = [(point["value"], point[what]) for point in series if what in point]
                style = {"color": f"C{CONTESTANTS.index(name)}", "marker": "os^D"[CONTESTANTS.index(name)]}
                axis.plot(*zip(*points, strict=True), label=name, **style)
            axis.set(xscale="log", yscale="log")
            axis.set_xticks([p["value"] for p in next(iter(contestants.values()))], minor=False)
            axis.set_xticklabels([f"{p['value']:,}" for p in next(iter(contestants.values()))])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(unit)
            if row == 1:
                axis.set_xlabel(LABELS[dimension])
    axes[0][0].legend(fontsize="small")
    figure.suptitle(results["machine"], fontsize="medium")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for dimension, points in POINTS.items():
        parser.add_argument(f"--{dimension}", nargs="+", type=int, default=points)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that a point may take")
    parser.add_argument("--output", type=Path, help="file for the figures (JSON)")
    parser.add_argument("--plot", type=Path, help="file for the plot (needs matplotlib)")
    parser.add_argument("--from", dest="saved", type=Path, help="plot the figures of this file; measure nothing")
    arguments = parser.parse_args()
    if arguments.saved:
        results = json.loads(arguments.saved.read_text())
    else:
        device = torch.cuda.get_device_name() if head.DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
        machine = f"{arguments.dtype}, {device}, torch {torch.__version__}"
        print(f"{machine}\n\n| | | | seconds | GiB |\n|---|---|---|---|---|")
        results = {"machine": machine, "sweeps": {}}
        for dimension in POINTS:
            points = sorted(getattr(arguments, dimension))
            results["sweeps"][dimension] = sweep(
                dimension, points, arguments.dtype, arguments.limit, arguments.repeats
            )
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=1))
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    sys.exit(main())
