"""`tsdkd report` in a real browser: what it shows, how it is operated, what hostile completions can't do."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

import chromium
from chromium import needs_chromium, opened, shown, unfold
from conftest import QUIET, flags
from tsdkd.cli import main
from tsdkd.evaluation.results import BenchmarkResult
from tsdkd.evaluation.results import write_results as write_table
from tsdkd.evaluation.suites import select_benchmarks
from tsdkd.trainer.token_records import MASS_TOP_K, RecordedCompletion, write_token_records

browser = chromium.browser
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"


@pytest.fixture(scope="module")
def run(saved_model: Any, rows_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "a run"
    values = {
        **QUIET,
        "model_name_or_path": saved_model("qwen3", 0),
        "teacher_model_name_or_path": saved_model("llama", 1),
    }
    values |= {"dataset_name": rows_file, "max_steps": 8, "max_new_tokens": 10, "per_device_train_batch_size": 4}
    values |= {"record_steps": 4, "record_completions": 3, "logging_steps": 1, "report_to": "none"}
    assert main(["train", *flags(**values, output_dir=folder)]) == 0
    (benchmark,) = select_benchmarks("demo", ["demo"])
    right = np.arange(8) < np.arange(30)[:, None] % 4
    measured = [BenchmarkResult("before", benchmark, right * 1.0), BenchmarkResult("after", benchmark, ~right * 1.0)]
    write_table(measured, {"before": "student", "after": str(folder)}, "before", folder / "eval", "demo")
    assert main(["report", str(folder)]) == 0
    return folder


def tokens(browser: Any) -> list[Any]:
    return browser.find_elements(By.CSS_SELECTOR, "#text span")


@needs_chromium
def test_a_run_is_shown(run: Path, browser: Any) -> None:
    """All parts, no errors, nothing loaded."""
    opened(browser, run / "report.html")
    assert browser.title == "tsdkd report: a run"
    assert "Finished: 8 steps" in shown(browser, "summary")
    assert "demo: 82.1 % (avg@8), against before +64.2 [" in shown(browser, "summary")
    assert "+64.2 [" in shown(browser, "evaluation")
    unfold(browser)
    charts = browser.find_elements(By.CSS_SELECTOR, ".chart > svg")
    assert len(charts) >= 8 and all(chart.rect["width"] > 100 for chart in charts)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#analyses svg")) == 9
    assert len(tokens(browser)) > 1
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in loaded if not name.startswith(("data:", "blob:"))] == []
    assert browser.get_log("browser") == []


@needs_chromium
def test_tokens_by_keyboard(run: Path, browser: Any) -> None:
    opened(browser, run / "report.html")
    first = tokens(browser)[0]
    browser.execute_script("arguments[0].focus()", first)
    assert shown(browser, "details").startswith("Token 1 of")
    first.send_keys(Keys.ARROW_RIGHT)
    assert shown(browser, "details").startswith("Token 2 of")
    browser.switch_to.active_element.send_keys(Keys.END)
    count = len(tokens(browser))
    assert shown(browser, "details").startswith(f"Token {count} of {count}")
    browser.switch_to.active_element.send_keys(Keys.PAGE_DOWN)
    WebDriverWait(browser, 5).until(lambda b: shown(b, "place") == "2 of 3")
    assert browser.switch_to.active_element.get_attribute("role") == "option"
    browser.find_element(By.ID, "step").send_keys(Keys.ARROW_RIGHT)
    WebDriverWait(browser, 5).until(lambda b: shown(b, "at") == "4")


@needs_chromium
def test_numbers_are_the_records(run: Path, browser: Any) -> None:
    """What stands beside a token, and how it is coloured."""
    from tsdkd.analysis.load import read_records

    opened(browser, run / "report.html")
    record = read_records(run)[0]
    for name, title in [("student_entropy", "Student's entropy"), ("gate", "Gate"), ("kendall_tau", "Agreement")]:
        values = getattr(record, name) if hasattr(record, name) else record.columns[name]
        line = next(text for text in shown(browser, "details").splitlines() if text.startswith(title))
        assert float(line.rpartition(":")[2]) == pytest.approx(values[0], abs=2e-3)
    rows = browser.find_elements(By.CSS_SELECTOR, "#details tr")
    assert len(rows) == 11
    orders = [int(row.text.split()[-1].strip(".")) for row in rows[1:]]
    theirs = record.columns["candidate_teacher_logps"][0]
    assert orders == [1 + int((theirs > value).sum()) for value in theirs]
    for row, share in zip(rows[1:], 100 * np.exp(record.columns["candidate_logps"][0]), strict=True):
        found = row.text.split(" %")[0].split()
        assert float(found[-1]) == pytest.approx(share, abs=0.1) and ("<" in found) == (share < 0.05)

    Select(browser.find_element(By.ID, "metric")).select_by_value("is_opener")
    own = record.columns["sample"] == 0
    inside = record.is_opener[own].tolist()
    colours = [token.value_of_css_property("background-color") for token in tokens(browser)]
    assert len(set(colours)) == len(set(inside))
    assert [colour == colours[0] for colour in colours] == [flag == inside[0] for flag in inside]


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_legible(dark: bool, width: int, run: Path, browser: Any) -> None:
    """Text against its background by WCAG's 4.5, whatever a token's colour; nothing wider than a phone."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    opened(browser, run / "report.html")
    wide = """
        const outside = (e) => e.getBoundingClientRect().right > innerWidth + 1
          && !e.closest("#details, pre, .wide, .skip, figure");
        return [...document.querySelectorAll("body *")].filter(outside).map((e) => e.outerHTML.slice(0, 80))"""
    assert browser.execute_script(wide) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    worst = browser.execute_script(
        """
        const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const bright = (colour) => {
          canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
          const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
            .map((x) => x / 255).map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const root = getComputedStyle(document.documentElement);
        const text = bright(getComputedStyle(document.body).color);
        const backs = ["--low", "--scale", "--minus", "--page", "--pale"]
          .map((n) => bright(root.getPropertyValue(n).trim()));
        const onPage = (n) =>
          contrast(bright(root.getPropertyValue(n).trim()), bright(root.getPropertyValue("--page").trim()));
        const lines = [0, 1, 2, 3, 4, 5].map((i) => onPage(`--series-${i}`));
        const texts = ["--muted", "--good", "--warning", "--mark"].map(onPage);
        const height = (e) => e.getBoundingClientRect().height;
        const labels = [...document.querySelectorAll("#analyses svg text")].map(height);
        return [Math.min(...backs.map((b) => contrast(text, b)), ...texts), Math.min(...lines), Math.min(...labels)];
        """
    )
    unfold(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert worst[0] >= 4.5 and worst[1] >= 3.0 and worst[2] >= 8
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_chromium
def test_completions_are_text(run: Path, browser: Any, tmp_path: Path) -> None:
    """Also where names and settings come from somebody else."""
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(run, folder)
    for path in (folder / "records").glob("*"):
        path.unlink()
    state = json.loads((folder / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        entry |= {f"loss/</script>{HOSTILE}": 1.0, f"grad_norm/{HOSTILE}": 1.0, "entropy/'\"&lt;\u2028": 1.0}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    columns = made_up(20)
    write_token_records(
        folder, 3, [RecordedCompletion(0, [1, 2], list(range(20)))], columns, lambda ids: HOSTILE * len(ids)
    )
    assert main(["report", str(folder), "--output_file", str(tmp_path / "page.html")]) == 0
    opened(browser, tmp_path / "page.html")
    assert "taken" not in browser.title and not browser.find_elements(By.CSS_SELECTOR, "img")
    assert tokens(browser)[0].text == HOSTILE
    unfold(browser)
    assert HOSTILE in shown(browser, "curves") and "taken" not in browser.title
    assert browser.get_log("browser") == []


def test_a_long_run_is_small(run: Path, tmp_path: Path) -> None:
    """1,000 steps and 50 completions of 1,024 tokens with words of their own: at most 5 MB."""
    folder = tmp_path / "long"
    shutil.copytree(run, folder)
    for path in (folder / "records").glob("*"):
        path.unlink()
    state = json.loads((folder / "trainer_state.json").read_text())
    template = state["log_history"][0]
    state["log_history"] = [{**template, "step": step, "loss": float(np.sin(step))} for step in range(1, 1001)]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    for step in range(0, 1000, 20):
        samples = [RecordedCompletion(0, list(range(100)), list(range(1024)))]
        write_token_records(
            folder,
            step,
            samples,
            made_up(1024, seed=step, vocabulary=20_000),
            lambda ids: "".join(f" w{i}" for i in ids),
        )
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_size <= 5_000_000


def made_up(count: int, seed: int = 0, vocabulary: int = 50) -> dict[str, torch.Tensor]:
    """Columns of one completion."""
    make = torch.Generator().manual_seed(seed)
    names = ("student_entropy", "teacher_entropy", "student_logp", "teacher_logp", "divergence", "forward_kl")
    columns = {name: torch.rand(count, generator=make) for name in names}
    columns["token"] = torch.arange(count)
    columns["candidates"] = torch.randint(vocabulary, (count, 10), generator=make)
    columns["candidate_logps"] = torch.log_softmax(torch.randn(count, 10, generator=make) * 3, -1).sort(-1, True)[0]
    columns["candidate_teacher_logps"] = torch.log_softmax(torch.randn(count, 10, generator=make) * 3, -1)
    columns["teacher_mass"] = torch.rand(count, len(MASS_TOP_K), generator=make)
    return columns


@needs_chromium
def test_runs_beside_each_other(run: Path, browser: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "records")
    config = (other / "tsdkd_config.yaml").read_text().replace("beta: 0.9", "beta: 0.5")
    (other / "tsdkd_config.yaml").write_text(config)
    assert main(["report", str(run), str(other), "--output_file", str(tmp_path / "both.html")]) == 0
    opened(browser, tmp_path / "both.html")
    assert browser.title == "tsdkd report: a run and other"
    assert len(browser.find_elements(By.CSS_SELECTOR, "#summary h3")) == 2
    assert shown(browser, "configuration").splitlines()[:3] == ["Configuration", "option a run other", "beta 0.9 0.5"]
    assert "didn't record any" in shown(browser, "summary")


def test_what_is_damaged_is_left_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Records and evaluations, each with its reason; the rest is there."""
    folder = tmp_path / "out"
    shutil.copytree(run, folder)
    record = min((folder / "records").iterdir())
    record.write_bytes(record.read_bytes()[:-100])
    (folder / "eval/results-demo.json").write_text('{"results": [')
    assert main(["report", str(folder)]) == 0
    lines = capsys.readouterr().err.splitlines()
    page = (folder / "report.html").read_text()
    for name in (record.name, "results-demo.json"):
        assert any("left out" in line and name in line for line in lines) and name in page
    assert 'id="curves"' in page and 'id="tokens"' in page and 'id="evaluation"' not in page
    for path in (folder / "records").iterdir():
        path.write_text("no")
    assert main(["report", str(folder)]) == 0
    assert 'id="tokens"' not in (folder / "report.html").read_text()


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "isn't the directory of a run" in capsys.readouterr().err


def test_nothing_but_a_report_is_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = tmp_path / "model.safetensors"
    student.write_bytes(b"weights")
    assert main(["report", str(run), "--output_file", str(student)]) == 2
    assert "--output_file" in capsys.readouterr().err and student.read_bytes() == b"weights"
    assert main(["report", str(run), "--output_file", str(student / "page.html")]) == 2
    assert "--output_file" in capsys.readouterr().err
    for _ in range(2):
        assert main(["report", str(run), "--output_file", str(tmp_path / "page.html")]) == 0


def test_the_demo_ends_with_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its evaluation in it, and tokens."""
    monkeypatch.setattr("tsdkd.demo.run_demo.NUM_PROBLEMS", 8)
    assert main(["demo", "--max_steps", "1", "--output_dir", str(tmp_path / "run"), "--report_to", "none"]) == 0
    path = Path(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("report: "))
    page = path.read_text(encoding="utf-8")
    assert path.parent == tmp_path / "run" and "demo avg@8" in page and 'id="tokens"' in page
    results = json.loads((tmp_path / "run/eval/results-demo.json").read_text())["results"]
    assert {entry["model"] for entry in results} == {"before", "after", "teacher"}
