"""The ranks' control channel against peers and strangers that keep no rule, and the processes that it may end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_mlx.parallel.control import identity, kill_proven, read_message
from tests.helpers.cases import each

linux = pytest.mark.linux  # a process is proven by /proc

# Rank 0 of two. It prints what it tells rank 1, then a line when that is connected, and never ends by itself unless
# `then` does.
RANK_0 = """
import json, sys, threading
from qwen_mlx.parallel import control
control.SILENCE, control.CONNECT, other, before, then = json.loads(sys.argv[1])
exec(before)
def exchange(text):
    print(text, flush=True)
    return [text, json.dumps(other)]
channel = control.ControlChannel(0, 2, exchange)
print("connected", flush=True)
exec(then)
threading.Event().wait()
"""


class RankZero:
    """A process whose one peer is the test. other: what rank 1 told about itself."""

    def __init__(self, other: dict, silence: float = 6, connect: float = 30, before: str = "", then: str = ""):
        program = [sys.executable, "-c", RANK_0, json.dumps([silence, connect, other, before, then])]
        environment = os.environ | {"MLX_HOSTFILE": "", "PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(
            program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.told = json.loads(self.process.stdout.readline())

    def connect(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.told["port"]), timeout=60)
        connection.sendall(data)
        return connection

    def login(self, **changes: object) -> bytes:
        return json.dumps({"password": self.told["password"], "rank": 1} | changes).encode() + b"\n"

    def ends(self) -> tuple[int, str]:
        _, error = self.process.communicate(timeout=120)
        return self.process.returncode, error.strip()


@pytest.fixture
def innocent() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(["sleep", "300"])
    yield process
    process.kill()
    process.wait()


def rank_1(pid: object = 1, **more: object) -> dict:
    return {"host": socket.gethostname(), "pid": pid} | more


@linux
def test_only_a_proven_process_is_killed(innocent: subprocess.Popen):
    pid, proof = innocent.pid, identity(innocent.pid)
    assert proof == identity(pid) != identity()
    for wrong in (True, 0, -1, 1, -pid, float(pid), str(pid), None, 10**30, [pid]):
        assert not kill_proven({"pid": wrong, "identity": proof})
    for wrong in (None, "", identity(), proof[:-1], [proof]):
        assert not kill_proven({"pid": pid, "identity": wrong})
    assert not kill_proven({"pid": pid})
    assert not kill_proven({})
    assert innocent.poll() is None
    assert kill_proven({"pid": pid, "identity": proof})
    assert innocent.wait(10) == -9
    assert not kill_proven({"pid": pid, "identity": proof})  # its number may belong to someone else already


def test_without_proc_nothing_is_killed(innocent: subprocess.Popen, monkeypatch: pytest.MonkeyPatch):
    """As on macOS."""
    from qwen_mlx.parallel import control

    monkeypatch.setattr(control, "identity", lambda pid="self": None)
    assert not kill_proven({"pid": innocent.pid, "identity": None})
    assert innocent.poll() is None


@each("line", [b"", b"x", b"3", b"null", b"[]", b'"end"', b"\xff", b"[" * 100_000, b'{"a": 1'])
def test_what_is_no_message_is_an_empty_one(line: bytes):
    assert read_message(line) == {}


@pytest.mark.parametrize("proven", [True, False])
@linux
def test_a_silent_rank_is_killed_only_if_it_is_proven(innocent: subprocess.Popen, proven: bool):
    proof = identity(innocent.pid) if proven else identity()
    zero = RankZero(rank_1(innocent.pid, identity=proof), silence=1.5)
    connection = zero.connect(zero.login())
    code, error = zero.ends()
    assert code == 1
    name = f"rank 1 of 2 (process {innocent.pid} on {socket.gethostname()})"
    assert error == f"error: {name} has not answered for 1.5 s; all ranks end."
    assert (innocent.wait(60) if proven else innocent.poll()) == (-signal.SIGKILL if proven else None)
    connection.close()


@linux
def test_a_rank_that_has_died_is_not_killed_again(innocent: subprocess.Popen):
    zero = RankZero(rank_1(innocent.pid, identity=identity(innocent.pid)))
    zero.connect(zero.login()).close()
    code, error = zero.ends()
    assert (code, error.endswith("has died; all ranks end.")) == (1, True), error
    assert innocent.poll() is None


@pytest.mark.parametrize("host", ["", "\x1b]0;title\x07"])
def test_bad_lines_end_neither_the_watch_nor_the_rank(host: str):
    zero = RankZero(rank_1() | {"host": host})
    connection = zero.connect(zero.login() + b'{"beat": true}\n')
    assert zero.process.stdout.readline() == "connected\n"
    for line in (b"x\n", b"3\n", b"null\n", b"[]\n", b"\xff\n", b"[" * 50_000 + b"\n", b'{"beat": 1}\n{"be'):
        connection.sendall(line)
    beats = b""
    while beats.count(b"beat") < 3:  # the thread goes on
        beats += connection.recv(100)
        connection.sendall(b'at": 1}\n{"be')
    connection.sendall(b'at": 1}\n{"error": "first\\n\\u001b[2Jsecond"}\n')
    code, error = zero.ends()
    assert code == 2
    assert (
        error == f"error: rank 1 of 2 (process 1 on {host.translate({27: 0xFFFD, 7: 0xFFFD})}): first \ufffd[2Jsecond"
    )


@pytest.mark.parametrize("data", [b"x" * 100_000, json.dumps({"error": "x" * 60_000}).encode() + b"\n"])
def test_neither_lines_nor_sentences_of_a_rank_are_endless(data: bytes):
    zero = RankZero(rank_1())
    connection = zero.connect(zero.login())
    with contextlib.suppress(ConnectionError):
        connection.sendall(data)
    code, error = zero.ends()
    assert code == (1 if data[:1] == b"x" else 2)
    assert ("bytes without the end of a line; all ranks end." if code == 1 else " characters)") in error
    assert len(error) < 3000
    connection.close()


@pytest.mark.parametrize("takes", [True, False])
def test_a_rank_may_take_a_long_text_slowly_but_not_stop(takes: bool):
    """It sends signs of life in any case."""
    length = 12 << 20
    zero = RankZero(rank_1(), silence=1, then=f"channel.on_first(lambda: 'x' * {length}); print('told', flush=True)")
    connection = zero.connect(zero.login())
    begin, taken = time.monotonic(), 0
    with contextlib.suppress(ConnectionError):
        while zero.process.poll() is None and taken < length and time.monotonic() < begin + 60:
            time.sleep(0.1)
            connection.sendall(b'{"beat": true}\n')
            taken += len(connection.recv(length // 20, socket.MSG_WAITALL)) if takes else 0
    if takes:
        assert time.monotonic() - begin > 1.5  # longer than a silence may be
        assert [zero.process.stdout.readline() for _ in range(2)] == ["connected\n", "told\n"]
        connection.close()
    code, error = zero.ends()
    assert code == 1
    assert error.endswith(f"has {'died' if takes else 'taken nothing for 1 s'}; all ranks end.")
    connection.close()


def test_an_error_of_the_watch_itself_ends_the_rank():
    zero = RankZero(rank_1(), before="control.ControlChannel._listen = lambda self, now: 1 / 0")
    connection = zero.connect(zero.login())
    code, error = zero.ends()
    assert code == 1
    assert error == "error: the watch over the ranks failed (ZeroDivisionError: division by zero); all ranks end."
    connection.close()


def test_strangers_are_turned_away_and_keep_nobody_waiting():
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))"
    zero = RankZero(rank_1(), before=few)
    many = [zero.connect() for _ in range(150)]  # more than it has descriptors
    silent, slow = zero.connect(), zero.connect(b"[")
    others = [b"\n", b"[" * 1000 + b"\n", b"x" * 5000, b'["password", 1]\n', zero.login(password="x"), b"\xff\n"]
    others += [zero.login(rank=rank) for rank in (0, -1, 2, 99, "1", True, None)]
    others += [zero.login(password=password) for password in (None, 3, ["x"], "\ud800", "\u00e4")]
    for data in others:
        connection = zero.connect(data)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(10) == b"", data
    slow.sendall(b"[")
    assert not select.select([zero.process.stdout], [], [], 0)[0]
    login = zero.login()
    mine = zero.connect(login[:10])
    time.sleep(0.2)
    mine.sendall(login[10:])
    assert zero.process.stdout.readline() == "connected\n"
    for connection in (*many, silent):
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(10) == b""
        connection.close()
    mine.close()
    assert zero.ends()[0] == 1


def test_a_rank_that_does_not_connect_is_named():
    zero = RankZero(rank_1(), connect=1)
    slow = zero.connect(b"[")
    code, error = zero.ends()
    assert code == 1
    assert f"rank 1 of 2 (process 1 on {socket.gethostname()}) did not connect to rank 0 in 1 s." in error
    slow.close()
