"""A client for vLLM servers: TRL's client with a timeout for every request, and a seed and a limit for each prompt."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from trl.generation.vllm_client import VLLMClient

from ...config.base import TokenSelectiveConfig
from ...errors import EngineError
from ..base import Completion

_CONNECTIONS = 256  # concurrent requests, vLLM's usual batch size


def connect_to_server(args: TokenSelectiveConfig, max_model_length: int, name: str | None = None) -> "RolloutClient":
    """Connect to the server given by the `vllm_server_…` settings and check that it can be used.

    Args:
        args: the `vllm_server_…` fields.
        max_model_length: longest sequence that the server must accept, tokens.
        name: the model that the server must serve, if its weights are not replaced.

    Raises:
        EngineError: the server does not respond, its context is too short, or it serves another model.
    """
    base_url = (args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}").rstrip("/")
    client = RolloutClient(base_url, args.vllm_group_port, args.vllm_server_timeout, args.vllm_request_timeout)
    served = client._get(f"{base_url}/v1/models")["data"][0]
    context, root = served.get("max_model_len"), str(served.get("root") or served["id"])
    if context is not None and context < max_model_length:
        raise EngineError(
            f"max_length: prompt plus completion may have {max_model_length} tokens, but the vLLM server at "
            f"{base_url} accepts {context}; start it with --max-model-len {max_model_length}, or set "
            f"vllm_max_model_length: {context}"
        )
    if name is not None and Path(root).name != Path(name).name:
        raise EngineError(f"vllm_server_base_url: the server at {base_url} serves {root}, not {name}")
    return client


class _TimeoutAdapter(HTTPAdapter):
    """Fails requests that exceed a timeout, in seconds. TRL's adapter has no timeout and retries five times."""

    def __init__(self, seconds: float) -> None:
        super().__init__(pool_maxsize=_CONNECTIONS)
        self.seconds = seconds

    def send(self, request: Any, stream: bool = False, timeout: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().send(request, stream, timeout or self.seconds, *args, **kwargs)


class RolloutClient(VLLMClient):
    """Talks to `vllm serve` or `trl vllm-serve`.

    Args:
        base_url: URL of the server.
        group_port: port of the group through which weights are sent.
        connection_timeout: maximum wait until the server is up, seconds.
        request_timeout: maximum wait for a response, seconds.

    Raises:
        EngineError: there is no server, no response, or the request failed. All methods raise it too.
    """

    def __init__(self, base_url: str, group_port: int, connection_timeout: float, request_timeout: float) -> None:
        self.request_timeout = request_timeout
        super().__init__(base_url=base_url, group_port=group_port, connection_timeout=connection_timeout)

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 1.0) -> None:
        """Wait until the server is up. TRL's constructor calls this after creating its session and before using it."""
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, _TimeoutAdapter(self.request_timeout))
        end = time.monotonic() + total_timeout
        while True:
            try:
                if self.session.get(f"{self.base_url}/health", timeout=5.0).ok:
                    return
            except requests.RequestException:
                pass
            if time.monotonic() >= end:
                raise EngineError(
                    f"vllm_server_base_url: no vLLM server responds at {self.base_url} (waited {total_timeout:g} s, "
                    "vllm_server_timeout); see the guide's section on rollouts for how to start one"
                )
            time.sleep(retry_interval)

    def _get(self, url: str, **kwargs: Any) -> Any:
        return self._ask("GET", url, **kwargs)

    def _post(self, url: str, **kwargs: Any) -> Any:
        return self._ask("POST", url, **kwargs)

    def _ask(self, method: str, url: str, **kwargs: Any) -> Any:
        path = url.removeprefix(self.base_url)
        try:
            response = self.session.request(method, url, **kwargs)
        except requests.Timeout as error:
            raise EngineError(
                f"the vLLM server at {self.base_url} did not respond to {path} within {self.request_timeout:g} s "
                "(vllm_request_timeout)"
            ) from error
        except requests.RequestException as error:
            raise EngineError(
                f"lost the connection to the vLLM server at {self.base_url} (at {path}); restart it, then resume the "
                "run with --resume true"
            ) from error
        if not response.ok:
            raise EngineError(
                f"the vLLM server at {self.base_url} responded to {path} with {response.status_code}: "
                f"{' '.join(response.text.split())[:300]}"
            )
        try:
            return response.json() if response.content else {}
        except requests.JSONDecodeError as error:
            raise EngineError(f"the vLLM server at {self.base_url} responded to {path} with invalid JSON") from error

    def complete(self, requests_: Sequence[dict[str, Any]]) -> Iterator[tuple[int, Completion]]:
        """Yield the position and completion of each request, in order of completion.

        Args:
            requests_: dictionaries with `prompt` (token ids) and vLLM's sampling parameters.
        """
        always = {"model": self.model, "n": 1, "logprobs": 0, "return_token_ids": True}

        def request_one(position: int) -> tuple[int, Completion]:
            body = {**always, **requests_[position]}
            (choice,) = self._post(f"{self.base_url}/v1/completions", json=body)["choices"]
            logps = choice["logprobs"]["token_logprobs"]
            return position, Completion(choice["token_ids"], choice["finish_reason"] == "stop", logps)

        pool = ThreadPoolExecutor(max_workers=_CONNECTIONS)
        try:
            for future in as_completed([pool.submit(request_one, position) for position in range(len(requests_))]):
                yield future.result()
        finally:  # report the first error at once, without waiting for the other requests
            pool.shutdown(wait=False, cancel_futures=True)

    def load(self, folder: str) -> None:
        """Make the server load weights from a folder, for servers that can't be reached through NCCL."""
        self._post(
            f"{self.base_url}/collective_rpc", json={"method": "reload_weights", "kwargs": {"weights_path": folder}}
        )
