"""Rollouts with vLLM through TRL's `VLLMGeneration`, in this process (colocate) or on a server.

Differences from TRL: a seed and a limit for each prompt, weight transfer for CPU engines and for students with
adapters, and timeouts for server requests.
"""

import random
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, is_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config.base import TokenSelectiveConfig
from ...config.logs import get_logger
from ...errors import EngineError, first_line
from ..base import Completion, SamplingConfig, SeedKey
from ..seeding import prompt_seed
from .colocate import extra_engine_args, iter_completions, shared_sampling_params, wrap_engine_errors
from .cpu_weights import load_packed_weights
from .server import connect_to_server
from .weights import iter_merged_parameters

# isort: split
from trl.generation import vllm_generation

logger = get_logger(__name__)


class VLLMSampler(vllm_generation.VLLMGeneration):
    """A vLLM engine that samples from the student's weights.

    Args:
        model: the student, unwrapped.
        accelerator: the run's accelerator.
        args: the `vllm_…` settings.
        sampling: sampling parameters.
        tokenizer: the student's tokenizer.
        longest: maximum length of prompt plus completion, tokens.

    Raises:
        EngineError: the engine can't start.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        accelerator: Accelerator,
        args: TokenSelectiveConfig,
        sampling: SamplingConfig,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
    ) -> None:
        self.sampling = sampling
        self.args = args
        self.needs_weight_check = False
        self._synced_version: Hashable = None  # version of the engine's weights
        self._sync_count = 0
        self._requester = ThreadPoolExecutor(max_workers=1)  # of the main process, for a server
        self._requested: list[Future[list[Completion]]] = []  # what the server is sampling
        self._llm_weights_sleeping = False  # TRL sets it only if the engine can sleep
        super().__init__(
            model=model,
            accelerator=accelerator,
            processing_class=tokenizer,
            mode=args.vllm_mode,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=longest,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
        )

    def _init_vllm(self) -> None:
        if self.mode == "server":
            self._run_on_main_process(self._connect)
            return
        logger.info("starting vLLM; this takes a minute or two")
        with (
            _preserve_global_state(self.accelerator.device),
            _add_engine_args(extra_engine_args()),
            wrap_engine_errors("vLLM can't start", self.args),
        ):
            super()._init_vllm()

    def _connect(self) -> None:
        self.vllm_client = connect_to_server(self.args, self.max_model_length)
        if self.accelerator.device.type == "cuda":
            with wrap_engine_errors("the vLLM server does not accept weights"):
                self.vllm_client.init_communicator(device=self.accelerator.device)

    def _run_on_main_process(self, work: Callable[[], Any], group: Any = None) -> Any:
        """Run `work` on the main process and broadcast its result. Errors are raised on all processes.

        Args:
            work: what to run.
            group: all processes, for calls from other threads than the main thread.
        """
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [(work(), None)]
            except Exception as error:
                outcome = [(None, first_line(error))]
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(outcome, src=0, group=group)
        value, problem = outcome[0]
        if problem is not None:
            raise EngineError(problem)
        return value

    def _run_on_all_processes(self, work: Callable[[], None]) -> None:
        """Run `work` on all processes. An error on one process is raised on all of them."""
        problem = None
        try:
            work()
        except Exception as error:
            problem = first_line(error)
        for found in gather_object([problem]):
            if found is not None:
                raise EngineError(found)

    # Weights

    def update(self, weights_version: Hashable) -> bool:
        """See `Sampler`. An engine that slept has lost its weights, so they are copied again."""
        is_asleep = self.mode == "colocate" and self._llm_weights_sleeping
        if weights_version == self._synced_version and not is_asleep:
            return False
        self.sync_weights()
        if weights_version != self._synced_version:
            self.needs_weight_check = self._sync_count % self.args.vllm_check_every == 0
            self._sync_count += 1
        self._synced_version = weights_version
        return True

    def sync_weights(self) -> None:
        """Copy the student's weights to the engine. All processes must call it, to gather sharded weights."""
        wait(self._requested)  # all their tokens are sampled from the same weights
        with wrap_engine_errors("copying the weights to vLLM failed"):
            on_cpu = self.accelerator.device.type == "cpu"
            if not on_cpu:
                torch.cuda.synchronize()  # vLLM reads them on its own streams
            if self.mode == "server":
                self._sync_server_from_disk() if on_cpu else self._run_on_all_processes(super().sync_weights)
            else:
                self._run_on_all_processes(partial(self._sync_colocate, packed=on_cpu))

    def _sync_server_from_disk(self) -> None:
        """Send weights to a server through a folder. TRL uses NCCL, which requires CUDA devices."""
        weights = {name: w.clone() for name, w in self._iter_named_params()}

        def send() -> None:
            with tempfile.TemporaryDirectory() as folder:
                save_file(weights, Path(folder, "model.safetensors"))
                self.vllm_client.load(folder)
                self.vllm_client.reset_prefix_cache()

        self._run_on_main_process(send)

    def _sync_colocate(self, packed: bool) -> None:
        """Load all tensors in one call. TRL makes one call per tensor, each of which traverses the full model.

        Args:
            packed: whether the engine stores its matrices in another layout, as on a CPU.
        """
        if self._llm_weights_sleeping:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        weights = self._iter_named_params()
        if self._dist.is_zero3:  # vLLM may read a tensor later, when it is no longer gathered
            weights = ((name, weight.clone()) for name, weight in weights)
        if packed:
            load_packed_weights(self.llm, weights, self.model)
        else:
            self.llm.apply_model(lambda model: model.load_weights(weights))
        self.llm.reset_prefix_cache()

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        if is_peft_model(self.model):
            with self._dist.gather_params(list(self.model.parameters())):
                yield from iter_merged_parameters(self.model)
        else:
            yield from super()._iter_named_params()

    # Completions

    def generate(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], limits: Sequence[int], seed_keys: Sequence[SeedKey]
    ) -> list[Completion]:
        """See `Sampler`."""
        if self.mode == "server":
            return self.start(prompts, limits, seed_keys)()
        return self._generate_colocate(_build_requests(prompts, limits, seed_keys))

    def start(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], seed_keys: Sequence[SeedKey]
    ) -> Callable[..., list[Completion]]:
        """Have a server begin what `generate` does. Returns a function that waits; all processes must call it.

        In another thread than the main one, give it a group of all processes. New weights are copied to the server
        only after it has sampled all completions.
        """
        requests = _build_requests(prompts, limits, seed_keys)
        counts = gather_object([len(requests)])
        parameters = shared_sampling_params(self.sampling, self.model.config.get_text_config().vocab_size)
        all_requests = gather_object([request | parameters for request in requests])
        before = sum(counts[: self.accelerator.process_index])
        if self.accelerator.is_main_process:
            sample = partial(self.vllm_client.complete, all_requests)
            self._requested = [self._requester.submit(lambda: _sort_by_position(sample()))]
        requested = self._requested

        def finish(group: Any = None) -> list[Completion]:
            completions: list[Completion] = self._run_on_main_process(lambda: requested[0].result(), group)
            return completions[before : before + len(requests)]

        return finish

    def _generate_colocate(self, requests: list[dict[str, Any]]) -> list[Completion]:
        local_slice = slice(None)
        if self.tensor_parallel_size > 1:  # a group's engines process the requests of all its processes
            gathered: list[Any] = [None] * self.tensor_parallel_size
            torch.distributed.all_gather_object(gathered, requests, group=self.tp_group)
            before = sum(len(part) for part in gathered[: torch.distributed.get_rank(group=self.tp_group)])
            local_slice = slice(before, before + len(requests))
            requests = [request for part in gathered for request in part]
            if is_peft_model(self.model) and self.accelerator.device.type == "cuda":
                # as in TRL: the small all-reduce of the adapters' gradients may still be running
                torch.distributed.barrier(device_ids=[self.accelerator.local_process_index])
        if self.enable_sleep_mode:
            self.llm.wake_up(tags=["kv_cache"])
        completions = _sort_by_position(iter_completions(self.llm, requests, self.sampling))[local_slice]
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
            self._llm_weights_sleeping = True
        return completions


def _build_requests(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], seed_keys: Sequence[SeedKey]
) -> list[dict[str, Any]]:
    return [
        {"prompt": list(prompt), "max_tokens": limit, "seed": prompt_seed(*key)}
        for prompt, limit, key in zip(prompts, limits, seed_keys, strict=True)
    ]


def _sort_by_position(completions: Iterable[tuple[int, Completion]]) -> list[Completion]:
    return [completion for _, completion in sorted(completions, key=itemgetter(0))]


@contextmanager
def _add_engine_args(engine_args: dict[str, Any]) -> Iterator[None]:
    """Pass these additional arguments to engines that TRL starts within the block.

    TRL has no parameter for them, so `LLM` in its module is replaced temporarily. On a GPU there are no additional
    arguments and nothing is replaced.
    """
    if not engine_args:
        yield
        return
    engine_class = vllm_generation.LLM
    vllm_generation.LLM = partial(engine_class, **engine_args)
    try:
        yield
    finally:
        vllm_generation.LLM = engine_class


@contextmanager
def _preserve_global_state(device: torch.device) -> Iterator[None]:
    """Restore global state: on start, vLLM seeds all generators and, on a CPU, blocks changes of the thread count."""
    set_num_threads, python, numpy = torch.set_num_threads, random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):  # the default is all GPUs
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            random.setstate(python)
            np.random.set_state(numpy)
