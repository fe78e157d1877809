"""How prompts are rendered for a model: as in the run that trained it, or else by the settings of the suite."""

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
        chat_template_kwargs: arguments of the chat template, other than the messages.
    """

    template_hash: str | None
    chat_template_kwargs: dict[str, Any]

    @property
    def applies_chat_template(self) -> bool:
        """Whether prompts are rendered with the chat template."""
        return self.template_hash is not None


def resolve_prompt_format(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    apply_chat_template: bool,
    is_explicit: bool,
    defaults: Mapping[str, Any],
    model_args: Mapping[str, Any],
) -> PromptFormat | None:
    """The prompt format of a model, or None if it needs a chat template and doesn't have one.

    Args:
        path: folder or hub id of the model.
        tokenizer: its tokenizer.
        apply_chat_template: whether to render prompts with the chat template.
        is_explicit: whether the user chose `apply_chat_template`. If not, a model that was trained on plain text gets
            plain text.
        defaults: arguments of the chat template for models that no run trained; those that it doesn't know are left
            out.
        model_args: arguments of the harness's model class; `enable_thinking` among them overrides the others.

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
    """The configuration of the run whose student or checkpoint is in a folder, if there is one."""
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    return next((read_run_config(place) for place in places if (place / RUN_CONFIG_NAME).is_file()), None)
