"""The charts and the summary of `tsdkd report`, in a real browser, of logs that are written by hand."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import chromium
from chromium import needs_chromium, opened, shown, unfold
from test_report import made_up
from tsdkd.cli import main
from tsdkd.evaluation.results import BenchmarkResult, write_results
from tsdkd.evaluation.suites import SUITES
from tsdkd.report.load import load_run
from tsdkd.report.page import render_page
from tsdkd.trainer.token_records import RecordedCompletion, write_token_records

browser = chromium.browser
Entries = list[dict[str, Any]]


def write_run(folder: Path, entries: Entries, **config: Any) -> Path:
    """A run's folder with a log."""
    folder.mkdir()
    config = {"method": "tsd-kd", "seed": 0, **config}
    (folder / "tsdkd_config.yaml").write_text(json.dumps(config))
    last = max(entry["step"] for entry in entries)
    state = {"global_step": last, "max_steps": last, "logging_steps": 1, "log_history": entries}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def log(slope: float = 0.01, count: int = 100, **others: Any) -> Entries:
    return [
        {"step": i, "loss": 2 - slope * i, "entropy/student": 1 + slope * i, **others} for i in range(1, count + 1)
    ]


def open_report(browser: Any, output: Path, *folders: Path) -> Any:
    assert main(["report", *map(str, folders), "--output_file", str(output)]) == 0
    opened(browser, output)
    unfold(browser)
    return browser


def figures(browser: Any, title: str) -> list[Any]:
    """The charts under a title."""
    found = browser.find_elements(By.CSS_SELECTOR, "#curves figure")
    return [f for f in found if f.find_element(By.CSS_SELECTOR, "figcaption b").text == title]


def values(figure: Any) -> dict[str, str]:
    """Line -> the value in the legend."""
    keys = [key for key in figure.find_elements(By.CSS_SELECTOR, ".key") if key.is_displayed()]
    return {key.find_element(By.CLASS_NAME, "name").text: key.find_element(By.TAG_NAME, "b").text for key in keys}


def ticks(figure: Any, axis: str) -> list[str]:
    return [text.text for text in figure.find_elements(By.CSS_SELECTOR, f"text.{axis}")]


def numbers(texts: list[str]) -> list[float]:
    return [float(text.replace(",", "")) for text in texts]


def point_at(browser: Any, figure: Any, share: float, press: bool = False) -> ActionChains:
    """The pointer at a share of the x axis's length."""
    svg = figure.find_element(By.CSS_SELECTOR, ".chart > svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    left, right = browser.execute_script(
        """const own = arguments[0].getBoundingClientRect();
        const grid = arguments[0].querySelector(".grid").getBoundingClientRect();
        return [grid.left - own.left, grid.right - own.left]""",
        svg,
    )
    x = left + share * (right - left) - svg.rect["width"] / 2
    chain = ActionChains(browser, duration=20).move_to_element_with_offset(svg, round(x), 0)
    if press:
        chain.click_and_hold()
    chain.perform()
    return chain


@needs_chromium
def test_hover_shows_the_values_of_every_run(browser: Any, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", log(0.01)), write_run(tmp_path / "b", log(0.005), seed=1)]
    open_report(browser, tmp_path / "page.html", *runs)
    (loss,) = figures(browser, "Loss")
    assert values(loss) == {"a": "1", "b": "1.5"} and "last value" in loss.text
    point_at(browser, loss, 0.5)
    step = int(re.search(r"step (\d+)\n", loss.text)[1])  # type: ignore[index]
    assert 48 <= step <= 53
    assert numbers([*values(loss).values()]) == pytest.approx([2 - 0.01 * step, 2 - 0.005 * step])
    point_at(browser, figures(browser, "Entropy per token")[0], 0.5)
    assert values(loss) == {"a": "1", "b": "1.5"}


@needs_chromium
def test_charts_by_keyboard(browser: Any, tmp_path: Path) -> None:
    open_report(browser, tmp_path / "page.html", write_run(tmp_path / "a", log()))
    (loss,) = figures(browser, "Loss")
    svg = loss.find_element(By.CSS_SELECTOR, ".chart > svg")
    svg.send_keys(Keys.HOME)
    assert svg.get_attribute("aria-valuetext") == "step 1, loss 1.99"
    svg.send_keys(Keys.ARROW_RIGHT)
    assert svg.get_attribute("aria-valuetext") == "step 2, loss 1.98"
    before = ticks(loss, "x")
    svg.send_keys("+")
    assert max(numbers(ticks(loss, "x"))) <= 51 and svg.get_attribute("aria-valuetext") == "step 2, loss 1.98"
    svg.send_keys(Keys.ESCAPE)
    assert ticks(loss, "x") == before


@needs_chromium
def test_drag_zooms(browser: Any, tmp_path: Path) -> None:
    """Both axes show what was selected; a double click shows all again."""
    open_report(browser, tmp_path / "page.html", write_run(tmp_path / "a", log()))
    (loss,) = figures(browser, "Loss")
    before = ticks(loss, "x"), ticks(loss, "y")
    point_at(browser, loss, 0.25, press=True)
    point_at(browser, loss, 0.5).release().perform()
    x, y = numbers(ticks(loss, "x")), numbers(ticks(loss, "y"))
    assert len(x) > 1 and min(x) >= 25 and max(x) <= 52 and len(y) > 1 and min(y) > 1.45 and max(y) < 1.8
    assert loss.find_element(By.CLASS_NAME, "reset").is_displayed()
    ActionChains(browser).double_click(loss.find_element(By.CSS_SELECTOR, ".chart > svg")).perform()
    assert (ticks(loss, "x"), ticks(loss, "y")) == before


@needs_chromium
def test_a_run_can_be_hidden(browser: Any, tmp_path: Path) -> None:
    """In one chart by its legend, in all by its box; the axes fit what is left."""
    high = [entry | {"loss": 50 + entry["loss"]} for entry in log()]
    runs = [write_run(tmp_path / "a", log()), write_run(tmp_path / "b", high)]
    open_report(browser, tmp_path / "page.html", *runs)
    (loss,) = figures(browser, "Loss")
    assert max(numbers(ticks(loss, "y"))) >= 40 and len(loss.find_elements(By.CSS_SELECTOR, "path.line")) == 2
    key = loss.find_elements(By.CLASS_NAME, "key")[1]
    key.click()
    assert max(numbers(ticks(loss, "y"))) <= 2 and len(loss.find_elements(By.CSS_SELECTOR, "path.line")) == 1
    assert key.get_attribute("aria-pressed") == "false" and values(loss) == {"a": "1", "b": ""}
    key.click()
    browser.find_elements(By.CSS_SELECTOR, "#runs input")[0].click()
    assert values(loss) == {"b": "51"} and min(numbers(ticks(loss, "y"))) >= 50
    assert [*values(figures(browser, "Entropy per token")[0])] == ["b: student"]


@needs_chromium
def test_single_values_follow_their_runs(browser: Any, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [*log(), {"step": 9, "x": 4.5}]) for name in "ab"]
    runs.append(write_run(tmp_path / "c", [*log(), {"step": 9, "y": 2.5}]))
    open_report(browser, tmp_path / "page.html", *runs)
    (both,), (one,) = figures(browser, "x"), figures(browser, "y")
    first, _, last = browser.find_elements(By.CSS_SELECTOR, "#runs input")
    first.click()
    last.click()
    assert "a" not in both.find_element(By.TAG_NAME, "dl").text.split() and "4.5" in both.text
    assert not one.is_displayed()
    first.click()
    last.click()
    assert both.text.count("4.5") == 2 and one.is_displayed() and "2.5" in one.text


@needs_chromium
def test_percentages_end_at_100(browser: Any, tmp_path: Path) -> None:
    entries = [entry | {"completions/eos_share": entry["step"] / 100} for entry in log()]
    open_report(browser, tmp_path / "page.html", write_run(tmp_path / "a", entries))
    (ended,) = figures(browser, "Completions that end with a stop token")
    svg = ended.find_element(By.CSS_SELECTOR, ".chart > svg")
    top = min(float(line.get_attribute("y1")) for line in svg.find_elements(By.CSS_SELECTOR, "line.grid"))
    assert max(numbers(ticks(ended, "y"))) == 100 and top == 8  # the upper edge
    assert browser.find_element(By.TAG_NAME, "h1").text == "tsdkd report: a"


@needs_chromium
def test_losses_share_an_axis_only_if_they_are_the_same_function(browser: Any, tmp_path: Path) -> None:
    entries = log(eval_accuracy=0.5, **{"loss/direct": 1.0, "grad_norm": 1.0, "learning_rate": 1e-6})
    runs = [
        write_run(tmp_path / "a", entries),
        write_run(tmp_path / "b", entries, seed=1, learning_rate=1e-3),
        write_run(tmp_path / "c", entries, method="eopd"),
        write_run(tmp_path / "d", entries, alpha=0.5),
    ]
    open_report(browser, tmp_path / "page.html", *runs)
    for title in ("Loss", "loss/direct", "Gradient norm"):
        assert [[*values(figure)] for figure in figures(browser, title)] == [["a", "b"], ["c"], ["d"]], title
    assert "tsd-kd: a, b" in figures(browser, "Loss")[0].text and "eopd: c" in figures(browser, "Loss")[1].text
    for title in ("Held-out accuracy", "Learning rate"):
        assert [[*values(figure)] for figure in figures(browser, title)] == [["a", "b", "c", "d"]], title
    assert [[*values(f)] for f in figures(browser, "Entropy per token")] == [[f"{name}: student" for name in "abcd"]]


@needs_chromium
def test_the_main_charts_come_first(browser: Any, tmp_path: Path) -> None:
    entries = log(**{"completions/mean_length": 9.0, "completions/eos_share": 0.5, "policy/ratio": 1.0, "mine": 3.0})
    assert main(["report", str(write_run(tmp_path / "a", entries)), "--output_file", str(tmp_path / "page.html")]) == 0
    opened(browser, tmp_path / "page.html")
    titles = [title.text for title in browser.find_elements(By.CSS_SELECTOR, "#curves figcaption b")]
    visible = [title for title in titles if title]
    assert visible == ["Loss", "Entropy per token", "Completion length", "Completions that end with a stop token"]
    folded = browser.find_elements(By.CSS_SELECTOR, "details.group > summary")
    assert [title.text for title in folded] == ["Optimization (1)", "Other metrics (1)"]
    folded[1].click()
    unfold(browser)
    assert values(figures(browser, "mine")[0]) == {"mine": "3"}


@needs_chromium
def test_gradient_norms_of_all_terms_in_one_chart(browser: Any, tmp_path: Path) -> None:
    """Each factor of ten takes the same height; norms that were logged once are numbers."""
    often = log()
    for entry in often[::25]:
        entry |= {"grad_norm/direct": 1.0, "grad_norm/indirect": 0.01, "grad_norm/entropy": 1e-4}
    once = log()
    once[0] |= {"grad_norm/reverse_kl": 0.25, "grad_norm/forward_kl": 4.0}
    runs = [write_run(tmp_path / "a", often), write_run(tmp_path / "b", once, method="eopd")]
    open_report(browser, tmp_path / "page.html", *runs)
    first, second = figures(browser, "Gradient norm of each loss term")
    assert values(first) == {"direct": "1", "indirect": "0.01", "entropy": "1e-4"}
    heights = [e.rect["y"] for e in first.find_elements(By.CSS_SELECTOR, "path.line")]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=1.0) and heights[1] > heights[0]
    assert second.find_elements(By.TAG_NAME, "svg") == []
    assert "reverse_kl\n0.25 at step 1" in second.text and "forward_kl\n4 at step 1" in second.text


@needs_chromium
def test_seconds_per_step(browser: Any, tmp_path: Path) -> None:
    times = {"time/rollout_seconds": 12.0, "time/teacher_seconds": 3.0, "time/student_seconds": 5.5}
    open_report(browser, tmp_path / "page.html", write_run(tmp_path / "a", log(**times)))
    (chart,) = figures(browser, "Seconds per step")
    assert values(chart) == {"rollout": "12", "teacher": "3", "student": "5.5"}


@needs_chromium
def test_numbers_on_axes_are_whole(browser: Any, tmp_path: Path) -> None:
    """No offset and no factor beside an axis, in charts and in the papers' figures."""
    entries = [
        {
            "step": i,
            "loss": 8.574e-4 + 1e-9 * i,
            "learning_rate": 5e-6 * i / 100,
            "eval_loss": 1e9 + i,
            "mine": -1e-7 * i,
        }
        for i in range(101)
    ]
    folder = write_run(tmp_path / "a", entries)
    for step in (0, 1):
        columns = made_up(20, seed=step)
        columns["forward_kl"] = 8.574e-4 + 1e-8 * torch.rand(20, dtype=torch.float64)
        samples = [RecordedCompletion(0, [1], list(range(20)))]
        write_token_records(folder, step, samples, columns, lambda ids: "".join(f" w{i}" for i in ids))
    open_report(browser, tmp_path / "page.html", folder)
    assert {"0", "2e-6", "4e-6"} == {*ticks(figures(browser, "Learning rate")[0], "y")}
    for figure in browser.find_elements(By.CSS_SELECTOR, "#curves figure"):
        found = ticks(figure, "y")
        assert len(found) >= 2 and len(set(numbers(found))) == len(found)
        assert all(re.fullmatch(r"-?[\d,]+(\.\d+)?(e-?\d+)?", text) for text in found), found
    axes = [text.text for text in browser.find_elements(By.CSS_SELECTOR, "#analyses svg text")]
    assert "≥ 4" in axes and not [text for text in axes if re.search(r"^\W?1e|\d\+\d", text)]


def test_the_last_bin_of_entropies_has_all_above(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", log())
    columns = made_up(20)
    columns["student_entropy"][:3] = torch.tensor([4.0, 5.0, 11.0])
    columns["student_entropy"][3] = 3.95
    samples = [RecordedCompletion(0, [1], list(range(20)))]
    write_token_records(folder, 0, samples, columns, lambda ids: "".join(f" w{i}" for i in ids))
    assert main(["analyze", str(folder), "--output_dir", str(tmp_path / "figures")]) == 0
    shares = json.loads((tmp_path / "figures/analysis.json").read_text())["entropy_histogram"]["a"]["student"]["share"]
    assert shares[-2:] == pytest.approx([1 / 20, 3 / 20]) and sum(shares) == pytest.approx(1)


@needs_chromium
def test_a_peak_is_drawn_whatever_the_length(browser: Any, tmp_path: Path) -> None:
    """One step in 20,000; and what isn't finite is a gap."""
    entries = log(1e-5, count=20_000)
    entries[12_345]["loss"] = 77.0
    entries[5_000]["loss"] = math.nan
    open_report(browser, tmp_path / "page.html", write_run(tmp_path / "a", entries))
    (loss,) = figures(browser, "Loss")
    assert max(numbers(ticks(loss, "y"))) >= 60
    path = loss.find_element(By.CSS_SELECTOR, "path.line").get_attribute("d")
    assert path.count("M") == 2 and path.count("L") <= 400
    assert "not finite at step 5001" in shown(browser, "summary") and browser.get_log("browser") == []


def test_a_peak_beside_a_value_that_is_not_finite(tmp_path: Path) -> None:
    for odd in (math.nan, math.inf):
        entries = log(1e-5, count=20_000)
        entries[12_344]["loss"], entries[12_345]["loss"], entries[12_346]["loss"] = 77.0, odd, -77.0
        page = render_page([load_run("a", write_run(tmp_path / str(odd), entries))], [])
        data = json.loads(re.search(r'id="chart-data">(.*?)</script>', page)[1])  # type: ignore[index]
        (line,) = next(chart for chart in data["charts"] if chart["title"] == "Loss")["lines"]
        assert len(line["x"]) <= 400 and line["x"] == sorted(line["x"])
        assert {77.0, None, -77.0} <= set(line["y"])


def summary(browser: Any, output: Path, *folders: Path) -> str:
    return shown(open_report(browser, output, *folders), "summary")


@needs_chromium
def test_before_training_is_step_0(browser: Any, tmp_path: Path) -> None:
    def evaluated(*points: tuple[int, float]) -> Entries:
        return log() + [{"step": step, "eval_accuracy": value} for step, value in points]

    text = summary(browser, tmp_path / "1.html", write_run(tmp_path / "a", evaluated((0, 0.25), (100, 0.75))))
    assert "25.0 % → 75.0 %\nbefore training (step 0) → step 100 (+50.0 points)" in text
    text = summary(browser, tmp_path / "2.html", write_run(tmp_path / "b", evaluated((30, 0.5), (100, 0.75))))
    assert "50.0 % → 75.0 %\nstep 30 → step 100 (+25.0 points)" in text
    assert "first measured at step 30, not before training" in text
    text = summary(browser, tmp_path / "3.html", write_run(tmp_path / "c", evaluated((30, 0.5), (100, 0.25))))
    assert "did not improve from step 30 to step 100" in text
    text = summary(browser, tmp_path / "4.html", write_run(tmp_path / "d", evaluated((100, 0.25))))
    assert "25.0 %\nstep 100" in text and "→ step 100 (" not in text


@needs_chromium
def test_several_completions_have_a_chart_and_count_for_the_summary(browser: Any, tmp_path: Path) -> None:
    entries = log()
    for step, scores in ((0, (0.5, 0.25, 0.75)), (100, (0.25, 0.5, 1.0))):
        names = ("eval_accuracy", "eval_avg@8", "eval_pass@8")
        entries.append({"step": step, **dict(zip(names, scores, strict=True))})
    text = summary(browser, tmp_path / "page.html", write_run(tmp_path / "a", entries))
    assert "25.0 % → 50.0 %\nbefore training (step 0) → step 100 (+25.0 points)" in text
    (figure,) = figures(browser, "Held-out accuracy of several completions")
    assert [*values(figure)] == ["avg@8", "pass@8"]


@needs_chromium
def test_the_summary_of_a_run_with_evaluations(browser: Any, tmp_path: Path) -> None:
    """Who is who follows from the models' paths, not from the names that they have in the evaluation."""
    pair = {"model_name_or_path": "org/student", "teacher_model_name_or_path": "org/teacher"}
    entries = [*log(), {"step": 100, "train_runtime": 3723.0}]
    folder = write_run(tmp_path / "a", entries, **pair)
    greedy, sampled = SUITES["demo"].benchmarks
    results = []
    for name, right in (("x", 1), ("y", 3), ("z", 4), ("other", 2)):
        results.append(BenchmarkResult(name, greedy, (np.arange(4)[:, None] < right) * 1.0))
        results.append(BenchmarkResult(name, sampled, (np.arange(4)[:, None] + np.arange(8) < right) * 1.0))
    models = {"x": "org/student", "y": str(folder), "z": "org/teacher", "other": "org/other"}
    write_results(results, models, "x", folder / "eval", "demo")
    text = summary(browser, tmp_path / "page.html", folder)
    for part in ("Method tsd-kd", "Student org/student", "Teacher org/teacher", "Steps 100 of 100", "Time 1:02:03"):
        assert part.split()[-1] in text, part
    assert "demo, greedy\n25.0 % → 75.0 %\nbefore training → after training (+50.0 points)" in text
    assert "Loss\n1.99 → 1\nstep 1 → step 100" in text
    rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, ".scores tr")]
    assert rows == [
        "Solved, % before after teacher",
        "demo, greedy 25.0 75.0 100.0",
        "demo, avg@8 3.1 18.8 31.2",
        "demo, pass@8 25.0 75.0 100.0",
    ]


@pytest.mark.parametrize("name", ["a" * 5000, "</script>", "漢字/[a]"])
def test_names_of_models_may_be_anything(name: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", log(), model_name_or_path=name, teacher_model_name_or_path=name)
    (folder / "eval").mkdir()
    entry = {"model": "y", "benchmark": "demo", "metric": "accuracy", "mean": 50.0}
    models = {"x": name, "y": str(folder), "z": "a\0b", "\udcff": "\udcff"}
    content = {"models": models, "results": [entry, entry | {"model": "x", "mean": 40.0}]}
    (folder / "eval/results-demo.json").write_text(json.dumps(content))
    (folder / "eval/results-demo.md").write_text("")
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8", errors="replace")
    assert "Left out" not in page and "<td>50.0</td>" in page and page.count("</script>") == 3
