"""The pair: student and teacher, their tokenizers' identity, the vocabulary they share, where a completion stops."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.trainer.utils import create_model_from_path

from ..config.base import TokenSelectiveConfig
from ..errors import ModelError, TokenizerMismatchError
from .hub import offline_reason

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
_INIT_KWARGS = {"model_name_or_path": "model_init_kwargs", "teacher_model_name_or_path": "teacher_model_init_kwargs"}


@dataclass
class ModelPair:
    """Student and teacher as far as they are known without their weights.

    Attributes:
        student_config, teacher_config: the models' configurations.
        tokenizer, teacher_tokenizer: the same token -> id map, maybe with different chat templates.
        template: the one whose chat template renders the prompts.
    """

    student_config: PretrainedConfig
    teacher_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    template_tokenizer: PreTrainedTokenizerBase

    @property
    def context_length(self) -> int:
        """The longest sequence, tokens, that both models take."""
        configs = (self.student_config.get_text_config(), self.teacher_config.get_text_config())
        limits = [getattr(c, "max_position_embeddings", None) for c in configs]
        return min((limit for limit in limits if limit), default=2**31)

    @property
    def vocab_sizes(self) -> tuple[int, int]:
        """How many ids the student and the teacher have logits for."""
        return self.student_config.get_text_config().vocab_size, self.teacher_config.get_text_config().vocab_size

    @property
    def shared_vocab_size(self) -> int:
        """How many ids both have logits for: one tokenizer often comes with differently padded vocabularies
        (Qwen2.5: 152064 rows at 14B, 151936 at 1.5B)."""
        return min(self.vocab_sizes)


def resolve_pair(
    student: str | PreTrainedModel,
    teacher: str | PreTrainedModel,
    args: TokenSelectiveConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> ModelPair:
    """Configurations and tokenizers of a pair, checked, without loading weights.

    Raises:
        ModelError: one of them can't be loaded.
        TokenizerMismatchError: the tokenizers differ.
    """
    student_source = ("model_name_or_path", _hub_kwargs(args, args.model_init_kwargs))
    teacher_source = ("teacher_model_name_or_path", _hub_kwargs(args, args.teacher_model_init_kwargs))
    student_config, teacher_config = (
        load_config(model, field, **kwargs) if isinstance(model, str) else model.config
        for model, (field, kwargs) in ((student, student_source), (teacher, teacher_source))
    )
    if tokenizer is None:
        tokenizer = load_tokenizer(get_model_id(student), student_source[0], **student_source[1])
    if teacher_tokenizer is None:
        # a teacher built in memory has no tokenizer of its own to compare with
        name = get_model_id(teacher)
        teacher_tokenizer = load_tokenizer(name, teacher_source[0], **teacher_source[1]) if name else tokenizer
    check_same_tokenizer(tokenizer, teacher_tokenizer)
    _check_vocab_fits(tokenizer, student_config, student_source[0])
    _check_vocab_fits(teacher_tokenizer, teacher_config, teacher_source[0])
    template_tokenizer = teacher_tokenizer if args.chat_template_source == "teacher" else tokenizer
    return ModelPair(student_config, teacher_config, tokenizer, teacher_tokenizer, template_tokenizer)


def load_config(name: str, field: str, **kwargs: Any) -> PretrainedConfig:
    """A model's configuration; `kwargs` are `from_pretrained`'s. Raises `ModelError`."""
    return _from_pretrained(AutoConfig.from_pretrained, name, field, "model", **kwargs)


def load_student(student: str, args: TokenSelectiveConfig) -> PreTrainedModel:
    """The student, in float32 unless `model_init_kwargs` says otherwise, as TRL's trainers load it.

    Raises:
        ModelError: it can't be loaded.
    """
    kwargs = {"trust_remote_code": args.trust_remote_code, "device_map": None, **(args.model_init_kwargs or {})}
    model = _from_pretrained(
        create_model_from_path, student, "model_name_or_path", "model", args.model_init_kwargs, **kwargs
    )
    args.model_init_kwargs = None  # used up: TRL warns where a loaded model comes with them
    return model


def load_frozen_model(
    name: str,
    args: TokenSelectiveConfig,
    field: str = "teacher_model_name_or_path",
    device: torch.device | None = None,
) -> PreTrainedModel:
    """A model that isn't trained, in its checkpoint's dtype unless its `…model_init_kwargs` say otherwise.

    Args:
        name: path or hub id.
        args: the run's.
        field: which setting names it.
        device: where its weights are read to, one after the other: the host never holds them all. None leaves the
            place to what is set globally (ZeRO-3).

    Raises:
        ModelError: it can't be loaded.
    """
    given = getattr(args, _INIT_KWARGS[field])
    kwargs = {"dtype": "auto", "trust_remote_code": args.trust_remote_code, "device_map": device, **(given or {})}
    return _from_pretrained(AutoModelForCausalLM.from_pretrained, name, field, "model", given, **kwargs)


def get_revision(name: str, config: PretrainedConfig) -> str:
    """The commit of a model from the hub; of a local one a digest of its weight files' names, sizes and times."""
    folder = Path(name)
    return hash_weight_files(folder) if folder.is_dir() else str(getattr(config, "_commit_hash", None))


def hash_weight_files(folder: Path) -> str:
    """Of a local model's weight files: their names, sizes and times."""
    files = sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return "local-" + hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def load_generation_config(name: str, config: PretrainedConfig, revision: str | None) -> GenerationConfig:
    """What a model would generate with, as `from_pretrained` finds it."""
    try:
        return GenerationConfig.from_pretrained(name, **({"revision": revision} if revision else {}))
    except OSError:  # it has no generation_config.json
        return GenerationConfig.from_model_config(config)


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Token-level distillation compares ids, so both tokenizers must be the same map.

    Raises:
        TokenizerMismatchError: naming the first id that differs.
    """
    student_source, teacher_source = student.get_vocab(), teacher.get_vocab()
    if student_source == teacher_source:
        return
    ours_by_id, theirs_by_id = ({i: t for t, i in vocab.items()} for vocab in (student_source, teacher_source))
    first = min(i for i in ours_by_id.keys() | theirs_by_id.keys() if ours_by_id.get(i) != theirs_by_id.get(i))
    raise TokenizerMismatchError(
        f"teacher_model_name_or_path: its tokenizer is not the student's: id {first} is {ours_by_id.get(first)!r} for "
        f"the student and {theirs_by_id.get(first)!r} for the teacher; choose a teacher with the same tokenizer"
    )


def collect_stop_token_ids(*sources: GenerationConfig | PreTrainedTokenizerBase | None) -> set[int]:
    """The union of the end-of-sequence ids of generation configs and tokenizers."""
    ids: set[int] = set()
    for source in sources:
        eos = getattr(source, "eos_token_id", None)
        ids |= set(eos) if isinstance(eos, (list, tuple)) else set() if eos is None else {eos}
    return ids


def get_model_id(model: str | PreTrainedModel) -> str:
    """The path or hub id that a model was loaded from; empty for one built in memory."""
    return model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or ""


def _hub_kwargs(args: TokenSelectiveConfig, init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    revision = (init_kwargs or {}).get("revision")
    return {"trust_remote_code": args.trust_remote_code, **({"revision": revision} if revision else {})}


def _from_pretrained(
    load: Callable[..., Any], name: str, field: str, what: str, init_kwargs: Any = None, **kwargs: Any
) -> Any:
    """`load(name)`, its many exceptions turned into one line that names the setting."""
    offline = None if os.path.exists(name) else offline_reason()
    try:
        return load(name, **kwargs)
    except Exception as error:  # OSError, ValueError, KeyError, safetensors' and tokenizers' own, ...
        if os.path.isfile(name):
            reason = "it is a file, expected a folder or a hub name"
        elif not os.path.isdir(name) and _is_hub_error(error):
            reason = "no such folder here, and " + (f"no copy; {offline}" if offline else "the hub doesn't have it")
        else:
            reason = " ".join(str(error).split())[:300] + (
                f" (with {_INIT_KWARGS[field]} {init_kwargs})" if init_kwargs else ""
            )
        raise ModelError(f"{field}: no {what} in {name!r}: {reason}") from error


def _is_hub_error(error: BaseException | None) -> bool:
    """Whether files couldn't be had; a gated model's and a missing revision's own messages say more than ours."""
    while error is not None:
        if isinstance(error, GatedRepoError | RevisionNotFoundError):
            return False
        if isinstance(error, HfHubHTTPError | LocalEntryNotFoundError | OfflineModeIsEnabled | HFValidationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def load_tokenizer(name: str, field: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """A model's tokenizer; `kwargs` are `from_pretrained`'s. Raises `ModelError`."""
    folder = Path(name)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        # transformers would make one up from the model type
        raise ModelError(f"{field}: no tokenizer in {name!r}: the folder has no tokenizer files")
    return _from_pretrained(AutoTokenizer.from_pretrained, name, field, "tokenizer", **kwargs)


def _check_vocab_fits(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, field: str) -> None:
    """An id beyond the embedding would be an index error in the middle of training."""
    largest, rows = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if largest >= rows:
        raise ModelError(f"{field}: its tokenizer has {largest + 1} ids, but the model only {rows} embeddings")
