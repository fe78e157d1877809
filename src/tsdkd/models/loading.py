"""Loads configurations and tokenizers of student and teacher, and then their weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.trainer.utils import create_model_from_path

from ..config.base import TokenSelectiveConfig
from ..config.coercion import shorten
from ..config.logs import get_logger
from ..files import shorten_path
from .finite_weights import require_finite
from .hub import INIT_KWARGS, load_pretrained
from .tokenizers import check_same_tokenizer, check_vocab_fits, load_tokenizer, stop_token_ids

logger = get_logger(__name__)

Role = Literal["student", "teacher"]
_LARGEST = {
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31,
    "num_hidden_layers": 2**12,
    **dict.fromkeys(("hidden_size", "intermediate_size"), 2**22),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 2**16),
}
"""Size in a configuration -> largest plausible value."""


@dataclass
class ModelPair:
    """Configurations and tokenizers of student and teacher, without weights.

    Attributes:
        student_config, teacher_config: the models' configurations.
        student_generation_config, teacher_generation_config: generation configurations; None for a model that can't
            generate.
        tokenizer, teacher_tokenizer: tokenizers with the same token -> id map; chat templates may differ.
        template_role: the model whose chat template renders the prompts.
    """

    student_config: PretrainedConfig
    teacher_config: PretrainedConfig
    student_generation_config: GenerationConfig | None
    teacher_generation_config: GenerationConfig | None
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    template_role: Role

    @property
    def template_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer whose chat template renders the prompts."""
        return self.teacher_tokenizer if self.template_role == "teacher" else self.tokenizer

    def stop_token_ids(
        self, role: Role = "student", generation_config: GenerationConfig | None = None
    ) -> frozenset[int]:
        """Return the ids that end a completion; see `tokenizers.stop_token_ids` for the rule.

        Args:
            role: the model that generates the completion.
            generation_config: generation configuration of this model, if it differs from the pair's, e.g. for a
                trained student.
        """
        models = {
            "student": (self.student_generation_config, self.tokenizer),
            "teacher": (self.teacher_generation_config, self.teacher_tokenizer),
        }
        writer_sources = (generation_config or models[role][0], models[role][1])
        return stop_token_ids(self.shared_vocab_size, writer_sources, models[self.template_role])

    @property
    def context_length(self) -> int:
        """Longest sequence that both models accept, tokens."""
        configs = (self.student_config.get_text_config(), self.teacher_config.get_text_config())
        limits = [getattr(c, "max_position_embeddings", None) for c in configs]
        return min((limit for limit in limits if limit), default=2**31)

    @property
    def vocab_sizes(self) -> tuple[int, int]:
        """Numbers of logits of student and teacher."""
        return self.student_config.get_text_config().vocab_size, self.teacher_config.get_text_config().vocab_size

    @property
    def shared_vocab_size(self) -> int:
        """Number of ids for which both models have logits.

        Models with the same tokenizer often pad their vocabularies differently (Qwen2.5: 152064 rows at 14B, 151936
        at 1.5B).
        """
        return min(self.vocab_sizes)


def resolve_pair(
    student: str | PreTrainedModel,
    teacher: str | PreTrainedModel,
    args: TokenSelectiveConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> ModelPair:
    """Load and check the configurations and tokenizers of student and teacher, without weights.

    Raises:
        ModelError: a configuration or tokenizer can't be loaded.
        TokenizerMismatchError: the tokenizers differ.
    """
    student_kwargs = _hub_kwargs(args, args.model_init_kwargs)
    teacher_kwargs = _hub_kwargs(args, args.teacher_model_init_kwargs)
    student_config = _get_config(student, "model_name_or_path", student_kwargs)
    teacher_config = _get_config(teacher, "teacher_model_name_or_path", teacher_kwargs)
    if tokenizer is None:
        tokenizer = load_tokenizer(get_model_id(student), "model_name_or_path", **student_kwargs)
    if teacher_tokenizer is None:
        # a teacher built in memory has no tokenizer to compare with
        name = get_model_id(teacher)
        teacher_tokenizer = load_tokenizer(name, "teacher_model_name_or_path", **teacher_kwargs) if name else tokenizer
    check_same_tokenizer(tokenizer, teacher_tokenizer)
    check_vocab_fits(tokenizer, student_config, "model_name_or_path")
    check_vocab_fits(teacher_tokenizer, teacher_config, "teacher_model_name_or_path")
    return ModelPair(
        student_config,
        teacher_config,
        _get_generation_config(student, "model_name_or_path", student_config, student_kwargs),
        _get_generation_config(teacher, "teacher_model_name_or_path", teacher_config, teacher_kwargs),
        tokenizer,
        teacher_tokenizer,
        "teacher" if args.chat_template_source == "teacher" else "student",
    )


def _get_config(model: str | PreTrainedModel, field: str, kwargs: dict[str, Any]) -> PretrainedConfig:
    return load_config(model, field, **kwargs) if isinstance(model, str) else model.config


def _get_generation_config(
    model: str | PreTrainedModel, field: str, config: PretrainedConfig, kwargs: dict[str, Any]
) -> GenerationConfig | None:
    """Return the generation configuration of a model, as `from_pretrained` would load it."""

    def load(name: str, **revision: str) -> GenerationConfig:
        try:
            generation_config = GenerationConfig.from_pretrained(name, **revision)
        except OSError:  # there is no generation_config.json
            generation_config = GenerationConfig.from_model_config(config)
        ids = generation_config.eos_token_id
        if not all(type(i) is int for i in (ids if isinstance(ids, list) else [0 if ids is None else ids])):
            raise ValueError(f"eos_token_id must be a token id or a list of token ids, found {shorten(ids)}")
        return generation_config

    if not isinstance(model, str):
        return model.generation_config
    revision = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
    generation_config: GenerationConfig = load_pretrained(load, model, field, "model", **revision)
    return generation_config


def load_config(name: str, field: str, **kwargs: Any) -> PretrainedConfig:
    """Load a model's configuration; `kwargs` are passed to `from_pretrained`. Raises `ModelError`."""
    return load_pretrained(_load_config, name, field, "model", **kwargs)


def _load_config(name: str, **kwargs: Any) -> PretrainedConfig:
    values, _ = PretrainedConfig.get_config_dict(name, **kwargs)
    _check_sizes(values)  # before any loop over the layers
    return AutoConfig.from_pretrained(name, **kwargs)


def _check_sizes(values: dict[str, Any]) -> None:
    """Raise `ValueError` for implausible sizes at any level of a configuration."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check_sizes(value)
        elif key not in _LARGEST or value is None or isinstance(value, list):  # a list has a value per layer
            continue
        elif type(value) is not int or not 1 <= value <= _LARGEST[key]:
            expected = f"a whole number from 1 to {_LARGEST[key]:,}"
            raise ValueError(f"config.json: {key} must be {expected}, found {shorten(value)}")


def load_student(student: str | PreTrainedModel, args: TokenSelectiveConfig) -> PreTrainedModel:
    """Load the student as TRL's trainers do, in float32 by default; return an already loaded one unchanged.

    Raises:
        ModelError: the student can't be loaded, or its weights are not finite.
    """
    if not isinstance(student, str):
        require_finite(student, "model")
        return student
    logger.info(f"loading the student {shorten_path(student)}")
    kwargs = {"trust_remote_code": args.trust_remote_code, "device_map": None, **(args.model_init_kwargs or {})}
    model = load_pretrained(
        create_model_from_path, student, "model_name_or_path", "model", args.model_init_kwargs, **kwargs
    )
    require_finite(model, "model_name_or_path", student)
    args.model_init_kwargs = None  # already used; TRL warns if they are given with a loaded model
    return model


def load_frozen_model(
    name: str,
    args: TokenSelectiveConfig,
    field: str = "teacher_model_name_or_path",
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load a model that is not trained, in its checkpoint's dtype unless its `…model_init_kwargs` specify another.

    Args:
        name: path or hub id.
        args: the run's configuration.
        field: the field that names the model.
        device: device to load the weights to, one by one, so that they are never all in host memory. If None, the
            global DeepSpeed configuration (ZeRO-3) decides.

    Raises:
        ModelError: the model can't be loaded, or its weights are not finite.
    """
    given = getattr(args, INIT_KWARGS[field])
    kwargs = {"dtype": "auto", "trust_remote_code": args.trust_remote_code, "device_map": device, **(given or {})}
    model = load_pretrained(AutoModelForCausalLM.from_pretrained, name, field, "model", given, **kwargs)
    require_finite(model, field, name)
    return model


def get_revision(name: str, config: PretrainedConfig) -> str:
    """Return the commit of a hub model, or a digest of a local model's weight files (names, sizes and times)."""
    folder = Path(name)
    return hash_weight_files(folder) if folder.is_dir() else str(getattr(config, "_commit_hash", None))


def hash_weight_files(folder: Path) -> str:
    """Return a digest of the names, sizes and modification times of a local model's weight files."""
    files = sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return "local-" + hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def get_model_id(model: str | PreTrainedModel) -> str:
    """Return the path or hub id that a model was loaded from; empty for a model built in memory."""
    return model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or ""


def _hub_kwargs(args: TokenSelectiveConfig, init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    revision = (init_kwargs or {}).get("revision")
    return {"trust_remote_code": args.trust_remote_code, **({"revision": revision} if revision else {})}


def unwrap_peft(model: Any) -> Any:
    """Return the model without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
