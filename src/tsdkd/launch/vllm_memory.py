"""Estimates how a colocated vLLM engine uses its share of a GPU's memory."""

from dataclasses import dataclass

from .model_size import ModelSize
from .workload import GIB, VllmMemoryConfig

# per sampled logit: float32 logit and probability, both sorted, int64 ids, sums
SAMPLING_BYTES_PER_LOGIT = 24
_CUDA_GRAPH_BYTES = 1.5 * GIB  # 0.4 to 1.6 GiB in logs of vLLM 0.23 to 0.27
SLEEPING_ENGINE_BYTES = 2.0 * GIB  # sleep frees weights and cache, but not graphs and library memory


@dataclass
class EngineMemory:
    """Parts of a colocated engine's memory share on each GPU, bytes.

    Attributes:
        weights: the student's weights in half precision.
        overhead: additional memory while the engine samples.
        kv_cache: the key-value cache, which uses the rest of the share.
        kv_cache_per_sequence: cache memory of one full-length sequence.
        minimum: the smallest share with which the engine starts: its cache fits one sequence of its context length.
    """

    weights: float
    overhead: float
    kv_cache: float
    kv_cache_per_sequence: float
    minimum: float


def split_engine_memory(student: ModelSize, engine: VllmMemoryConfig, sequence_length: int) -> EngineMemory:
    """Split an engine's memory share into its parts.

    Args:
        student: the model that the engine serves.
        engine: the engine's configuration.
        sequence_length: length of one sequence, tokens.
    """
    weights = 2 * student.num_parameters / engine.tensor_parallel_size
    overhead = _CUDA_GRAPH_BYTES + engine.max_num_seqs * student.vocab_size * SAMPLING_BYTES_PER_LOGIT
    bytes_per_token = 2 * student.num_hidden_layers * student.kv_cache_numbers / engine.tensor_parallel_size
    return EngineMemory(
        weights=weights,
        overhead=overhead,
        kv_cache=engine.memory_bytes - weights - overhead,
        # processes that share an engine cache the sequences of all of them, each process a part
        kv_cache_per_sequence=sequence_length * bytes_per_token * engine.tensor_parallel_size,
        minimum=weights + overhead + engine.max_model_len * bytes_per_token,
    )
