"""Asks vLLM servers for the hidden states of a teacher that runs elsewhere."""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from torch import Tensor

from ..config.logs import get_logger
from ..errors import EngineError, ModelError

logger = get_logger(__name__)

_CONNECTIONS = 32  # requests of this process at a time, each of one sequence
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 8.0  # seconds between attempts
_ATTEMPTS_THAT_HANG = 3  # attempts without any answer that fit into the timeout
_TEMPORARY = frozenset({404, 408, 425, 429, 500, 502, 503, 504})  # 404 and 503 while a server starts
_API_KEY = "VLLM_API_KEY"  # the environment variable that vLLM's servers read, too
_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}

HiddenStates = Callable[[Sequence[int]], Tensor]
"""Token ids of a sequence -> the hidden states `[T, H]` that a server returns for it."""


@dataclass(frozen=True)
class ServedModel:
    """What a server says about the model it serves.

    Attributes:
        names: the names that requests may use.
        root: path or hub id that its weights were loaded from.
        context_length: longest sequence, tokens; None if it doesn't say.
    """

    names: list[str]
    root: str
    context_length: int | None


Verify = Callable[[str, ServedModel, HiddenStates], None]
"""(URL, model, hidden states) -> None, or `ModelError` if the model isn't the teacher."""


@dataclass
class _Server:
    url: str
    session: requests.Session
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the check
    name: str | None = None  # of the model in requests; None until the model has been checked
    num_waiting: int = 0
    last_failure: float = float("-inf")


class TeacherClient:
    """Gets hidden states from one or several servers of the same model.

    A request that fails is repeated, on the server with the fewest requests, until `timeout` has passed. A server's
    model is checked before its first request, and again after each failure.

    Args:
        base_urls: URLs of the servers.
        hidden_size: H.
        dtype: dtype of the hidden states, bfloat16 or float32.
        timeout: how long a request may fail, seconds. A server may start or restart meanwhile.
        verify: checks a server's model.
    """

    def __init__(
        self, base_urls: Sequence[str], hidden_size: int, dtype: torch.dtype, timeout: float, verify: Verify
    ) -> None:
        self.hidden_size, self.dtype, self.timeout, self.verify = hidden_size, dtype, timeout, verify
        self._servers = [_Server(url.rstrip("/"), _new_session()) for url in base_urls]
        self._lock = threading.Lock()
        self._queue: SimpleQueue[tuple[Future[Tensor], Sequence[int]]] = SimpleQueue()
        self._num_threads = 0
        self._prefetched: dict[tuple[int, ...], Future[Tensor]] = {}
        self._ahead: dict[tuple[int, ...], Future[Tensor]] = {}

    def prefetch(self, sequences: Sequence[Sequence[int]], takes_ahead: bool = False) -> None:
        """Ask for the hidden states of sequences that `hidden_states` will be called with. Forgets earlier ones.

        Args:
            sequences: token ids.
            takes_ahead: whether `prefetch_ahead` may have asked for them already.
        """
        for future in self._prefetched.values():
            future.cancel()
        known: dict[tuple[int, ...], Future[Tensor]] = {}
        if takes_ahead:
            known, self._ahead = self._ahead, {}
        self._prefetched = {key: known.get(key) or self._submit(key) for key in dict.fromkeys(map(tuple, sequences))}

    def prefetch_ahead(self, sequences: Sequence[Sequence[int]]) -> None:
        """Ask early for what a later `prefetch` will ask for. It may be called from another thread."""
        self._ahead = {key: self._submit(key) for key in dict.fromkeys(map(tuple, sequences))}

    def hidden_states(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the last, normed hidden states of token ids, `[T, H]` each, on the CPU.

        Raises:
            EngineError: no server answers within the timeout, or a server refuses the request.
            ModelError: a server has another model.
        """
        keys = [tuple(ids) for ids in sequences]
        missing = set(keys) - self._prefetched.keys()
        futures = {key: self._submit(key) if key in missing else self._prefetched.pop(key) for key in set(keys)}
        try:
            states = {key: future.result() for key, future in futures.items()}
        except BaseException:
            self.prefetch([])
            raise
        return [states[key] for key in keys]

    def _submit(self, ids: Sequence[int]) -> "Future[Tensor]":
        """Queue a request. The threads don't keep a program from ending, unlike those of `ThreadPoolExecutor`."""
        future: Future[Tensor] = Future()
        self._queue.put((future, ids))
        with self._lock:
            needs_thread = self._num_threads < _CONNECTIONS
            self._num_threads += needs_thread
        if needs_thread:
            threading.Thread(target=self._work, name="tsdkd-teacher", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            future, ids = self._queue.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._ask_until_answered(ids))
                except BaseException as error:  # for the thread that waits
                    future.set_exception(error)

    def _ask_until_answered(self, ids: Sequence[int]) -> Tensor:
        start, delay = time.monotonic(), _FIRST_DELAY
        while True:
            server = self._choose_server()
            try:
                self._require_verified(server, start + self.timeout)
                return self._request(server, ids)
            except _NoAnswerError as error:
                server.name, server.last_failure = None, time.monotonic()
                waited = time.monotonic() - start
                if waited + delay > self.timeout:
                    raise EngineError(
                        f"teacher_server_base_url: no answer from {', '.join(s.url for s in self._servers)} for "
                        f"{waited:.0f} s (teacher_server_timeout {self.timeout:g}): {error}; start the server again, "
                        "then continue with --resume true"
                    ) from None
            finally:
                with self._lock:
                    server.num_waiting -= 1
            time.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY)

    def _choose_server(self) -> _Server:
        """The server with the fewest requests of those that haven't failed lately, else the one that failed first."""
        with self._lock:
            recently = time.monotonic() - _LONGEST_DELAY
            server = min(
                self._servers,
                key=lambda s: (s.last_failure if s.last_failure > recently else float("-inf"), s.num_waiting),
            )
            server.num_waiting += 1
            return server

    def _require_verified(self, server: _Server, deadline: float) -> None:
        """Check the server's model if it hasn't answered since it last failed; one thread at a time."""
        if not server.lock.acquire(timeout=max(deadline - time.monotonic(), 0.0)):
            raise _NoAnswerError(f"{server.url}: no answer in time")
        try:
            if server.name is None:
                served = self._describe(server)
                name = served.names[0]
                self.verify(server.url, served, lambda ids: self._pool(server, name, ids))
                server.name = name
        finally:
            server.lock.release()

    def _describe(self, server: _Server) -> ServedModel:
        try:
            models = json.loads(self._call(server, "GET", "/v1/models").content)["data"]
            names = [str(model["id"]) for model in models]
            context = models[0].get("max_model_len")
            return ServedModel(
                names, str(models[0].get("root") or names[0]), None if context is None else int(context)
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise EngineError(f"teacher_server_base_url: {server.url}/v1/models doesn't answer as vLLM does") from None

    def _request(self, server: _Server, ids: Sequence[int]) -> Tensor:
        name = server.name
        if name is None:  # another thread has lost the server since
            raise _NoAnswerError("it has failed meanwhile")
        return self._pool(server, name, ids)

    def _pool(self, server: _Server, name: str, ids: Sequence[int]) -> Tensor:
        body = {
            "model": name,
            "input": [list(ids)],
            "task": "token_embed",
            "use_activation": False,  # vLLM would scale each state to length 1
            "encoding_format": "bytes_only",
            "embed_dtype": _DTYPES[self.dtype],
            "endianness": "little",
        }
        content = self._call(server, "POST", "/pooling", json=body).content
        expected = len(ids) * self.hidden_size * self.dtype.itemsize
        if len(content) != expected:
            if len(ids) and len(content) % (len(ids) * self.dtype.itemsize) == 0:
                size = len(content) // (len(ids) * self.dtype.itemsize)
                raise ModelError(
                    f"teacher_server_base_url: the model at {server.url} has hidden states of size {size}, "
                    f"the teacher's have {self.hidden_size}"
                )
            raise _NoAnswerError(f"{server.url} sent {len(content)} bytes, expected {expected}")
        return torch.frombuffer(bytearray(content), dtype=self.dtype).view(len(ids), self.hidden_size)

    def _call(self, server: _Server, method: str, path: str, **kwargs: Any) -> requests.Response:
        timeout = (5.0, max(self.timeout / _ATTEMPTS_THAT_HANG, 1.0))  # to connect, and for the next byte
        try:
            response = server.session.request(method, server.url + path, timeout=timeout, **kwargs)
        except requests.RequestException as error:
            raise _NoAnswerError(f"{server.url}: {_describe_failure(error)}") from None
        if response.status_code in _TEMPORARY:
            raise _NoAnswerError(f"{server.url}{path} answered {response.status_code}")
        if not response.ok:
            text = f"the environment variable {_API_KEY} must be the server's" if response.status_code == 401 else ""
            raise EngineError(
                f"teacher_server_base_url: {server.url}{path} answered {response.status_code}: "
                f"{text or ' '.join(response.text.split())[:300]}"
            )
        return response


class _NoAnswerError(Exception):
    """An attempt failed in a way that may pass."""


def _describe_failure(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError | requests.exceptions.ContentDecodingError):
        return "the answer broke off"
    return "no connection" if isinstance(error, requests.ConnectionError) else type(error).__name__


def _new_session() -> requests.Session:
    session = requests.Session()
    if key := os.environ.get(_API_KEY):
        session.headers["Authorization"] = f"Bearer {key}"
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=_CONNECTIONS))
    return session
