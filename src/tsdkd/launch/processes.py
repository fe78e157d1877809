"""Decides whether a command starts processes, and how many: by default one per visible GPU."""

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

_OFFLOAD_MARKER = "offload"  # in the names of shipped configurations that are useful for a single process
# set by launchers that do not tell accelerate which device to use
_WORLD_SIZE_VARS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class LaunchSpec:
    """Processes to start.

    Attributes:
        config: a launch configuration.
        options: options of `accelerate launch`.
    """

    config: str
    options: dict[str, Any]

    @property
    def num_processes(self) -> int:
        """Number of processes over all machines."""
        return launch_num_processes(self.config, self.options)

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the launch configuration uses DeepSpeed."""
        return read_launch_config(self.config).get("distributed_type") == "DEEPSPEED"


def num_visible_gpus() -> int:
    """Return the number of GPUs visible to a process here. Uses NVML, so that CUDA is not initialized."""
    if not os.environ.get("ACCELERATE_TORCH_DEVICE", "cuda").startswith("cuda"):
        return 0
    import torch

    return torch.cuda.device_count()


def resolve_launch(
    raw_values: Mapping[str, Any], flags: Mapping[str, Any], do_train: bool = True
) -> LaunchSpec | None:
    """Return the processes to start, or None if this process runs alone or is already one of them.

    Args:
        raw_values: the unparsed values of the run's file and flags. Invalid values are rejected later by the parser.
        flags: launch options from the command line: `accelerate_config` and options of `accelerate launch`.
        do_train: whether training follows in this process; if it runs alone, it then uses only one GPU.

    Raises:
        ConfigError: the processes can't be started here.
    """
    if LAUNCHED in os.environ:
        return None
    # accelerate sets only its precision variable for a single process
    launcher_vars = [name for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION") if name in os.environ]
    if launcher_vars and flags:
        raise ConfigError([f"{', '.join(flags)}: a launcher already started this process; remove these flags"])
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
        raise ConfigError([f"main_process_ip: missing; {machines} machines need the address of the first machine"])
    num_local_processes = gpus or (1 if flags else 0)
    num_processes = num_processes or (
        1 if file.get("distributed_type") == "NO" else num_local_processes * machines or None
    )
    is_explicit = is_user_config or machines > 1 or "accelerate_config" in flags or _OFFLOAD_MARKER in (config or "")
    if config is None or (num_processes == 1 and not is_explicit) or (num_processes is None and not flags):
        if do_train:
            _use_single_gpu(gpus)
            if config not in (None, "single", "ddp"):
                unused = f"accelerate_config: {config} is not used, because the run has only one process"
                logger.warning(f"tsdkd: {unused}")
        return None
    options = {name: value for name, value in flags.items() if name != "accelerate_config"}
    if num_processes is not None:
        options["num_processes"] = num_processes
    if machines == 1 and "main_process_port" not in file:
        options.setdefault("main_process_port", 0)  # choose a free port: another run may use this machine's other GPUs
    return LaunchSpec(config, options)


def _is_externally_launched(gpus: int) -> bool:
    """Whether another launcher started this process as part of a group.

    On CPUs, accelerate forms the group from the variables of MPI, or RANK and WORLD_SIZE. On GPUs it can't, so that
    each process would train alone.

    Raises:
        ConfigError: the process can't join its group.
    """
    names = [name for name in _WORLD_SIZE_VARS if _parse_int(os.environ.get(name)) > 1]
    if names and (gpus or names == ["SLURM_STEP_NUM_TASKS"]):
        raise ConfigError(
            [
                f"num_processes: {names[0]} means that this is one of several processes, but LOCAL_RANK is not set, "
                "so each would train alone; start one process per GPU with torchrun or accelerate launch, or one per "
                "node with --num_machines and --machine_rank, as `tsdkd slurm` does"
            ]
        )
    return bool(names)


def configured_num_processes(config: str | None, on_cpu: bool) -> int | None:
    """Return the number of processes of a launch configuration on a machine without GPUs to count.

    None without a configuration, if GPUs are visible, or if the run uses CPUs.
    """
    return None if config is None or on_cpu or num_visible_gpus() else launch_num_processes(config, {})


def _parse_int(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _validate_num_processes(num_processes: int | None, gpus: int, config: str | None, file: Mapping[str, Any]) -> None:
    if num_processes and gpus and num_processes > gpus:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        among = f" (CUDA_VISIBLE_DEVICES is {chosen})" if chosen else ""
        raise ConfigError([f"num_processes: only {gpus} GPUs are visible{among}, found {num_processes}"])
    if file.get("distributed_type") == "NO" and num_processes and num_processes > 1:
        raise ConfigError(
            [f"num_processes: accelerate_config {config} starts only one process, found {num_processes}"]
        )


def _use_single_gpu(gpus: int) -> None:
    """Restrict this process to one GPU, because `Trainer` would spread the model over all visible GPUs."""
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
