"""Copies weights to a vLLM engine on a CPU, which keeps its matrices in a packed layout."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from vllm import LLM
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


def load_packed_weights(llm: LLM, weights: Iterable[tuple[str, Tensor]], student: Any) -> None:
    """Load all weights and pack the engine's matrices again.

    `reload_weights` allocates, converts and packs each matrix anew. Embeddings and the LM head, often the largest
    matrices, also exist unpacked in the engine, so they are loaded in place. A tied LM head shares the packed
    embeddings.

    Args:
        llm: the engine.
        weights: name and value of each parameter of the student.
        student: the model that owns them.
    """
    storages = set(_embedding_storages(student))
    embeddings: list[tuple[str, Tensor]] = []

    def others() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            if weight.data_ptr() in storages:
                embeddings.append((name, weight))
            else:
                yield name, weight

    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": others()})
    if embeddings:
        llm.apply_model(lambda model: model.load_weights(embeddings))
    llm.apply_model(_pack_embeddings)


def _embedding_storages(student: Any) -> Iterator[int]:
    for layer in (student.get_input_embeddings(), student.get_output_embeddings()):
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.numel():  # ZeRO-3 leaves empty tensors; vLLM then reloads the copies
            yield weight.data_ptr()


def _pack_embeddings(model: Any) -> None:
    packed: dict[int, Any] = {}
    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding):
            first = packed.setdefault(layer.weight.data_ptr(), layer)
            if first is layer:
                layer.quant_method.process_weights_after_loading(layer)
            else:
                layer.cpu_linear = first.cpu_linear
