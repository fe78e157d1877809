"""Starts processes through `accelerate launch`, e.g. for `tsdkd train --accelerate_config zero2 --num_processes 8`."""

import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from subprocess import CalledProcessError
from types import FrameType
from typing import Any

from ..config.launch import LAUNCHED, find_launch_config, launch_num_processes, read_launch_config
from ..config.stop_signals import handle_stop_signals
from ..errors import ConfigError, PreemptedError
from .children import collect_failures, handle_interrupt, started_by_this, stop_children

logger = logging.getLogger(__name__)

_SIGNAL_EXIT_BASE = 128  # exit code 128 + signal, as in a shell


def launch_processes(config: str, options: dict[str, Any], command: Sequence[str]) -> int:
    """Run `tsdkd` with the arguments `command` in the processes that an accelerate configuration describes.

    Args:
        config: a shipped name or a file.
        options: options of `accelerate launch`, e.g. `num_processes`.
        command: the arguments of tsdkd.

    Returns:
        The exit code of the process that failed first; codes above 1 take precedence. 0 if no process failed. 75 if a
        signal to the launcher stopped the run and no process failed while stopping.

    Raises:
        ConfigError: the configuration does not exist, or accelerate rejects the options.
    """
    # imported here because --help does not need torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = [f"--config_file={find_launch_config(config)}"]
    flags += [f"--{name}={value}" for name, value in options.items()]
    arguments = launch_command_parser().parse_args([*flags, "-m", "tsdkd", *command])
    arguments.signals_to_handle = "SIGQUIT"  # otherwise torch would override our handlers and ignored signals
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save after SIGTERM
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes report errors themselves
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)  # it warns about setting OMP_NUM_THREADS
    stopped_by: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped_by.append(number)
        handle_interrupt(stopped_by)
        if len(stopped_by) == 1:
            raise SignalException("stopped", signal.SIGTERM)  # makes torch stop the processes and wait for them

    for_processes = {LAUNCHED: str(launch_num_processes(config, options)), **started_by_this()}
    os.environ.update(for_processes)
    try:
        with handle_stop_signals(stop), collect_failures() as failure:
            try:
                launch_command(arguments)
            except SignalException:
                stop_children()  # accelerate starts a single process without torch's launcher
                if failure.exists():
                    return int(failure.read_text())
                raise
    except ChildFailedError as error:
        # a process that lost its peer exits with 1, maybe before the launcher looks; our error codes take precedence
        rank, first = min(error.failures.items(), key=lambda failure: (failure[1].exitcode <= 1, failure[1].timestamp))
        return _to_exit_code(rank, first.exitcode)
    except CalledProcessError as error:
        return _to_exit_code(0, error.returncode)
    except SignalException as error:
        return PreemptedError.exit_code if stopped_by else _SIGNAL_EXIT_BASE + error.sigval
    except ValueError as error:
        raise ConfigError([f"accelerate_config: {' '.join(str(error).split())}"]) from error
    finally:
        for name in for_processes:
            del os.environ[name]
    return 0


def warn_about_compile_locks() -> None:
    """Warn about lock files of torch's extension builds.

    A killed build leaves its lock behind, and DeepSpeed would wait for it silently.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true" or int(os.environ.get("LOCAL_RANK", "0")):
        return
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.rglob("lock"):
        logger.warning(f"tsdkd: lock file {lock} exists; unless another run is compiling, delete it or this run waits")


def default_launch_config() -> str:
    """Return the configuration that `accelerate config` wrote if it is for several processes, otherwise "ddp"."""
    from accelerate.commands.config.config_args import default_config_file

    if Path(default_config_file).exists() and read_launch_config(default_config_file).get("distributed_type") != "NO":
        return str(default_config_file)
    return "ddp"  # without a configuration, accelerate always starts only one process on a CPU


def _to_exit_code(rank: int, code: int) -> int:
    """Convert an exit code to a shell's. Log signals, because a killed process can't report them itself."""
    if code < 0:
        logger.warning(f"tsdkd: process {rank} was killed by signal {-code} ({signal.Signals(-code).name})")
        return _SIGNAL_EXIT_BASE - code
    return code
