"""A vLLM server's client: TRL's, with a deadline on every request, and a seed and a limit for each prompt."""

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

_CONNECTIONS = 256  # requests in flight: vLLM's usual batch


def connect_to_server(args: TokenSelectiveConfig, max_model_length: int, name: str | None = None) -> "RolloutClient":
    """Connect to the server that the `vllm_server_…` settings name, and check that it can be used.

    Args:
        args: the `vllm_server_…` fields.
        max_model_length: the longest sequence that the server must accept, tokens.
        name: the model that it must serve, where its weights aren't replaced.

    Raises:
        EngineError: it doesn't answer, its context is too short, or it serves another model.
    """
    base_url = (args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}").rstrip("/")
    client = RolloutClient(base_url, args.vllm_group_port, args.vllm_server_timeout, args.vllm_request_timeout)
    served = client._get(f"{base_url}/v1/models")["data"][0]
    context, root = served.get("max_model_len"), str(served.get("root") or served["id"])
    if context is not None and context < max_model_length:
        raise EngineError(
            f"max_length: a prompt and its completion may have {max_model_length} tokens, the vLLM server at "
            f"{base_url} takes {context}; start it with --max-model-len {max_model_length}, or set "
            f"vllm_max_model_length: {context}"
        )
    if name is not None and Path(root).name != Path(name).name:
        raise EngineError(f"vllm_server_base_url: the server at {base_url} serves {root}, not {name}")
    return client


class _TimeoutAdapter(HTTPAdapter):
    """Gives up on a request that isn't answered in so many seconds; TRL's would wait, and repeat it five times."""

    def __init__(self, seconds: float) -> None:
        super().__init__(pool_maxsize=_CONNECTIONS)
        self.seconds = seconds

    def send(self, request: Any, stream: bool = False, timeout: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().send(request, stream, timeout or self.seconds, *args, **kwargs)


class RolloutClient(VLLMClient):
    """Talks to `vllm serve` or `trl vllm-serve`.

    Args:
        base_url: where the server listens.
        group_port: of the group through which weights are sent.
        connection_timeout: how long to wait for the server to be up, seconds.
        request_timeout: how long to wait for an answer, seconds.

    Raises:
        EngineError: here and in every method: no server, no answer, or one that isn't a success.
    """

    def __init__(self, base_url: str, group_port: int, connection_timeout: float, request_timeout: float) -> None:
        self.request_timeout = request_timeout
        super().__init__(base_url=base_url, group_port=group_port, connection_timeout=connection_timeout)

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 1.0) -> None:
        """Wait until the server is up. TRL's constructor calls this between making its session and using it."""
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
                    f"vllm_server_base_url: no vLLM server answers at {self.base_url} (waited {total_timeout:g} s, "
                    "vllm_server_timeout); the guide's section on rollouts has the command that starts one"
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
                f"the vLLM server at {self.base_url} didn't answer {path} in {self.request_timeout:g} s "
                "(vllm_request_timeout)"
            ) from error
        except requests.RequestException as error:
            raise EngineError(
                f"the vLLM server at {self.base_url} is gone (at {path}); start it again, and the run with "
                "--resume true"
            ) from error
        if not response.ok:
            raise EngineError(
                f"the vLLM server at {self.base_url} answers {path} with {response.status_code}: "
                f"{' '.join(response.text.split())[:300]}"
            )
        try:
            return response.json() if response.content else {}
        except requests.JSONDecodeError as error:
            raise EngineError(
                f"the vLLM server at {self.base_url} answers {path} with something else than JSON"
            ) from error

    def complete(self, requests_: Sequence[dict[str, Any]]) -> Iterator[tuple[int, Completion]]:
        """Position and completion of each request, as they are done.

        Args:
            requests_: `prompt` (token ids) and vLLM's sampling parameters.
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
        finally:  # the first error is told at once, not when the last request has been given up
            pool.shutdown(wait=False, cancel_futures=True)

    def load(self, folder: str) -> None:
        """Let the server read its weights from a folder: for servers that NCCL doesn't reach."""
        self._post(
            f"{self.base_url}/collective_rpc", json={"method": "reload_weights", "kwargs": {"weights_path": folder}}
        )
