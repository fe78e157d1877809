"""A teacher whose layers run on vLLM servers: only its output layer is here.

The servers send the last, normed hidden states. With the output layer, they give the distribution over the whole
vocabulary, and the fused head takes them as it takes those of a local teacher.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import cached_file

from ..config.base import TokenSelectiveConfig
from ..config.logs import get_logger
from ..errors import ModelError
from ..files import shorten_path
from ..lm_head.projection import get_output_layer, get_projection
from .finite_weights import require_finite
from .hub import load_pretrained
from .teacher_client import HiddenStates, ServedModel, TeacherClient

logger = get_logger(__name__)

_FIELD = "teacher_model_name_or_path"
_NUM_PROBE_TOKENS = 16
MAX_KL = 0.01
"""Mean KL divergence from the checkpoint's distributions to the served ones that is accepted, nats. bfloat16 causes
less than 0.001."""


class ServedBackbone(nn.Module):
    """The layers of a teacher, which run on servers. Replaces the backbone of a transformers model.

    Args:
        client: asks the servers.
    """

    def __init__(self, client: TeacherClient) -> None:
        super().__init__()
        self.client = client
        self.embed_tokens = nn.Identity()  # transformers looks for it before it returns the output layer

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        """Compute the hidden states `[B, S, H]` of sequences `[B, S]` without padding."""
        states = torch.stack(self.client.hidden_states(input_ids.tolist()))
        return BaseModelOutputWithPast(last_hidden_state=states.to(input_ids.device))


def find_client(model: Any) -> TeacherClient | None:
    """Return the client of a model whose layers run on servers; None for any other model."""
    backbone = getattr(model, "base_model", None)
    return backbone.client if isinstance(backbone, ServedBackbone) else None


def load_served_teacher(name: str, config: PretrainedConfig, args: TokenSelectiveConfig) -> PreTrainedModel:
    """Load a teacher's output layer, and nothing else of it, and connect to the servers that have its layers.

    Raises:
        ModelError: the output layer can't be loaded, or a server has another model.
        EngineError: no server answers within `teacher_server_timeout`.
    """
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}
    given = kwargs.pop("dtype", "auto")
    dtype = torch.float32 if (getattr(torch, given, None) or config.dtype) == torch.float32 else torch.bfloat16
    model = load_pretrained(_load_output_layer, name, _FIELD, "model", None, config=config, dtype=dtype, kwargs=kwargs)
    require_finite(model, _FIELD, name)
    proof = _TeacherProof(name, model, args, _compute_reference(name, dtype, kwargs))
    hidden_size = config.get_text_config().hidden_size
    urls = args.teacher_server_base_url or []
    client = TeacherClient(urls, hidden_size, dtype, args.teacher_server_timeout, proof.verify)
    setattr(model, model.base_model_prefix, ServedBackbone(client))
    client.hidden_states([proof.ids])  # which checks the first server
    return model


def _load_output_layer(
    name: str, config: PretrainedConfig, dtype: torch.dtype, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Build the model with an empty backbone; of its files, only the one with the output layer is read."""
    hub_kwargs: dict[str, Any] = {
        key: kwargs[key] for key in ("cache_dir", "revision", "subfolder", "token") if key in kwargs
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=kwargs["trust_remote_code"])
    layer = get_output_layer(model)
    for attribute, parameter in [*layer.named_parameters(recurse=False)]:
        names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
        tensor = _read_tensor(name, names, hub_kwargs).to(dtype)
        setattr(layer, attribute, nn.Parameter(tensor, requires_grad=False))
    shape = (config.get_text_config().vocab_size, config.get_text_config().hidden_size)
    if tuple(layer.weight.shape) != shape:
        raise ValueError(f"its output layer is {tuple(layer.weight.shape)}, and config.json says {shape}")
    setattr(model, model.base_model_prefix, nn.Identity())
    if rest := [n for n, p in model.named_parameters() if p.is_meta]:
        raise ValueError(f"teacher_placement server needs a backbone and an output layer alone, found {rest[0]}")
    return model


def _read_tensor(name: str, names: Sequence[str], hub_kwargs: dict[str, Any]) -> Tensor:
    """Read the first of the tensors from a checkpoint; `names` may be those of a part of the checkpoint's model."""

    def find(file: str) -> str | None:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub_kwargs)

    if (index := find("model.safetensors.index.json")) is not None:
        weights = json.loads(Path(index).read_bytes())["weight_map"]
    elif (single := find("model.safetensors")) is not None:
        with safe_open(single, framework="pt") as file:
            weights = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        raise ValueError("teacher_placement server needs its weights as safetensors")
    found = next((key for n in names for key in weights if key == n or key.endswith(f".{n}")), None)
    if found is None:
        raise ValueError(f"its weights have no {' or '.join(names)}")
    with safe_open(find(weights[found]), framework="pt") as file:
        return file.get_tensor(found)


@torch.no_grad()
def _compute_reference(name: str, dtype: torch.dtype, kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states of the probe by the checkpoint itself, one layer in memory at a time, for all processes.

    None if not all of its weights are on the first process's machine: they are not downloaded for this.
    """
    reference: list[Tensor | None] = [None]
    if PartialState().is_main_process:
        logger.info(f"reading the weights of {shorten_path(name)} once, to check the teacher's server")
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it says that weights are on the disk
        try:
            with TemporaryDirectory() as folder:
                model = AutoModelForCausalLM.from_pretrained(
                    name, dtype=dtype, device_map={"": "disk"}, offload_folder=folder, local_files_only=True, **kwargs
                )
                ids = torch.tensor([_probe_ids(model.config)])
                reference = [model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]]
        except OSError:
            logger.warning(
                f"the weights of {name} aren't all on this machine, so the server's model is checked by its name only"
            )
    broadcast_object_list(reference)
    return reference[0]


def _probe_ids(config: PretrainedConfig) -> list[int]:
    return [(7 + 131 * i) % config.get_text_config().vocab_size for i in range(_NUM_PROBE_TOKENS)]


class _TeacherProof:
    """Checks that a server has the teacher's weights and returns its last, normed hidden states.

    Args:
        name: path or hub id of the teacher.
        model: the teacher's output layer and configuration.
        args: `max_length`.
        reference: the checkpoint's own hidden states of the probe, `[T, H]`. If None, the first server's are kept.
    """

    def __init__(
        self, name: str, model: PreTrainedModel, args: TokenSelectiveConfig, reference: Tensor | None
    ) -> None:
        self.name, self.model, self.reference = name, model, reference
        self.max_length = args.max_length
        self.ids = _probe_ids(model.config)

    def verify(self, url: str, served: ServedModel, ask: HiddenStates) -> None:
        """See `tsdkd.models.teacher_client.Verify`."""
        server = f"teacher_server_base_url: the server at {url}"
        if self.max_length and served.context_length is not None and served.context_length < self.max_length:
            raise ModelError(
                f"{server} accepts {served.context_length} tokens, and max_length is {self.max_length}; start it with "
                f"--max-model-len {self.max_length}"
            )
        if self.reference is None and Path(served.root).name != Path(self.name).name:
            raise ModelError(f"{server} serves {served.root}, not {self.name}")
        states = ask(self.ids)
        if not states.isfinite().all():
            raise ModelError(f"{server} sends hidden states that are not finite")
        if (states.float().norm(dim=-1) - 1).abs().max() < 0.01:
            raise ModelError(f"{server} scales hidden states to length 1; start it with `tsdkd serve teacher`")
        if self.reference is None:
            self.reference = states
        kl = self._mean_kl(self.reference, states)
        if not kl <= MAX_KL:
            raise ModelError(
                f"{server} serves {served.root}, whose distributions differ from those of {self.name} by "
                f"{kl:.2g} nats (KL divergence), more than {MAX_KL}: it is another model or another revision, its "
                "weights are quantized, or it leaves out the final norm"
            )

    @torch.no_grad()
    def _mean_kl(self, expected: Tensor, found: Tensor) -> float:
        projection = get_projection(self.model)
        projection = projection.slice_vocab(len(projection.weight), torch.float32)
        p, q = (projection.logits(x.float().to(projection.weight.device)).log_softmax(-1) for x in (expected, found))
        return float((p.exp() * (p - q)).sum(-1).mean())
