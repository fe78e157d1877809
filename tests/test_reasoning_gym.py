"""`dataset_name: reasoning_gym:TASK`: generated problems, graded by their verifiers, wherever data is named."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conftest import QUIET, SPECIAL, TEMPLATE, build_model, flags
from preloaded import python
from tsdkd import TSDKDConfig, TSDKDTrainer
from tsdkd.cli import main
from tsdkd.data import load_split
from tsdkd.data.reasoning_gym import GRADER, is_correct
from tsdkd.data.reasoning_task import UNSUPPORTED
from tsdkd.grading import extract_final_answer

pytest.importorskip("reasoning_gym")
from reasoning_gym.factory import DATASETS

EASY = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"
FEW = "reasoning_gym:tower_of_hanoi?min_disks=3&max_disks=3&min_pegs=3&max_pegs=3"  # six prompts
TASKS = ("chain_sum", "gsm_symbolic", "countdown", "caesar_cipher")
RUNS_PYTHON = ("binary_matrix", "countdown", "n_queens", "spiral_matrix", "string_insertion")


def problems(task: str, split: str = "test", size: int = 12) -> Dataset:
    name = f"reasoning_gym:{task}{'&' if '?' in task else '?'}test_size={size}"
    return load_split(f"{name}&size={size}", None, split)


def own_answers(rows: Dataset) -> list[Any]:
    return [json.loads(answer)["answer"] for answer in rows["answer"]]


# the problems


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_prompt_whatever_their_seeds(task: str) -> None:
    splits = {
        (seed, split): problems(f"{task}?seed={seed}", split, 10)["prompt"]
        for seed in (1, 2)
        for split in ("train", "validation", "test")
    }
    for prompts in splits.values():
        assert len(set(prompts)) == len(prompts) == 10
    for (_, one), some in splits.items():
        for (_, other), more in splits.items():
            assert one == other or not set(some) & set(more)
    assert set(splits[1, "train"]) != set(splits[2, "train"])


def test_the_default_sizes_and_seed() -> None:
    rows = load_split("reasoning_gym:chain_sum", None, "train")
    assert len(rows) == 1000 and len(load_split("reasoning_gym:chain_sum", None, "test")) == 200
    assert rows["prompt"][:12] == problems("chain_sum?seed=42", "train")["prompt"]
    assert rows.column_names == ["prompt", "answer"]


def test_fewer_problems_than_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """Two digits and an operator: of these 200 problems, an eighth or so are for tests."""
    rows = problems(EASY.partition(":")[2], size=500)
    assert 10 < len(set(rows["prompt"])) == len(rows) < 50
    assert f"has only {len(rows)} different problems for the split test, not 500" in caplog.text


def test_options_are_the_tasks_own() -> None:
    for prompt in problems("chain_sum?min_terms=3&max_terms=3&allow_negation=true", size=5)["prompt"]:
        assert len([word for word in prompt.split(": ")[1].split() if word.lstrip("-").isdigit()]) == 3
    styles = problems("basic_arithmetic?operators=%2B,-&min_terms=2&format_style=simple", size=20)["prompt"]
    assert not any("*" in text or "/" in text for text in styles) and any("+" in text for text in styles)
    names = [f"complex_arithmetic?operations_weights=0.5{comma}0.5{comma}0{comma}0" for comma in (",", "%2C")]
    assert problems(names[0], size=5)["prompt"] == problems(names[1], size=5)["prompt"]


SHOW = """
import hashlib, sys
from tsdkd.data import load_split
for task in sys.argv[1:]:
    for split in ("train", "test"):
        rows = load_split(f"reasoning_gym:{task}?size=10&test_size=10", None, split)
        print(task, split, hashlib.sha256(repr(rows[:]).encode()).hexdigest())
"""


def test_problems_depend_on_the_seed_alone() -> None:
    """Not on the hashes of strings, which differ from process to process, nor on the global random states."""
    tasks = [*TASKS, "list_functions", "pool_matrix", "syllogism"]
    program = [sys.executable, "-c", SHOW, *tasks]
    shown = [
        subprocess.run(program, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True)
        for seed in ("1", "2")
    ]
    assert shown[0].stdout == shown[1].stdout and len(shown[0].stdout.splitlines()) == 2 * len(tasks)


def test_the_global_random_states_are_left_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    rows = problems("pool_matrix?seed=5", size=3)
    assert is_correct(f"<answer>{own_answers(rows)[0]}</answer>", rows["answer"][0])
    assert (random.random(), np.random.random()) == expected


@pytest.mark.parametrize("task", sorted(DATASETS))
def test_every_task_is_graded_or_refused(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a task prints while it generates or grades isn't shown."""
    if task in UNSUPPORTED:
        assert (
            main(["train", *flags(dataset_name=f"reasoning_gym:{task}", **RUN), f"--output_dir={tmp_path}/out"]) == 2
        )
        assert f"dataset_name: reasoning_gym:{task} can't be used: {UNSUPPORTED[task]}" in capsys.readouterr().err
        return
    rows = problems(task, size=2)
    for own, answer in zip(own_answers(rows), rows["answer"], strict=True):
        for text in ("", "<answer></answer>", "<answer>nothing [{ of the kind</answer>"):
            assert not is_correct(text, answer)
        assert own is None or is_correct(f"I think.\n<answer> {own} </answer>", answer)
    assert capsys.readouterr().out == ""


# the verifier


@pytest.mark.parametrize(
    ("completion", "expected", "found"),
    [
        ("<answer>3</answer>, no: <answer>\n 4 </answer> \\boxed{5}", "4", "4"),
        ("so \\boxed{\\frac{1}{2}} #### 7", "1/2", "\\frac{1}{2}"),
        ("2 + 2 = 4\n#### 4\nor 5", "4", "4"),
        ("#### $1,234", "1234", "1234"),
        ("I add 3 and 4,\nso it is 7.", "8", "7"),
        ("It is 1,234.50 in all.", "1234.5", "1234.50"),
        ("No number", "8", "No number"),
        ("First this.\n\n  HELLO WORLD \n", "HELLO", "HELLO WORLD"),
        ("The grid:\n1 2\n3 4\n", "1 2\n3 5", "1 2\n3 4"),
        ("It is 3 + 4", None, "It is 3 + 4"),
        ("", "8", ""),
    ],
)
def test_the_part_of_a_completion_that_is_graded(completion: str, expected: str | None, found: str) -> None:
    assert extract_final_answer(completion, expected) == found


@pytest.mark.parametrize("task", TASKS)
def test_right_and_wrong_completions(task: str) -> None:
    rows = problems(task)
    for own, answer in zip(own_answers(rows), rows["answer"], strict=True):
        for text in ("<answer>{}</answer>", "Well:\n\\boxed{{{}}}", "Hm.\n#### {}", "It is\n{}"):
            assert is_correct(text.format(own), answer)
            assert not is_correct(text.format(f"{own}1"), answer)
        assert not is_correct("", answer)


def test_other_right_answers_count_too() -> None:
    rows = problems("countdown")
    for own, answer in zip(own_answers(rows), rows["answer"], strict=True):
        assert is_correct(f"<answer>0 + ({own}) * 1</answer>", answer) is False  # other numbers
        assert is_correct(f"<answer>(({own}))</answer>", answer)


def test_worked_solutions_are_completions_that_are_right() -> None:
    rows = load_split("reasoning_gym:gsm_symbolic?size=50", None, "train")
    assert rows.column_names == ["prompt", "answer", "completion"]
    for row in rows:
        assert "####" in row["completion"] and is_correct(row["completion"], row["answer"])


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("boxnet", "null"),
        ("boxnet", "[null]"),
        ("coin_flip", "1e400"),
        ("coin_flip", "1e999999999"),
        ("countdown", "9**9**9**9"),
        ("countdown", "(" * 900),
        ("countdown", "1/0"),
        ("game_of_life", '[{"a": 1}]'),
        ("prime_factorization", "9" * 5000),
        ("prime_factorization", "9" * 1900),
        ("propositional_logic", "¬" * 1900),
        ("propositional_logic", "P" + "∧P" * 10_000),
        ("propositional_logic", "¬a \N{LOGICAL OR} " + " \N{LOGICAL OR} ".join("abcdefghijklmnopqrstuvwxyz")),
        ("complex_arithmetic", "nan"),
        ("rush_hour", "F+99"),
    ],
)
def test_answers_on_which_a_verifier_fails_are_wrong(task: str, text: str) -> None:
    """Or hangs, or would."""
    assert is_correct(f"<answer>{text}</answer>", problems(task)["answer"][0]) is False


@pytest.mark.parametrize("task", RUNS_PYTHON)
def test_a_completion_is_never_run(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some verifiers evaluate an answer as Python."""
    monkeypatch.chdir(tmp_path)
    answer = problems(task)["answer"][0]
    for text in ("__import__('pathlib').Path('x').touch()", "open('x','w')", "exec(chr(49))", "[].__class__"):
        assert not is_correct(f"<answer>{text}</answer>", answer)
    assert not list(tmp_path.iterdir())


def test_an_answer_that_is_no_problem_is_compared_exactly() -> None:
    for answer in ("72", "null", "{}", '{"source": "x", "index": 1, "sha256": ""}', "[" * 10_000):
        assert is_correct(f"It is {answer}.", answer) is (answer == "72")


def test_a_problem_of_another_version_is_told() -> None:
    answer = json.loads(problems("chain_sum")["answer"][0])
    with pytest.raises(ValueError, match=r"another problem \d+ of reasoning_gym:chain_sum"):
        is_correct("4", json.dumps(answer | {"sha256": "0" * 12}))
    with pytest.raises(ValueError, match="no task 'chain_sun'"):
        is_correct("4", json.dumps(answer | {"source": "reasoning_gym:chain_sun"}))


# commands


RUN = {
    **QUIET,
    "model_name_or_path": "unused",
    "teacher_model_name_or_path": "unused",
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "max_new_tokens": 6,
}
SPLITS = "&size=12&test_size=12"


@pytest.fixture(scope="module")
def models_of_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A student and a teacher that can read any prompt."""
    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    folders = {}
    for seed, field in enumerate(("model_name_or_path", "teacher_model_name_or_path")):
        folders[field] = str(tmp_path_factory.mktemp(field))
        model = build_model("qwen3", seed, rows=264)
        model.config.max_position_embeddings = 1024
        model.save_pretrained(folders[field])
        fast.save_pretrained(folders[field])
    return folders


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], float]]:
    """`says(split)`: from now on every completion is the answer to most problems of a split of `EASY`. Returns the
    percentage of problems that it is right for."""
    original, texts = PreTrainedTokenizerBase.decode, []

    def decode(self: PreTrainedTokenizerBase, token_ids: Any, **kwargs: Any) -> str | list[str]:
        if not kwargs.get("skip_special_tokens"):
            return original(self, token_ids, **kwargs)
        return [texts[-1]] * len(token_ids) if np.ndim(token_ids) == 2 else texts[-1]

    def say(split: str) -> float:
        own = own_answers(load_split(f"{EASY}{SPLITS}", None, split))
        text, count = Counter(own).most_common(1)[0]
        texts.append(f"3, or <answer>{text}</answer>, not 77")
        assert 0 < count < len(own)
        return 100 * count / len(own)

    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", decode)
    yield say


def train(folder: Path, names: dict[str, str], **options: Any) -> list[dict[str, float]]:
    values = {**RUN, **names, "eval_strategy": "steps", "eval_steps": 1, "output_dir": folder, **options}
    assert main(["train", *flags(**values)]) == 0
    return list(json.loads((folder / "trainer_state.json").read_text())["log_history"])


def accuracy(log: list[dict[str, float]]) -> float:
    return 100 * next(row["eval_accuracy"] for row in log if "eval_accuracy" in row)


def test_training_evaluates_with_the_verifier(
    models_of_bytes: dict[str, str], says: Callable[[str], float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share, name, out = says("test"), f"{EASY}{SPLITS}", tmp_path / "run"
    more = {"save_strategy": "steps", "save_steps": 1}
    assert accuracy(train(out, models_of_bytes, dataset_name=name, **more)) == pytest.approx(share)
    config = yaml.safe_load((out / "tsdkd_config.yaml").read_text())
    assert (config["dataset_name"], config["grader"]) == (name, GRADER)
    assert name in (out / "README.md").read_text()
    assert f"--benchmarks '{EASY}&test_size=12'" in "".join(capsys.readouterr())

    log = train(out, models_of_bytes, dataset_name=name, **more, max_steps=2, resume="true")
    assert max(row["step"] for row in log) == 2
    changed = {**RUN, **models_of_bytes, "dataset_name": f"{name}&seed=7", "max_steps": 3, "resume": "true"}
    assert main(["train", *flags(**changed, output_dir=out)]) == 2
    assert "contains a different run: dataset_name was" in capsys.readouterr().err


def test_held_out_problems_of_their_own(
    models_of_bytes: dict[str, str],
    rows_file: str,
    says: Callable[[str], float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only one of two data sets is generated. The user is told that the other's answers are compared exactly."""
    share = says("test")
    names = {"dataset_name": rows_file, "eval_dataset_name": f"{EASY}&test_size=12"}
    assert accuracy(train(tmp_path / "a", models_of_bytes, **names)) == pytest.approx(share)
    assert f"note: grader {GRADER}" in "".join(capsys.readouterr())
    (tmp_path / "own.jsonl").write_text('{"prompt": "1", "answer": "77"}\n{"prompt": "2", "answer": "7"}\n')
    names = {"dataset_name": f"{EASY}{SPLITS}", "eval_dataset_name": str(tmp_path / "own.jsonl")}
    assert accuracy(train(tmp_path / "b", models_of_bytes, **names)) == 50


def test_a_grader_of_ones_own_wins(
    models_of_bytes: dict[str, str], says: Callable[[str], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says("test")
    (tmp_path / "always.py").write_text("def right(completion, answer): return True")
    monkeypatch.chdir(tmp_path)
    log = train(tmp_path / "run", models_of_bytes, dataset_name=f"{EASY}{SPLITS}", grader="always:right")
    assert accuracy(log) == 100
    assert yaml.safe_load((tmp_path / "run/tsdkd_config.yaml").read_text())["grader"] == "always:right"


def test_grpo_is_rewarded_by_the_verifier(
    models_of_bytes: dict[str, str], says: Callable[[str], float], tmp_path: Path
) -> None:
    """The only batch has all problems: the mean reward is the share of right answers."""
    share = says("train")
    names = {**models_of_bytes, "dataset_name": f"{EASY}{SPLITS}", "output_dir": tmp_path / "run", "method": "grpo"}
    sizes = {"per_device_train_batch_size": 24, "num_generations": 2, "rollout_batch_size": 12, "logging_steps": 1}
    del names["teacher_model_name_or_path"]
    values = {key: value for key, value in RUN.items() if key != "teacher_model_name_or_path"}
    assert main(["train", *flags(**{**values, **names, **sizes})]) == 0
    log = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert 100 * log[0]["reward"] == pytest.approx(share, rel=1e-4)


def test_fine_tuning_on_worked_solutions(models_of_bytes: dict[str, str], tmp_path: Path) -> None:
    name = "reasoning_gym:gsm_symbolic?size=8"
    values = {**RUN, **models_of_bytes, "dataset_name": name, "method": "seq-kd", "max_new_tokens": 600}
    assert main(["train", *flags(**values, output_dir=tmp_path / "run")]) == 0


def test_generated_completions_keep_the_problem(
    models_of_bytes: dict[str, str], says: Callable[[str], float], tmp_path: Path
) -> None:
    """They can be trained on, and graded, as any other rows."""
    says("train")
    name, file = f"{EASY}{SPLITS}", tmp_path / "teacher.jsonl"
    values = {**RUN, **models_of_bytes, "dataset_name": name}
    assert main(["generate", *flags(**values, output_file=file, limit=4)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    source = load_split(name, None, "train")[:4]
    assert {row["prompt"]: row["answer"] for row in rows} == dict(zip(source["prompt"], source["answer"], strict=True))
    assert all("<answer>" in row["completion"] for row in rows)


def test_a_comparison_is_graded_by_the_verifier(
    models_of_bytes: dict[str, str], rows_file: str, says: Callable[[str], float], tmp_path: Path
) -> None:
    """The grid is chosen on the split validation, which shares no problem with the test."""
    base = {**RUN, **models_of_bytes, "dataset_name": rows_file, "output_dir": "unused"}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    values = {
        "config": str(tmp_path / "base.yaml"),
        "output_dir": str(tmp_path / "out"),
        "runs": {"gkd": {"method": "gkd"}},
        "eval_dataset_name": f"{EASY}&test_size=12",
        "validation_dataset_name": f"{EASY}&test_size=12",
        "grid": {"learning_rate": [0.01, 0.001]},
        "eval_samples": 1,
    }
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(values))
    command = ["compare", "--config", str(tmp_path / "comparison.yaml"), "--task"]
    for task, split, folder in (("0", "test", "student"), ("2", "validation", "gkd/grid/*/seed-101")):
        share = says(split)
        assert main([*command, task]) == 0
        (result,) = (tmp_path / "out").glob(f"{folder}/result.json")
        assert json.loads(result.read_text())["greedy"] == pytest.approx(share)


def test_eval_grades_with_the_verifier(
    models_of_bytes: dict[str, str],
    says: Callable[[str], float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval")
    share, name, out = says("test"), f"{EASY}&test_size=12", tmp_path / "out"
    command = ["eval", f"s={models_of_bytes['model_name_or_path']}", "--output_dir", str(out), "--max_new_tokens", "6"]
    command += ["--benchmarks", name, "--samples", "1"]
    assert main(command) == 0
    (file,) = out.glob("s/*_greedy.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert 100 * sum(row["scores"][0] for row in rows) / len(rows) == pytest.approx(share)
    assert {row["grader"] for row in rows} == {GRADER}
    assert "chain_sum-min_terms-2" in capsys.readouterr().out
    assert main([*command, "--grader", "tsdkd.grading:is_exact_match"]) == 2
    assert f"grader was '{GRADER}'" in capsys.readouterr().err


def test_rows_and_grader_in_python(
    models_of_bytes: dict[str, str], says: Callable[[str], float], tmp_path: Path
) -> None:
    share, name = says("test"), f"{EASY}{SPLITS}"
    args = TSDKDConfig(output_dir=str(tmp_path), max_steps=1, max_new_tokens=6, grader=GRADER, **QUIET)
    trainer = TSDKDTrainer(
        model=models_of_bytes["model_name_or_path"],
        teacher_model=models_of_bytes["teacher_model_name_or_path"],
        args=args,
        train_dataset=load_split(name, None, "train"),
        eval_dataset=load_split(name, None, "test"),
    )
    assert 100 * trainer.evaluate()["eval_accuracy"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"dataset_name": "reasoning_gym:chain_sun"}, "no task 'chain_sun', did you mean 'chain_sum'?"),
        ({"dataset_name": "reasoning_gym:"}, "no task ''"),
        ({"dataset_name": f"{EASY}&min_term=3"}, "unknown option 'min_term', did you mean 'min_terms'?"),
        ({"dataset_name": f"{EASY}&seed=x"}, "seed: must be a whole number from 0"),
        ({"dataset_name": f"{EASY}&seed=1&seed=2"}, "seed: is set twice"),
        ({"dataset_name": f"{EASY}&size"}, "size: needs a value, such as size=1"),
        ({"dataset_name": f"{EASY}&size=0"}, "size: must be a whole number from 1 to 100,000, found '0'"),
        ({"dataset_name": "reasoning_gym:chain_sum?min_terms=two"}, "min_terms: expected a whole number, found 'two'"),
        ({"dataset_name": "reasoning_gym:chain_sum?min_terms=9"}, "min_terms=9: max_terms must be >= min_terms"),
        ({"dataset_name": "reasoning_gym:time_intervals?min_time=3"}, "min_time: "),
        ({"dataset_name": f"reasoning_gym:time_intervals?task_types={'time,' * 100}date&x=1"}, "unknown option 'x'"),
        ({"dataset_name": FEW, "eval_on_start": "true"}, "has no problem for the split test"),
        ({"dataset_name": EASY, "dataset_config": "main"}, "dataset_config: 'main' has no effect"),
        ({"dataset_name": EASY, "dataset_train_split": "dev"}, "splits train, validation and test, but not 'dev'"),
        ({"dataset_name": EASY, "eval_dataset_name": f"{EASY}&size=3", "eval_on_start": "true"}, "use test_size here"),
    ],
)
def test_mistakes_are_told_in_a_line(
    values: dict[str, str], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags(**{**RUN, **values}, output_dir=tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("tsdkd train: ") and found in error
    assert "dataset_" in error and not (tmp_path / "out").exists()


WITHOUT = """
import sys
sys.modules["reasoning_gym"] = None
from tsdkd.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_the_package(tmp_path: Path) -> None:
    command = ["train", *flags(**RUN, dataset_name=EASY, output_dir=tmp_path / "out")]
    result = subprocess.run([python(), "-c", WITHOUT, *command], capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "needs reasoning-gym; install the extra 'reasoning-gym'" in result.stderr
