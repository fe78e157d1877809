"""README and docs: links lead somewhere, commands run, the reference is the code's."""

import importlib.metadata
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import on_cpus
from fast_set import EVERY_NTH, SLOW_FILES, SLOW_TESTS
from preloaded import python
from tsdkd.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAIR = ["--model_name_or_path", "tsdkd://demo/student", "--teacher_model_name_or_path", "tsdkd://demo/teacher"]
DEMO = [*PAIR, *["--dataset_name", "prompts.jsonl", "--use_cpu", "true", "--bf16", "false"]]
NOT_OURS = ("vllm", "git", "cd")  # programs whose commands aren't run here


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands() -> list[Any]:
    """Every command line of every page, once."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.setdefault(" ".join(words), pytest.param(words, id=f"{page.stem}: {' '.join(words)[:70]}"))
    return list(found.values())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the pages speak of."""
    place = tmp_path_factory.mktemp("docs")
    shutil.copy(ROOT / "src/tsdkd/configs/demo.yaml", place / "my.yaml")
    texts = [f"{n},7 x+5 y~3 x#4 y-2 x+9 y#0 y+1 x~4 -> y+3" for n in range(2)]
    rows = [{"prompt": text, "instruction": text, "completion": "y-2 0,5", "response": "y-2 0,5"} for text in texts]
    for name in ("prompts.jsonl", "teacher.jsonl"):
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shutil.copy(ROOT / "src/tsdkd/demo/test.jsonl", place / "mine.jsonl")
    comparison = {"config": "demo.yaml", "output_dir": "runs/mine", "runs": {"one": {}, "two": {"beta": 0.9}}}
    (place / "mine.yaml").write_text(json.dumps(comparison), encoding="utf-8")
    options = "--max_steps 1 --record_steps 1 --max_new_tokens 8 --per_device_train_batch_size 2 --report_to none"
    command = ["train", "--config", "demo.yaml", *options.split(), "--dataset_name", str(place / "prompts.jsonl")]
    assert main([*command, "--output_dir", str(place / "runs/demo")]) == 0
    for name in ("student", "gkd"):
        shutil.copytree(place / "runs/demo", place / "runs" / name)
    (place / "uncertain_kl.py").write_text(recipe(), encoding="utf-8")
    return place


def recipe() -> str:
    """The guide's file of a method."""
    (text,) = (block for block in blocks(ROOT / "docs/guide.md", "python") if "objective_class" in block)
    return text


def ours(words: list[str]) -> list[str] | None:
    """The arguments of tsdkd: its own command, or one that some launcher starts."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    words = words[: words.index("&&")] if "&&" in words else words
    words = words[: words.index(">")] if ">" in words else words
    if words[0] == "accelerate":
        return words[words.index("tsdkd") + 1 :]
    return words[1:] if words[0] == "tsdkd" else None


def small(words: list[str], folder: Path) -> list[str]:
    """The same command on the demo's models, without the part that takes minutes."""
    command, rest = words[0], words[1:]
    if command == "train":
        engine = [] if "--use_vllm" in rest else ["--use_vllm", "false"]  # of the presets; it may not be installed
        return ["train", *rest, *DEMO, *engine, "--output_dir", str(folder), "--dry_run"]
    if command == "demo":
        return ["train", "--config", "demo.yaml", *rest, "--output_dir", str(folder), "--dry_run"]
    if command in ("plan", "slurm"):
        return [command, *rest, *DEMO]
    if command == "serve":
        return [*words, *DEMO, "--output_dir", str(folder), "--dry_run"]
    if command == "generate":
        return ["generate", *rest, *PAIR, "--dataset_name", "prompts.jsonl", "--output_file", str(folder)]
    if command == "compare" and "--output_file" in rest:
        return ["compare", *rest, "--output_file", str(folder)]
    if command == "compare" and not {"--list", "--slurm", "--report"} & set(rest):
        return ["compare", *rest, "--report"]
    if command == "analyze" and "--config" in rest:
        return ["analyze", *rest, "--limit", "2"]
    if command == "eval" and "mine.jsonl" in rest:
        return ["eval", *rest, "--limit", "2", "--samples", "2", "--output_dir", str(folder)]
    if command == "eval":
        text = re.sub(r"Qwen/[\w.-]+", "tsdkd://demo/student", " ".join(rest))
        text = re.sub(r"--(suite|benchmarks|backend|samples|data_dir) \S+|--allow_code_execution", "", text)
        command = f"eval {text} --suite demo --limit 2 --samples 2 --output_dir {folder}"
        return command.split()
    return words


@pytest.mark.parametrize("words", commands())
def test_commands_run(words: list[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    if words[:2] == ["pip", "install"]:
        named = [extra for extras in re.findall(r"\.\[([\w,-]+)\]", " ".join(words)) for extra in extras.split(",")]
        assert set(named) <= set(importlib.metadata.metadata("tsdkd").get_all("Provides-Extra"))
        assert not any(word.startswith("tsdkd") for word in words)  # it is on no index
    elif words[0].startswith("scripts/"):
        assert os.access(ROOT / words[0], os.X_OK)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif (own := ours(words)) is not None:
        assert main(small(own, tmp_path / "out")) == 0
    else:
        program = next(word for word in words if "=" not in word)
        assert program in NOT_OURS


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the demo's models in place of the hub's, and on what the text around speaks of."""
    monkeypatch.chdir(place)
    demo = ROOT / "src/tsdkd/demo"
    student, teacher = (AutoModelForCausalLM.from_pretrained(demo / name) for name in ("student", "teacher"))
    ids = torch.arange(6).unsqueeze(0)
    known = {"student": student, "teacher": teacher, "hidden": student.model(ids).last_hidden_state[0]}
    known["teacher_hidden"] = teacher.model(ids).last_hidden_state[0]
    for block in blocks(page, "python"):
        block = block.replace('"Qwen/Qwen2.5-1.5B-Instruct"', repr(str(demo / "student")))
        block = block.replace('"Qwen/Qwen2.5-14B-Instruct"', repr(str(demo / "teacher")))
        exec(
            block.replace("args=TSDKDConfig(", "args=TSDKDConfig(use_cpu=True, bf16=False, max_steps=1, "), dict(known)
        )


@pytest.mark.parametrize("processes", [1, 2])
def test_the_recipe_of_a_method_is_one_file(processes: int, place: Path, tmp_path: Path) -> None:
    """By the program itself, which doesn't have the current directory on its path as `python -m` does."""
    program = [
        python(),
        "-c",
        "import sys; sys.path.remove(''); from tsdkd.__main__ import run; sys.exit(run())",
    ]
    options = ["--teacher_threshold", "0", "--max_steps", "1", "--max_new_tokens", "4", "--logging_steps", "1"]
    options += ["--num_processes", str(processes), "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    command = [*program, "train", "--method", "uncertain_kl:UncertainKLTrainer", *DEMO, *options]
    result = subprocess.run(command, cwd=place, env=on_cpus(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (log,) = (
        row for row in json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"] if "loss" in row
    )
    assert log["loss"] == pytest.approx(log["loss/forward_kl"]) and log["loss"] > 0
    assert "uncertain-kl" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files are there, and headings in them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_the_site_is_built(tmp_path: Path) -> None:
    """Every page is in it, and mkdocs finds nothing to warn of."""
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "entropy_threshold" in (tmp_path / "configuration/index.html").read_text(encoding="utf-8")


def test_the_reference_is_the_dataclasses() -> None:
    """`python scripts/dev/configuration_reference.py > docs/configuration.md` writes it anew."""
    command = [python(), ROOT / "scripts/dev/configuration_reference.py"]
    written = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == written


def names(page: Path) -> set[str]:
    """Names of ours: `tsdkd.losses.jsd` in any page, `losses.jsd` in those that leave the package out.

    `completions` is what an objective gets, no module."""
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(r"\btsdkd((?:\.[A-Za-z_]\w*)+)", text))
    if page.name in ("from-paper-to-code.md", "methods.md"):
        prose = FENCE.sub("", text)
        found |= {
            f".{name}" for name in re.findall(r"`(?!tsdkd\.|completions\.)([a-z_]\w*(?:\.[A-Za-z_]\w*)+)`", prose)
        }
    files = (".yaml", ".py", ".md", ".png", ".html", ".jsonl")
    return {name for name in found if not name.endswith(files)}


@pytest.mark.parametrize("page", [page for page in PAGES if names(page)], ids=lambda page: page.name)
def test_every_name_of_ours_exists(page: Path) -> None:
    for name in names(page):
        pkgutil.resolve_name(f"tsdkd{name}")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_file_of_ours_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w/.-])(?:src|scripts|tests|benchmarks|docs)/[\w./-]*\w", text):
        assert (ROOT / name).exists(), name


def test_every_configuration_that_is_named_exists() -> None:
    """Each `.yaml` that the page from paper to code names is a shipped configuration."""
    text = (ROOT / "docs/from-paper-to-code.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<!/)\b(\w+\.yaml)\b", text)) - {"published.yaml"}
    assert len(named) > 20
    configs = ROOT / "src/tsdkd/configs"
    assert not {name for name in named if not (configs / name).exists() and not (configs / "compare" / name).exists()}
    assert all((ROOT / path).is_file() for path in re.findall(r"configs/compare/\w+\.yaml", text))


def test_every_test_that_is_named_exists() -> None:
    named: set[tuple[str, ...]] = set()
    for page, least in (("from-paper-to-code.md", 30), ("fidelity.md", 20)):
        found = set(re.findall(r"(test_\w+\.py)::(test_\w+)", (ROOT / "docs" / page).read_text(encoding="utf-8")))
        assert len(found) > least, page
        named |= found
    named |= {tuple(test.split("::")) for test in SLOW_TESTS | EVERY_NTH.keys()}
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"
    assert all((ROOT / "tests" / file).is_file() for file in SLOW_FILES)
