"""Tiny models of four families that share one word-level tokenizer, built once a session."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import psutil
import pytest
import torch
import yaml

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; Triton reads it when it is imported
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from fast_set import mark_slow
from preloaded import python
from tsdkd.methods import METHODS
from tsdkd.objective import CompletionBatch, PolicyScores

torch.set_num_threads(1)
ENVIRONMENT = dict(os.environ)
"""Before a test module imports vLLM, which adds settings of OpenMP's."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run campaigns and matrices whole (hours)")
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run files, and the tests of each, in a random order")


def pytest_configure(config: pytest.Config) -> None:
    """DeepSpeed compiles into this checkout: a lock that a killed compilation leaves would be waited for, forever."""
    folder = config.rootpath / ".pytest_cache" / f"torch_extensions-{torch.__version__}"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    if not hasattr(config, "workerinput"):  # pytest-xdist's; another may be compiling
        for lock in folder.glob("*/lock"):
            lock.unlink()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_slow(items)
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    seed = config.getoption("--shuffle")
    if seed is not None:
        rng, files = random.Random(seed), sorted({item.path for item in items})
        rng.shuffle(files)
        rng.shuffle(items)
        items.sort(key=lambda item: files.index(item.path))


@pytest.fixture(autouse=True)
def registered_methods() -> Iterator[None]:
    """Methods that a test registers are forgotten after it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that tsdkd and the test start don't import all again."""
    monkeypatch.setattr(sys, "executable", python())


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the campaigns are run whole."""
    return bool(request.config.getoption("--long"))


WORDS = [f"w{i}" for i in range(56)]
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build_tokenizer(words: list[str] = WORDS, pad_token: str = "<pad>") -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token=pad_token)
    fast.chat_template = TEMPLATE
    return fast


def build_model(family: str, seed: int = 0, rows: int = 64, hidden: int = 32, head_dim: int = 16) -> torch.nn.Module:
    """A float32 model of a family, with `rows` logits and weights large enough for confident distributions."""
    common = {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    config = {
        "gemma2": lambda: Gemma2Config(
            **common, final_logit_softcapping=4.0, sliding_window=8, query_pre_attn_scalar=head_dim
        ),
        "llama": lambda: LlamaConfig(**common, tie_word_embeddings=False),
        "qwen2": lambda: Qwen2Config(**common, tie_word_embeddings=True),
        "qwen3": lambda: Qwen3Config(**common, tie_word_embeddings=False),
    }[family]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = 1
    return model.eval()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`saved_model(family, seed, rows, pad_token, **size)` -> a folder with model and tokenizer, made on first use."""
    made: dict[tuple, str] = {}

    def make(family: str = "qwen3", seed: int = 0, rows: int = 64, pad_token: str = "<pad>", **size: int) -> str:
        key = (family, seed, rows, pad_token, *size.items())
        if key not in made:
            folder = str(tmp_path_factory.mktemp(f"{family}-{seed}-{rows}"))
            build_model(family, seed, rows, **size).save_pretrained(folder)
            build_tokenizer(pad_token=pad_token).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


def make_rows(count: int = 24, seed: int = 0, completion_words: tuple[int, int] = (3, 12)) -> list[dict[str, str]]:
    """Rows with `prompt`, `completion` and `answer`, of several lengths."""
    rng = random.Random(seed)
    return [
        {
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(2, 9))),
            "completion": " ".join(rng.choices(WORDS, k=rng.randint(*completion_words))),
            "answer": str(rng.randint(0, 9)),
        }
        for _ in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> str:
    """Write rows as JSON lines; returns the path as a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 rows as JSONL."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows())


@pytest.fixture(scope="session")
def demo_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """64 of the demo's prompts as JSONL: to tokenize all 24,576 takes up to 30 seconds."""
    text = resources.files("tsdkd").joinpath("demo/train.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()[:64]]
    return write_jsonl(tmp_path_factory.mktemp("demo") / "rows.jsonl", rows)


@pytest.fixture
def comparison(saved_model: Callable[..., str], rows_file: str, tmp_path: Path) -> Callable[..., str]:
    """Writes a comparison of tiny runs; returns its path."""
    base = {
        "model_name_or_path": saved_model("qwen3", 0),
        "teacher_model_name_or_path": saved_model("qwen3", 1),
        "dataset_name": rows_file,
        "eval_dataset_name": write_jsonl(tmp_path / "problems.jsonl", make_rows(12, seed=3)),
        "output_dir": "unused",
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"},
        **{"per_device_train_batch_size": 4, "max_steps": 3, "max_new_tokens": 8, "learning_rate": 0.01},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def write(**changes: object) -> str:
        values = {
            "config": str(tmp_path / "base.yaml"),
            "output_dir": str(tmp_path / "out"),
            "seeds": [1, 2],
            "eval_samples": 2,
            "runs": {"plain": {"method": "gkd"}, "no gate": {"gate": False}},
            **changes,
        }
        path = tmp_path / "comparison.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False))
        return str(path)

    return write


def completions_of(mask: torch.Tensor, ids: torch.Tensor | None = None, **others: object) -> CompletionBatch:
    """A `CompletionBatch` whose tokens matter only where they are given."""
    ids = torch.zeros(int(mask.sum()), dtype=torch.long, device=mask.device) if ids is None else ids
    return CompletionBatch(mask, ids, **others)


def policy_scores(
    teacher_entropy: torch.Tensor,
    teacher_logps: torch.Tensor,
    topk_logps: torch.Tensor,
    topk_ids: torch.Tensor,
    old_logps: torch.Tensor,
    **others: torch.Tensor,
) -> PolicyScores:
    """Scores of a rollout as a trainer computes them; tensors `[N]` or `[N, K]`."""
    defaults = {
        "random_uniform": torch.linspace(0.0, 0.99, len(old_logps)),
        "advantages": teacher_logps - old_logps,
        "importance_sampling_ratio": torch.ones_like(old_logps),
    }
    given = (teacher_entropy, teacher_logps, topk_ids, topk_logps)
    return PolicyScores(*given, old_per_token_logps=old_logps, **{**defaults, **others})


QUIET = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}
"""Training arguments that every test takes: float32 on the CPU, nothing reported."""


def flags(**values: object) -> list[str]:
    """Keyword arguments as command-line flags."""
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def weights(folder: str | Path) -> torch.Tensor:
    """All weights of a saved model as one float64 vector."""
    return torch.cat([t.flatten().double() for _, t in sorted(load_file(Path(folder) / "model.safetensors").items())])


def on_cpus() -> dict[str, str]:
    """The environment of several processes on the CPU."""
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    # DeepSpeed compiles its communication at the first run, with the ninja beside this Python
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    return {**os.environ, **environment}


def run_to_end(command: list[str], env: dict[str, str], timeout: float = 600) -> subprocess.CompletedProcess:
    """`subprocess.run` for a launcher: at the limit all that it has started is killed, in whatever session it is."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def launch(launcher: list[str], command: list[str]) -> str:
    """Run `tsdkd command` over CPU processes by `accelerate launch`; returns what it printed."""
    program = [python(), "-m", "accelerate.commands.launch", *launcher, "-m", "tsdkd", *command]
    result = run_to_end(program, on_cpus())
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


VLLM_ON_CPUS = {"VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""The environment of an engine that starts without a warm-up and takes one GiB."""

DDP = ["--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
DDP += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
"""`launch` over two processes."""


def zero_launcher(stage: int, folder: Path) -> list[str]:
    """`launch` over two processes with DeepSpeed ZeRO; its files are written into `folder`."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    deepspeed = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **dict.fromkeys(sizes, "auto")}
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    accelerate = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": str(folder / "deepspeed.json"),
            "deepspeed_multinode_launcher": "standard",
            "zero3_init_flag": stage == 3,
        },
        "num_machines": 1,
        "num_processes": 2,
        "machine_rank": 0,
        "main_process_port": 0,
    }
    (folder / "accelerate.json").write_text(json.dumps(accelerate))
    return ["--config_file", str(folder / "accelerate.json")]
