"""The published configurations of the presets' models, as far as they decide on memory: what their config.json say."""

from pathlib import Path
from typing import Any

from transformers import Gemma2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config


def _config(
    cls: type[PretrainedConfig],
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    heads: tuple[int, int],
    vocab_size: int,
    tied: bool,
    context: int,
    **values: Any,
) -> PretrainedConfig:
    config = cls(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        max_position_embeddings=context,
        **values,
    )
    config.dtype = "bfloat16"
    return config


CONFIGS = {
    "Qwen/Qwen2.5-0.5B-Instruct": _config(Qwen2Config, 896, 4864, 24, (14, 2), 151936, True, 32768),
    "Qwen/Qwen2.5-1.5B-Instruct": _config(Qwen2Config, 1536, 8960, 28, (12, 2), 151936, True, 32768),
    "Qwen/Qwen2.5-7B-Instruct": _config(Qwen2Config, 3584, 18944, 28, (28, 4), 152064, False, 32768),
    "Qwen/Qwen2.5-14B-Instruct": _config(Qwen2Config, 5120, 13824, 48, (40, 8), 152064, False, 32768),
    "Qwen/Qwen3-0.6B-Base": _config(Qwen3Config, 1024, 3072, 28, (16, 8), 151936, True, 32768, head_dim=128),
    "Qwen/Qwen3-1.7B-Base": _config(Qwen3Config, 2048, 6144, 28, (16, 8), 151936, True, 32768, head_dim=128),
    "Qwen/Qwen3-1.7B": _config(Qwen3Config, 2048, 6144, 28, (16, 8), 151936, True, 40960, head_dim=128),
    "Qwen/Qwen3-4B-Base": _config(Qwen3Config, 2560, 9728, 36, (32, 8), 151936, True, 32768, head_dim=128),
    "Qwen/Qwen3-8B": _config(Qwen3Config, 4096, 12288, 36, (32, 8), 151936, False, 40960, head_dim=128),
    "google/gemma-2-2b-it": _config(Gemma2Config, 2304, 9216, 26, (8, 4), 256000, True, 8192, head_dim=256),
    "google/gemma-2-9b-it": _config(Gemma2Config, 3584, 14336, 42, (16, 8), 256000, True, 8192, head_dim=256),
    "meta-llama/Llama-3.2-3B-Instruct": _config(
        LlamaConfig, 3072, 8192, 28, (24, 8), 128256, True, 131072, head_dim=128
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _config(LlamaConfig, 4096, 14336, 32, (32, 8), 128256, False, 131072),
}

BILLIONS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 0.49,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen/Qwen2.5-7B-Instruct": 7.62,
    "Qwen/Qwen2.5-14B-Instruct": 14.77,
    "Qwen/Qwen3-0.6B-Base": 0.60,
    "Qwen/Qwen3-1.7B-Base": 1.72,
    "Qwen/Qwen3-1.7B": 1.72,
    "Qwen/Qwen3-4B-Base": 4.02,
    "Qwen/Qwen3-8B": 8.19,
    "google/gemma-2-2b-it": 2.61,
    "google/gemma-2-9b-it": 9.24,
    "meta-llama/Llama-3.2-3B-Instruct": 3.21,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03,
}
"""Parameters, as the hub counts them in the checkpoints."""


def save_config(name: str, folder: Path) -> str:
    """A folder with this model's config.json, and nothing else."""
    path = folder / name.replace("/", "--")
    CONFIGS[name].save_pretrained(path)
    return str(path)
