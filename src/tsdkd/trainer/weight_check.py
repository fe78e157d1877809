"""Checks that an engine samples from the student's current weights.

With stale weights in the engine, training would run without errors but learn nothing.
"""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from ..data import completion_mask, pad_sequences, target_ids
from ..errors import EngineError
from ..lm_head.statistics import StatisticsRequest
from ..rollout.base import Completion
from ..selection import token_index
from .forward import HeadForward

NUM_CHECKED_COMPLETIONS = 4


def check_engine_weights(
    head_forward: HeadForward,
    accelerator: Accelerator,
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    top_p: float,
) -> None:
    """Compare the engine's log-probabilities of some of its tokens with the student's. All processes must call it.

    The tolerance for the mean absolute difference is two units in the last place of a bfloat16 logit of typical size
    (rounding of the logit itself explains a quarter of a unit, the layers below it the rest), plus the effect of
    top-p.

    Raises:
        EngineError: the difference exceeds the tolerance on any process.
    """
    step = max(1, len(completions) // NUM_CHECKED_COMPLETIONS)
    chosen = list(zip(prompts, completions, strict=True))[::step][:NUM_CHECKED_COMPLETIONS]
    batch = pad_sequences([prompt for prompt, _ in chosen], [completion.ids for _, completion in chosen])
    batch = {name: value.to(accelerator.device) for name, value in batch.items()}
    index = token_index(completion_mask(batch))
    sampled = target_ids(batch, index).unsqueeze(-1)
    student_statistics = head_forward.compute_statistics(model, batch, index, StatisticsRequest(ids=sampled, top_k=1))
    engine_logps = torch.tensor([logp for _, c in chosen for logp in c.logps or []], device=index.device)
    difference = (student_statistics.logps.squeeze(-1) - engine_logps).abs().mean()
    tolerance = 2 * 2**-7 * student_statistics.topk_logits.abs().mean() - math.log(top_p)
    gathered = torch.stack([difference, tolerance]).float() if len(engine_logps) else torch.tensor([0.0, 1.0])
    for difference, tolerance in accelerator.gather(gathered.to(index.device)).view(-1, 2).tolist():
        if not difference <= tolerance:
            raise EngineError(
                "the engine doesn't sample from the student's weights: its log-probabilities differ by "
                f"{difference:.3g} nats per token, more than the {tolerance:.3g} that bfloat16 explains. Likely "
                "causes: a server with another model or without --logprobs-mode processed_logprobs, weights that are "
                "not synchronized (tied embeddings, adapters, quantized layers), or a different implementation of the "
                "model in the engine (try vllm_model_impl: transformers)"
            )
