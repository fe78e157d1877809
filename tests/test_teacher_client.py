"""Requests to a teacher's servers: what is repeated, what ends the run, and that several servers share the work."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from tsdkd.errors import EngineError, ModelError
from tsdkd.models.teacher_client import TeacherClient

HIDDEN = 8
Answer = tuple[int, bytes, int]
"""Status, body, and the length that the header states."""


def states_of(ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.float32)[:, None] + torch.arange(HIDDEN) / HIDDEN


def good_answer(ids: Sequence[int]) -> Answer:
    body = states_of(ids).numpy().tobytes()
    return 200, body, len(body)


@contextmanager
def serving(answers: Callable[[int, list[int]], Answer] = lambda number, ids: good_answer(ids)) -> Iterator[Any]:
    """An HTTP server; `answers(number of the request, its ids)` says what it answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            model = {"id": "teacher", "root": "teacher", "max_model_len": 64}
            self.answer((200, json.dumps({"data": [model]}).encode(), 0))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.requests.append((body, dict(self.headers)))
                number = len(server.requests)
            self.answer(answers(number, body["input"][0]))

        def answer(self, answer: Answer) -> None:
            status, body, length = answer
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = len(body) != (length or len(body))

        def log_message(self, *_: object) -> None:
            pass

    lock, server = threading.Lock(), ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # clients that have given up
    server.requests, server.url = [], f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def client(*servers: Any, timeout: float = 30.0, verify: Any = lambda *_: None) -> TeacherClient:
    return TeacherClient([server.url for server in servers], HIDDEN, torch.float32, timeout, verify)


SEQUENCES = [[1, 2, 3], [4], [5, 6], [1, 2, 3]]


def assert_right(found: list[torch.Tensor]) -> None:
    assert len(found) == len(SEQUENCES)
    assert all(torch.equal(states, states_of(ids)) for states, ids in zip(found, SEQUENCES, strict=True))


def test_states_come_in_order_and_each_sequence_is_sent_once():
    with serving() as server:
        asking = client(server)
        assert_right(asking.hidden_states(SEQUENCES))
        assert sorted(body["input"][0] for body, _ in server.requests) == [[1, 2, 3], [4], [5, 6]]


def test_what_was_prefetched_is_not_sent_again():
    with serving() as server:
        asking = client(server)
        asking.prefetch(SEQUENCES)
        assert_right(asking.hidden_states(SEQUENCES))
        assert len(server.requests) == 3
        assert_right(asking.hidden_states(SEQUENCES))  # it isn't kept
        assert len(server.requests) == 6


def test_what_was_asked_for_ahead_survives_an_evaluation():
    with serving() as server:
        asking = client(server)
        asking.prefetch_ahead(SEQUENCES)
        asking.prefetch([[7]])
        asking.hidden_states([[7]])
        asking.prefetch(SEQUENCES, takes_ahead=True)
        assert_right(asking.hidden_states(SEQUENCES))
        assert len(server.requests) == 4
        asking.prefetch(SEQUENCES, takes_ahead=True)  # it isn't kept
        assert_right(asking.hidden_states(SEQUENCES))
        assert len(server.requests) == 7


@pytest.mark.parametrize(
    "bad",
    [
        lambda ids: (200, good_answer(ids)[1][:5], good_answer(ids)[2]),  # the connection breaks
        lambda ids: (200, good_answer(ids)[1][:-1], 0),
        lambda ids: (503, b"starting", 0),
        lambda ids: (500, b"", 0),
    ],
    ids=["truncated", "short", "starting", "failing"],
)
def test_a_bad_answer_is_asked_for_again_after_a_new_check(bad):
    checks = []
    with serving(lambda number, ids: bad(ids) if number == 1 else good_answer(ids)) as server:
        asking = client(server, verify=lambda url, model, ask: checks.append((url, model.root, model.context_length)))
        assert_right(asking.hidden_states(SEQUENCES))
    assert set(checks) == {(server.url, "teacher", 64)} and len(checks) >= 2


def test_the_run_ends_when_no_server_answers_in_time():
    with serving(lambda number, ids: (503, b"", 0)) as server:
        with pytest.raises(
            EngineError, match=rf"teacher_server_base_url: .*{server.url}.*503.*--resume true"
        ) as error:
            client(server, timeout=1.0).hidden_states([[1]])
        assert "\n" not in str(error.value)
    with pytest.raises(EngineError, match="no connection"):
        client(server, timeout=1.0).hidden_states([[1]])


def test_a_server_that_hangs_is_given_up():
    released = threading.Event()

    def hang(number: int, ids: list[int]) -> Answer:
        released.wait(60)
        return good_answer(ids)

    with serving(hang) as server:
        start = time.monotonic()
        with pytest.raises(EngineError, match="no answer in time"):
            client(server, timeout=3.0).hidden_states([[i] for i in range(40)])
        released.set()
        assert time.monotonic() - start < 30


def test_other_servers_take_over():
    with serving(lambda number, ids: (500, b"", 0)) as broken, serving() as server:
        assert_right(client(broken, server).hidden_states(SEQUENCES))
        assert len(server.requests) == 3


def test_servers_share_the_requests():
    def slowly(number: int, ids: list[int]) -> Answer:
        both.wait(60)  # until the other server has a request, too
        return good_answer(ids)

    both = threading.Barrier(2)
    with serving(slowly) as first, serving(slowly) as second:
        found = client(first, second).hidden_states([[1], [2]])
        assert [len(first.requests), len(second.requests)] == [1, 1]
    assert torch.equal(found[1], states_of([2]))


def test_a_refusal_ends_the_run_at_once():
    refusal = 400, b'{"message": "too\\nlong"}', 0
    with serving(lambda *_: refusal) as server, pytest.raises(EngineError, match=r"answered 400: .*too") as error:
        client(server).hidden_states([[1]])
    assert "\n" not in str(error.value) and len(server.requests) == 1


def test_a_model_of_another_size_is_refused():
    answer = 200, b"\0" * (4 * 2 * 2 * HIDDEN), 0
    with serving(lambda *_: answer) as server, pytest.raises(ModelError, match="size 16, the teacher's have 8"):
        client(server).hidden_states([[1, 2]])


def test_a_model_that_fails_the_check_is_refused():
    def verify(url: str, model: Any, ask: Any) -> None:
        assert torch.equal(ask([7]), states_of([7]))
        raise ModelError("another model")

    with serving() as server:
        with pytest.raises(ModelError, match="another model"):
            client(server, verify=verify).hidden_states(SEQUENCES)
        assert {tuple(body["input"][0]) for body, _ in server.requests} == {(7,)}


def test_the_key_is_sent(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with serving() as server:
        client(server).hidden_states([[1]])
        assert server.requests[0][1]["Authorization"] == "Bearer secret"
    with serving(lambda *_: (401, b"secret", 0)) as server, pytest.raises(EngineError, match="VLLM_API_KEY") as error:
        client(server).hidden_states([[1]])
    assert "secret" not in str(error.value)
