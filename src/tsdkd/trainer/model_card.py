"""Writes the README.md of a saved student."""

import json
import re
from importlib import metadata, resources
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..config.base import TokenSelectiveConfig
from ..config.options import enum_value, get_default

_IF_SET = ("num_generations", "chat_template_kwargs", "teacher_chat_template_kwargs", "prompt_suffix")
_ARXIV_ID = re.compile(r"arXiv (\d{4}\.\d{5})")


def write_model_card(
    path: Path,
    args: TokenSelectiveConfig,
    *,
    model_name: str,
    student: str,
    teacher: str,
    dataset: str,
    tags: list[str],
) -> None:
    """Write a model card with the method, student, teacher, data, settings and papers.

    The metadata contains only names that can be hub ids, because the hub rejects local paths there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    card = ModelCard.from_template(
        ModelCardData(
            base_model=student if _is_hub_id(student) else None,
            datasets=[dataset] if _is_hub_id(dataset) else None,
            library_name="transformers",
            tags=["generated_from_trainer", "knowledge-distillation", *tags],
        ),
        template_path=str(resources.files("tsdkd").joinpath("trainer/model_card.md.j2")),
        method=args.method,
        paper=_ARXIV_ID.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", args.paper),
        cited=[name for name in ("TSD-KD", "EOPD") if name in f"{args.method.upper()} {args.paper}"],
        model_name=model_name,
        location=json.dumps(args.hub_model_id or str(path.parent), ensure_ascii=False),
        student=student or "a model built in memory",
        teacher=teacher or "a model built in memory",
        dataset=dataset or "a data set built in memory",
        settings={name: enum_value(getattr(args, name)) for name in _settings(args)},
        versions={name: metadata.version(name) for name in ("tsdkd", "trl", "transformers", "torch", "datasets")},
    )
    card.save(path)


def _settings(args: TokenSelectiveConfig) -> list[str]:
    """Return the options that the card lists."""
    names = [name for name in args.method_options() if name not in ("max_length", "warmup_steps")]
    duration = "max_steps" if args.max_steps > 0 else "num_train_epochs"  # max_steps overrides the epochs
    names += ["learning_rate", "lr_scheduler_type", duration, "temperature", "top_p", "lmbda"]
    names += [name for name in _IF_SET if getattr(args, name) != get_default(type(args), name)]
    return list(dict.fromkeys([*names, "max_completion_length"]))


def _is_hub_id(name: str) -> bool:
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return is_id and not name.startswith(".") and not Path(name).exists()
