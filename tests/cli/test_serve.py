"""The command `serve`: what it refuses before it loads, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import httpx
import pytest

from qwen_mlx import QwenMLXError
from qwen_mlx.cli import serve
from reference.small_models import IM_END, RandomModel, write_gguf
from tests.helpers.cases import each

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.heavy  # processes


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("serve") / "m.gguf", RandomModel(max_position_embeddings=4096))


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qwen_mlx.serve", "--port", "0", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        stderr=subprocess.PIPE,
        text=True,
    )


def url_of(process: subprocess.Popen[str]) -> str:
    line = process.stderr.readline()
    assert "is served at" in line, line + process.stderr.read()
    return re.search(r"http://\S+(?=;)", line)[0]


def long(tokens: int) -> dict:
    return {
        "prompt": "hello",
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "logit_bias": {str(IM_END): -100},
    }


def test_sigterm_lets_streams_end(small):
    process = start("--model", small, QWEN_MLX_API_KEY="secret")
    url = url_of(process)
    headers = {"authorization": "Bearer secret"}
    assert httpx.get(f"{url}/v1/models").status_code == 401
    with httpx.stream("POST", f"{url}/v1/completions", json=long(150), headers=headers, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    assert process.wait(30) == 128 + signal.SIGTERM
    log = process.stderr.read()
    assert log.count("\n") == 1
    assert "/v1/completions done: " in log


def test_a_second_ctrl_c_ends_at_once(small):
    process = start("--model", small)
    url = url_of(process)
    with httpx.stream("POST", f"{url}/v1/completions", json=long(3000), timeout=60) as stream:
        next(stream.iter_lines())
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert "Traceback" not in process.stderr.read()


@each(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port is 70000, expected"),
        (["--host", "no such host"], "--host no such host is no address"),
        (["--slots", "0"], "--slots is 0, expected 1 or more"),
        (["--queue", "-1"], "--queue is -1"),
        (["--cache-gb", "-1"], "--cache-gb is -1.0"),
        (["--time-limit", "nan"], "--time-limit is nan"),
        (["--api-key-file", "nowhere"], "nowhere: "),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_sentence(arguments, message):
    with pytest.raises(QwenMLXError) as error:
        serve.main(arguments)
    assert message in str(error.value)


@each("host,key,warns", [("0.0.0.0", None, True), ("0.0.0.0", "x", False), ("127.0.0.1", None, False)])
def test_an_open_door_is_said(monkeypatch, capfd, host, key, warns):
    monkeypatch.setattr(serve, "_service", lambda arguments: types.SimpleNamespace(name="small"))
    monkeypatch.setattr("qwen_mlx.server.app.make_app", lambda *asked: None)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    if key:
        monkeypatch.setenv(serve.KEY_VARIABLE, key)
    serve.main(["--host", host, "--port", "0"])
    assert (f"Warning: everybody who reaches {host} may use it" in capfd.readouterr().err) == warns


def test_a_key_that_no_header_carries_is_refused(tmp_path):
    for text in ("", "two words", "é"):
        (tmp_path / "key").write_text(text)
        with pytest.raises(QwenMLXError, match="API key"):
            serve.main(["--api-key-file", str(tmp_path / "key")])


def test_a_port_in_use_is_said_before_the_model_is_read():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(QwenMLXError, match=f"port {port} cannot be used"):
            serve.main(["--port", str(port), "--model", "no/such.gguf"])


def test_without_the_extra_the_sentence_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(QwenMLXError, match=r"pip install '\.\[server\]' in qwen_mlx's folder"):
        serve.main([])
