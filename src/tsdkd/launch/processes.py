"""Whether a command starts processes of its own, and how many: one a visible GPU, and never twice."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config.coercion import coerce
from ..config.launch import LAUNCHED, find_launch_config, launch_config_names, launch_num_processes, read_launch_config
from ..errors import ConfigError
from .accelerate import default_launch_config

logger = logging.getLogger(__name__)

_OFFLOAD_MARKER = "offload"  # in the name of a shipped configuration that does something for one process too
# by whom a process may have been started without accelerate's knowing its device
_WORLD_SIZE_VARS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class LaunchSpec:
    """Processes to be started.

    Attributes:
        config: a launch configuration.
        options: of `accelerate launch`.
    """

    config: str
    options: dict[str, Any]

    @property
    def num_processes(self) -> int:
        """Number of processes, over all machines."""
        return launch_num_processes(self.config, self.options)

    @property
    def uses_deepspeed(self) -> bool:
        """Whether it shards with DeepSpeed."""
        return read_launch_config(self.config).get("distributed_type") == "DEEPSPEED"


def num_visible_gpus() -> int:
    """Number of GPUs that a process here would see; asks NVML, so that CUDA isn't initialised."""
    if not os.environ.get("ACCELERATE_TORCH_DEVICE", "cuda").startswith("cuda"):
        return 0
    import torch

    return torch.cuda.device_count()


def resolve_launch(
    raw_values: Mapping[str, Any], flags: Mapping[str, Any], do_train: bool = True
) -> LaunchSpec | None:
    """The processes that a run needs beside this one, None where this one does it alone or is one of them.

    Args:
        raw_values: the values of the run's file and flags, as they stand there; parsing refuses the bad ones.
        flags: what the command line says of the launch: `accelerate_config` and options of `accelerate launch`.
        do_train: whether the run follows: one that this process does alone then gets one GPU only.

    Raises:
        ConfigError: processes that can't be started here.
    """
    if LAUNCHED in os.environ:
        return None
    # accelerate tells a process that is alone its precision only
    launcher_vars = [name for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION") if name in os.environ]
    if launcher_vars and flags:
        raise ConfigError([f"{', '.join(flags)}: a launcher has started this process already; leave one of them"])
    if launcher_vars:
        if do_train and "LOCAL_RANK" not in launcher_vars:
            _use_single_gpu(num_visible_gpus())
        return None
    try:
        config = coerce(raw_values.get("accelerate_config"), str | None)
        num_processes = coerce(raw_values.get("num_processes"), int | None)
        on_cpu = coerce(raw_values.get("use_cpu", False), bool)
        path = None if config is None else find_launch_config(config)
    except (ConfigError, ValueError):
        return None
    file = read_launch_config(None if path is None else str(path))
    gpus = 0 if on_cpu else num_visible_gpus()
    if not flags and _is_externally_launched(gpus):
        return None
    if config is None and (flags or gpus > 1 or (num_processes or 1) > 1):
        config = default_launch_config()
        file = read_launch_config(config)
    is_user_config = config is not None and config not in launch_config_names()
    machines = flags.get("num_machines") or file.get("num_machines", 1)
    num_processes = num_processes or (file.get("num_processes") if is_user_config else None)
    _validate_num_processes(num_processes, gpus * machines, config, file)
    if machines > 1 and not (flags.get("main_process_ip") or file.get("main_process_ip")):
        raise ConfigError([f"main_process_ip: missing, {machines} machines must know the first one's address"])
    num_local_processes = gpus or (1 if flags else 0)
    num_processes = num_processes or (
        1 if file.get("distributed_type") == "NO" else num_local_processes * machines or None
    )
    is_explicit = is_user_config or machines > 1 or "accelerate_config" in flags or _OFFLOAD_MARKER in (config or "")
    if config is None or (num_processes == 1 and not is_explicit) or (num_processes is None and not flags):
        if do_train:
            _use_single_gpu(gpus)
            if config not in (None, "single", "ddp"):
                unused = f"accelerate_config: {config} isn't used: one process here, nothing to share"
                logger.warning(f"tsdkd: {unused}")
        return None
    options = {name: value for name, value in flags.items() if name != "accelerate_config"}
    if num_processes is not None:
        options["num_processes"] = num_processes
    if machines == 1 and "main_process_port" not in file:
        options.setdefault("main_process_port", 0)  # a free one: another run may be on this machine's other GPUs
    return LaunchSpec(config, options)


def _is_externally_launched(gpus: int) -> bool:
    """Whether something else started this process. On CPUs accelerate makes a group of those that MPI or RANK and
    WORLD_SIZE tell of; otherwise each would train alone. Raises `ConfigError`."""
    names = [name for name in _WORLD_SIZE_VARS if _parse_int(os.environ.get(name)) > 1]
    if names and (gpus or names == ["SLURM_STEP_NUM_TASKS"]):
        raise ConfigError(
            [
                f"num_processes: {names[0]} says that this is one process of several, yet LOCAL_RANK doesn't say "
                "which: each would train alone; start one a GPU by torchrun or accelerate launch, or one a node with "
                "--num_machines and --machine_rank, as `tsdkd slurm` does"
            ]
        )
    return bool(names)


def configured_num_processes(config: str | None, on_cpu: bool) -> int | None:
    """Number of processes of a launch configuration, for machines without a GPU whose count would tell it.

    None without a configuration, and on CPUs.
    """
    return None if config is None or on_cpu or num_visible_gpus() else launch_num_processes(config, {})


def _parse_int(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _validate_num_processes(num_processes: int | None, gpus: int, config: str | None, file: Mapping[str, Any]) -> None:
    if num_processes and gpus and num_processes > gpus:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        among = f" (CUDA_VISIBLE_DEVICES is {chosen})" if chosen else ""
        raise ConfigError([f"num_processes: must be at most the visible GPUs, {gpus}{among}, found {num_processes}"])
    if file.get("distributed_type") == "NO" and num_processes and num_processes > 1:
        raise ConfigError([f"num_processes: accelerate_config {config} starts one process, found {num_processes}"])


def _use_single_gpu(gpus: int) -> None:
    """This process does it alone, on one GPU: `Trainer` would spread it over all that it sees."""
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
