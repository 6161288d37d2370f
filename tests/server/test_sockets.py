"""Clients that speak HTTP badly, slowly, at once or not to the end, over raw sockets: the server answers or hangs up,
and serves the next."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

import httpx
import pytest

from qwen_mlx import load
from qwen_mlx.generation.engine import PromptReader
from qwen_mlx.server.connection import Connection
from qwen_mlx.server.limits import Limits
from reference.small_models import IM_END
from tests.helpers.fim_model import FIM_IDS, save_fim_folder
from tests.helpers.running_server import serving, wait_for

pytestmark = pytest.mark.heavy  # it waits for time limits

COMPLETIONS = "/v1/completions"
NO_END = {str(i): -100 for i in (IM_END, IM_END - 2, *FIM_IDS.values())}
LIMITS = Limits(body_seconds=1.0)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory):
    small = load(save_fim_folder(tmp_path_factory.mktemp("raw") / "m", seed=3, max_position_embeddings=512))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "head_seconds", 1.0)
        with serving(small, LIMITS, slots=4, queue_size=20, prefill_step_size=16) as service:
            yield service


@pytest.fixture(autouse=True)
def _serves_the_next(service):
    """Whatever a test did, all of it has ended and an answer is what it was."""
    yield
    wait_for(lambda: service.scheduler.load == (0, 0))
    body = {"prompt": "hello", "temperature": 0, "max_tokens": 3}
    assert httpx.post(service.url + COMPLETIONS, json=body).json()["usage"]["completion_tokens"] == 3


@contextlib.contextmanager
def connection(service: Any):
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=30) as raw:
        yield raw


def request(body: dict[str, Any], *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {COMPLETIONS} HTTP/1.1", "host: localhost", f"content-length: {len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


def everything(raw: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := raw.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize("after_an_answer", [False, True])
def test_headers_that_never_end_close_the_connection(service, after_an_answer):
    with connection(service) as raw:
        if after_an_answer:
            raw.sendall(request({"prompt": "hello", "max_tokens": 1}))
            assert b" 200 " in raw.recv(65536)
        start = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < start + 20:
                raw.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() < start + 20


def test_an_answer_may_take_longer_than_headers(service):
    with connection(service) as raw:
        time.sleep(0.2)
        body = {"prompt": "hello", "max_tokens": 480, "min_tokens": 480, "temperature": 0, "stream": True}
        raw.sendall(request(body, "connection: close"))
        assert everything(raw).count(b"data: [DONE]") == 1


def test_half_a_body_is_waited_for_a_while(service):
    with connection(service) as raw:
        raw.sendall(request({"prompt": "hello"})[:-5])
        answer = everything(raw)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_slow"


def test_requests_in_a_row_are_answered_in_order(service):
    """HTTP pipelining: the second is sent before the first is answered."""
    with connection(service) as raw:
        first, second = ({"prompt": "hello", "max_tokens": n, "min_tokens": n, "temperature": 0} for n in (9, 4))
        raw.sendall(request(first) + request(second, "connection: close"))
        answer = everything(raw)
    assert [answer.count(f'"completion_tokens":{n},'.encode()) for n in (9, 4)] == [1, 1]
    assert answer.index(b'"completion_tokens":9,') < answer.index(b'"completion_tokens":4,')


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"POST /infill HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /infill HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\norigin: http://[\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\norigin: null\r\n\r\n",
        b"GET http://[evil/ HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET //[ HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"\r\n" * 1000,
    ],
    ids=lambda sent: repr(sent[:45]),
)
def test_what_is_no_request_is_refused_or_hung_up_on(service, sent, caplog):
    with connection(service) as raw:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            raw.sendall(sent)
        answer = everything(raw)
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    assert not [record for record in caplog.records if record.exc_info]


def test_two_hundred_at_once_are_answered_or_told_to_come_again(service):
    body = {"prompt": "hello", "max_tokens": 2, "min_tokens": 2, "temperature": 0}
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(connection(service)) for _ in range(200)]
        for raw in sockets:
            raw.sendall(request(body, "connection: close"))
        answers = [everything(raw) for raw in sockets]
    statuses = [answer[9:12] for answer in answers]
    assert set(statuses) <= {b"200", b"503"}
    assert statuses.count(b"200") >= 24
    assert all((b"retry-after: 1" in answer) == (answer[9:12] == b"503") for answer in answers)
    assert len({answer.partition(b'"text":')[2][:60] for answer in answers if answer[9:12] == b"200"}) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_while_its_prompt_is_read_costs_no_more_of_it(service, stream, monkeypatch):
    """The prompt has 28 chunks, each of which takes a tenth of a second."""
    counts, read = service.scheduler.metrics, PromptReader.read
    monkeypatch.setattr(PromptReader, "read", lambda self, length: time.sleep(0.1) or read(self, length))
    before, cancelled = counts.prompt_tokens, counts.cancelled
    with connection(service) as raw:
        raw.sendall(request({"prompt": [5, 6] * 224, "stream": stream, "max_tokens": 9}))
        wait_for(lambda: service.scheduler.load[0] == 1)
    wait_for(lambda: counts.cancelled == cancelled + 1)
    assert counts.prompt_tokens - before < 448 // 2


def test_more_answers_than_can_wait_are_no_matter_of_waiting(service):
    body = {"prompt": ["hello"] * 25, "max_tokens": 1}
    answer = httpx.post(service.url + COMPLETIONS, json=body)
    assert answer.status_code == 400
    assert "25 answers, expected at most 24" in answer.json()["error"]["message"]


def test_a_long_field_is_named_in_short(service):
    answer = httpx.post(service.url + COMPLETIONS, json={"prompt": "hello", "x" * 200_000: 1})
    assert answer.status_code == 400
    assert len(answer.text) < 400
