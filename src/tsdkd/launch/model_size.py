"""Computes the size of a model from its configuration alone."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..errors import ModelError, first_line


@dataclass
class ModelSize:
    """The size of a model, in numbers (not bytes).

    Attributes:
        num_parameters: number of all parameters.
        num_active_parameters: number of parameters that compute a token; fewer than all in a mixture of experts.
        num_trainable_parameters: number of trained parameters.
        parameters_per_layer: parameters of a decoder layer.
        embedding_parameters: parameters of the input embedding, `V x H`.
        has_tied_embeddings: whether the output layer shares the input embedding.
        vocab_size, num_hidden_layers, hidden_size, num_attention_heads: sizes of the decoder.
        residual_numbers: numbers per token of the residual stream that one layer stores for its backward pass, in the
            stream's precision.
        activation_numbers: other numbers per token that one layer stores, in the precision of matrix products.
        kv_cache_numbers: numbers per token that one layer stores in the key-value cache.
        max_position_embeddings: maximum sequence length, tokens.
    """

    num_parameters: int
    num_active_parameters: int
    num_trainable_parameters: int
    parameters_per_layer: int
    embedding_parameters: int
    has_tied_embeddings: bool
    vocab_size: int
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    residual_numbers: int
    activation_numbers: int
    kv_cache_numbers: int
    max_position_embeddings: int

    @property
    def adapter_parameters(self) -> int:
        """Number of LoRA parameters; 0 without LoRA."""
        return self.num_trainable_parameters if self.num_trainable_parameters < self.num_parameters else 0


def compute_model_size(config: PretrainedConfig, lora_r: int = 0) -> ModelSize:
    """Compute the size of a model without its weights. Raises `ModelError`.

    Args:
        config: the model's configuration.
        lora_r: LoRA rank, for adapters on all linear layers; 0 for none.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a model's code may raise anything for an invalid configuration
        raise ModelError(f"{config.name_or_path}: invalid model configuration: {first_line(error)}") from error
    text = config.get_text_config()
    num_parameters = sum(p.numel() for p in model.parameters())
    layer = model.base_model.layers[0]
    linear = [m for m in model.base_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    adapter_parameters = sum(lora_r * (m.in_features + m.out_features) for m in linear)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    # rotated queries and keys, values and attention output; feed-forward gate, activation, up projection and product
    activation_numbers = 2 * queries + 2 * keys + 4 * text.intermediate_size
    if hasattr(layer.self_attn, "q_norm"):
        activation_numbers += 2 * (queries + keys)
    return ModelSize(
        num_parameters=num_parameters,
        num_active_parameters=num_parameters - _count_idle_parameters(model, text),
        num_trainable_parameters=adapter_parameters if lora_r else num_parameters,
        parameters_per_layer=sum(p.numel() for p in layer.parameters()),
        embedding_parameters=model.get_input_embeddings().weight.numel(),
        has_tied_embeddings=bool(text.tie_word_embeddings),
        vocab_size=text.vocab_size,
        num_hidden_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        residual_numbers=4 * text.hidden_size,  # inputs and outputs of two norms
        activation_numbers=activation_numbers,
        kv_cache_numbers=2 * keys,
        max_position_embeddings=getattr(text, "max_position_embeddings", None) or 2**31,
    )


def _count_idle_parameters(model: torch.nn.Module, config: PretrainedConfig) -> int:
    """Count the parameters of the experts that don't compute a token."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    if not chosen or not experts:
        return 0
    in_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return in_experts * (experts - chosen) // experts
