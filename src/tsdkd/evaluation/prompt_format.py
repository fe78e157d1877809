"""Renders prompts for a model: as in the training of the run that made it, or else as its suite says."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..run.output_dir import RUN_CONFIG_NAME, read_run_config

ENABLE_THINKING = "enable_thinking"


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt is rendered before it is tokenized.

    Attributes:
        template_hash: a digest of the chat template; None: prompts are plain text.
        chat_template_kwargs: arguments of the template beside the messages.
    """

    template_hash: str | None
    chat_template_kwargs: dict[str, Any]

    @property
    def applies_chat_template(self) -> bool:
        """Whether prompts go through the chat template."""
        return self.template_hash is not None


def resolve_prompt_format(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    apply_chat_template: bool,
    is_explicit: bool,
    defaults: Mapping[str, Any],
    model_args: Mapping[str, Any],
) -> PromptFormat | None:
    """A model's, None where it would need a chat template and has none.

    Args:
        path: its folder or hub id.
        tokenizer: the model's.
        apply_chat_template: whether prompts go through chat templates.
        is_explicit: whether the user said so; otherwise a run that was trained on plain text gets plain text.
        defaults: for models that aren't of a run, as far as their template knows them.
        model_args: of the harness; `enable_thinking` among them wins.

    Raises:
        DataError: the configuration of the run can't be read.
    """
    run = _find_run_config(Path(path))
    if not apply_chat_template or (run and not is_explicit and run.get("chat_template_source") == "none"):
        return PromptFormat(None, {})
    if not tokenizer.chat_template:
        return None
    template = str(tokenizer.chat_template)
    known_defaults = {name: value for name, value in defaults.items() if name in template}
    chat_template_kwargs = known_defaults if run is None else dict(run.get("chat_template_kwargs") or {})
    if ENABLE_THINKING in model_args:
        chat_template_kwargs[ENABLE_THINKING] = model_args[ENABLE_THINKING]
    return PromptFormat(hashlib.sha256(template.encode()).hexdigest()[:12], chat_template_kwargs)


def _find_run_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run whose student, or whose checkpoint, is in a folder."""
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    return next((read_run_config(place) for place in places if (place / RUN_CONFIG_NAME).is_file()), None)
