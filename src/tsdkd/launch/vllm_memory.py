"""What a colocated vLLM engine does with its share of a GPU."""

from dataclasses import dataclass

from .model_size import ModelSize
from .workload import GIB, VllmMemoryConfig

# for a logit that is sampled from: in float32, its probability, both sorted, int64 ids, sums
SAMPLING_BYTES_PER_LOGIT = 24
_CUDA_GRAPH_BYTES = 1.5 * GIB  # 0.4 to 1.6 GiB in logs of vLLM 0.23 to 0.27
SLEEPING_ENGINE_BYTES = 2.0 * GIB  # asleep it gives back weights and cache, not graphs and what its libraries hold


@dataclass
class EngineMemory:
    """What a colocated engine's share holds on each GPU, bytes.

    Attributes:
        weights: in half precision; `overhead`: beside them while it samples.
        kv_cache: what is left; `kv_cache_per_sequence`: what a sequence of full length takes of it.
        minimum: the smallest share that starts: a cache for one sequence of the engine's context.
    """

    weights: float
    overhead: float
    kv_cache: float
    kv_cache_per_sequence: float
    minimum: float


def split_engine_memory(student: ModelSize, engine: VllmMemoryConfig, sequence_length: int) -> EngineMemory:
    """Where an engine's share goes; `sequence_length`: of a sequence."""
    weights = 2 * student.num_parameters / engine.tensor_parallel_size
    overhead = _CUDA_GRAPH_BYTES + engine.max_num_seqs * student.vocab_size * SAMPLING_BYTES_PER_LOGIT
    bytes_per_token = 2 * student.num_hidden_layers * student.kv_cache_numbers / engine.tensor_parallel_size
    return EngineMemory(
        weights=weights,
        overhead=overhead,
        kv_cache=engine.memory_bytes - weights - overhead,
        # those of all processes that share an engine are cached by all of them, each a part
        kv_cache_per_sequence=sequence_length * bytes_per_token * engine.tensor_parallel_size,
        minimum=weights + overhead + engine.max_model_len * bytes_per_token,
    )
