"""How prompts are put to a model: as in the training of the run that made it, or else as its suite says."""

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
    """What becomes of a prompt before its tokens.

    Attributes:
        template: a digest of the chat template; None: prompts are plain text.
        args: what the template is given besides the messages.
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
    chat: bool,
    is_explicit: bool,
    defaults: Mapping[str, Any],
    model_args: Mapping[str, Any],
) -> PromptFormat | None:
    """A model's, None where it would need a chat template and has none.

    Args:
        path: its folder or hub id.
        tokenizer: its own.
        chat: whether prompts go through chat templates.
        is_asked_for: whether somebody said so; otherwise a run that was trained on plain text is asked in plain text.
        defaults: for models that aren't of a run, as far as their template knows them.
        model_args: of the harness; `enable_thinking` among them wins.

    Raises:
        DataError: the configuration of the run can't be read.
    """
    run = _find_run_config(Path(path))
    if not chat or (run and not is_explicit and run.get("chat_template_source") == "none"):
        return PromptFormat(None, {})
    if not tokenizer.chat_template:
        return None
    template_hash = str(tokenizer.chat_template)
    known = {name: value for name, value in defaults.items() if name in template_hash}
    chat_template_kwargs = known if run is None else dict(run.get("chat_template_kwargs") or {})
    if ENABLE_THINKING in model_args:
        chat_template_kwargs[ENABLE_THINKING] = model_args[ENABLE_THINKING]
    return PromptFormat(hashlib.sha256(template_hash.encode()).hexdigest()[:12], chat_template_kwargs)


def _find_run_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run whose student, or whose checkpoint, is in a folder."""
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    return next((read_run_config(place) for place in places if (place / RUN_CONFIG_NAME).is_file()), None)
