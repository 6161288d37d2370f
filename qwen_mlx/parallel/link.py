"""What the ranks of a group tell each other besides arrays: that they live, what rank 0 read, and that all is over.

A star of TCP connections to rank 0, watched by a thread, because a rank that waits for arrays waits in C++ and cannot
be interrupted: the thread notices a rank that died or fell silent, says so in one sentence and ends its own process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import QwenMLXError

BEAT = 1.0  # seconds between two signs of life
SILENCE = 6.0  # seconds without one that end all
GRACE = 2.0  # seconds for an orderly end, before the thread ends the process
CONNECT = 30.0  # seconds for all ranks to connect
ENDED, MISTAKE = 1, 2  # exit codes
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # where Python handles them


T = TypeVar("T")


def launched() -> bool:
    """Whether a launcher's environment says that this process is one of several (mlx.launch, mpirun)."""
    return any(os.environ.get(name) for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))


def alone() -> bool:
    """Whether this process is no rank among others."""
    return Link.of_process is None


def on_first(make: Callable[[], T]) -> T:
    """make() as rank 0 sees it, for what only rank 0 may do or see: files, the terminal, tools. Alone: make()."""
    link = Link.of_process
    return make() if link is None else link.on_first(make)


@dataclass
class _Peer:
    """The other end of a connection."""

    rank: int
    name: str  # in words
    host: str
    pid: int
    socket: socket.socket
    heard: float = field(default_factory=time.monotonic)
    rest: bytes = b""
    ended: bool = False


class Link:
    """This rank's connections. exchange: gives every rank's text to all, by the group's own means."""

    of_process: Link | None = None

    def __init__(self, rank: int, size: int, exchange: Callable[[str], list[str]]):
        self.rank, self.size = rank, size
        self._error = sys.stderr  # what the others print is turned off
        self._lock = threading.Lock()
        self._values: queue.Queue[dict[str, Any]] = queue.Queue()
        self._ending = False  # said, or heard, that it is over
        self._problem: tuple[float, str, int] | None = None  # when to end, with what sentence and code
        self._peers = self._connect(exchange)
        self._wake: socket.socket | None = None
        if threading.current_thread() is threading.main_thread():
            self._take_interrupts()
        self._thread = threading.Thread(target=self._watch, name="qwen_mlx ranks", daemon=True)
        self._thread.start()

    def on_first(self, make: Callable[[], Any]) -> Any:
        """make() of rank 0, which alone calls it: something that JSON can hold. Its QwenMLXError, EOFError or
        KeyboardInterrupt is raised on every rank."""
        kinds = {kind.__name__: kind for kind in (QwenMLXError, EOFError, KeyboardInterrupt)}
        if self.rank:
            message = self._values.get()
            if "raise" in message:
                raise kinds[message["raise"]](message["text"])
            return message["value"]
        try:
            value = make()
        except tuple(kinds.values()) as error:
            name = next(name for name, kind in kinds.items() if isinstance(error, kind))
            self._send({"raise": name, "text": str(error)})
            raise
        self._send({"value": value})
        return value

    def leave(self, error: BaseException | None = None, *, all_end: bool = False) -> None:
        """Ends this rank's part. Another rank's error is rank 0's to tell; rank 0's error ends all, and so does its
        orderly end with `all_end`."""
        if self._ending:
            return
        expected = error is None or isinstance(error, QwenMLXError | KeyboardInterrupt | SystemExit | BrokenPipeError)
        if not expected:
            time.sleep(GRACE)  # most likely another rank is gone: the thread then says which
        if self.rank and error is not None:
            text = str(error) if isinstance(error, QwenMLXError) else f"{type(error).__name__}: {error}"
            self._send({"error": text})
            time.sleep(2 * GRACE)  # rank 0 answers with the end
        self._ending = True
        _quiet()
        now = error is not None or (all_end and self.rank == 0)
        self._send({"end": True, "now": now})
        if all_end and self.rank:
            time.sleep(2 * GRACE)  # rank 0 goes first: MLX's threads complain of every other that does
        deadline = time.monotonic() + GRACE
        while self.rank == 0 and now and time.monotonic() < deadline and not all(one.ended for one in self._peers):
            time.sleep(0.01)

    def _connect(self, exchange: Callable[[str], list[str]]) -> list[_Peer]:
        """Connects all to rank 0, whose addresses and password the others learn through the group."""
        me: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        server = None
        if self.rank == 0:
            addresses = _addresses()
            server = socket.socket()
            local = all(address.startswith("127.") for address in addresses)
            server.bind(("127.0.0.1" if local else "", 0))
            server.listen(self.size)
            me |= {"addresses": addresses, "port": server.getsockname()[1], "password": secrets.token_hex(16)}
        ranks = [json.loads(text) for text in exchange(json.dumps(me))]
        self._names = [f"rank {i} of {self.size} (process {r['pid']} on {r['host']})" for i, r in enumerate(ranks)]
        self._me = me

        def peer(rank: int, connection: socket.socket) -> _Peer:
            connection.settimeout(SILENCE)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _Peer(rank, self._names[rank], ranks[rank]["host"], ranks[rank]["pid"], connection)

        first = ranks[0]
        if server is None:
            near = ["127.0.0.1"] if first["host"] == me["host"] else []
            for address in [*near, *first["addresses"]]:
                with contextlib.suppress(OSError):
                    connection = socket.create_connection((address, first["port"]), timeout=CONNECT / 3)
                    connection.sendall(json.dumps([first["password"], self.rank]).encode() + b"\n")
                    return [peer(0, connection)]
            raise QwenMLXError(
                f"{self._names[self.rank]} cannot reach rank 0 at {' or '.join(first['addresses'])}, port "
                f"{first['port']}; let the machines' firewalls pass connections between them."
            )
        peers: list[_Peer] = []
        server.settimeout(CONNECT)
        with server:
            while len(peers) < self.size - 1:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = min(set(range(1, self.size)) - {one.rank for one in peers})
                    raise QwenMLXError(f"{self._names[missing]} did not connect to rank 0 in {CONNECT:g} s.") from None
                connection.settimeout(CONNECT)
                with contextlib.suppress(OSError, ValueError, TypeError):
                    password, rank = json.loads(_first_line(connection))
                    if secrets.compare_digest(password, me["password"]):
                        peers.append(peer(rank, connection))
                        continue
                connection.close()  # a stranger
        return peers

    def _take_interrupts(self) -> None:
        """Ctrl-C reaches every rank of a machine: rank 0 alone acts on it. The thread learns of signals even while the
        main thread waits for arrays."""
        if self.rank:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._wake, wakes = socket.socketpair()
        self._wake.setblocking(False)
        wakes.setblocking(False)
        signal.set_wakeup_fd(wakes.detach(), warn_on_full_buffer=False)

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            for peer in self._peers:
                if not peer.ended:
                    with contextlib.suppress(OSError):  # the thread sees why
                        peer.socket.sendall(data)

    def _watch(self) -> None:
        beat = 0.0
        while True:
            now = time.monotonic()
            if now - beat >= BEAT:
                beat = now
                self._send({"beat": True})
            if self._problem and now >= self._problem[0]:
                self._stop(*self._problem[1:])
            live = [peer for peer in self._peers if not peer.ended]
            sockets = [peer.socket for peer in live] + ([self._wake] if self._wake else [])
            if not live:
                return
            ready, _, _ = select.select(sockets, [], [], BEAT / 4)
            if time.monotonic() - now > 2 * BEAT:  # this process itself was stopped, as by Ctrl-Z, or starved
                for peer in live:
                    peer.heard = time.monotonic()
            if self._wake in ready:
                asked = [number for number in self._wake.recv(64) if number in ENDING]
                if asked:
                    self._later(GRACE, "", 128 + asked[0])
            for peer in live:
                if peer.socket in ready:
                    self._hear(peer)
                elif time.monotonic() - peer.heard > SILENCE:
                    self._lost(peer, f"has not answered for {SILENCE:g} s")

    def _hear(self, peer: _Peer) -> None:
        try:
            data = peer.socket.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._lost(peer, "has died")
            return
        peer.heard = time.monotonic()
        *lines, peer.rest = (peer.rest + data).split(b"\n")
        for message in map(json.loads, lines):
            if "error" in message:
                self._later(GRACE / 2, f"{peer.name}: {message['error']}", MISTAKE)
            elif "end" in message:
                peer.ended = self.rank == 0 or not message["now"]
                if message["now"] and peer.rank == 0:  # whatever this rank still waits for
                    _quiet()
                    self._send({"end": True, "now": False})
                    _await_end(peer.socket)
                    os._exit(0)
                elif message["now"]:
                    self._lost(peer, "was ended")
            elif "value" in message or "raise" in message:
                self._values.put(message)

    def _lost(self, peer: _Peer, how: str) -> None:
        peer.ended = True
        if self._ending:
            return
        if peer.host == self._me["host"]:  # one that is stopped obeys nothing else
            with contextlib.suppress(OSError):
                os.kill(peer.pid, signal.SIGKILL)
        self._stop(f"{peer.name} {how}; all ranks end." if self.rank < 2 else "", ENDED)

    def _later(self, seconds: float, text: str, code: int) -> None:
        if self._problem is None:
            self._problem = (time.monotonic() + seconds, text, code)

    def _stop(self, text: str, code: int) -> None:
        """Ends the process, unless the main thread is about to."""
        if self._ending:
            self._problem = None
            return
        self._ending = True
        if text:
            with contextlib.suppress(OSError, ValueError):
                print(f"\nerror: {text}", file=self._error, flush=True)  # MLX may have begun a line
        self._send({"end": True, "now": True})
        os._exit(code)


def _await_end(connection: socket.socket) -> None:
    """Until the other process is gone, or for GRACE seconds."""
    with contextlib.suppress(OSError):
        connection.settimeout(GRACE)
        while connection.recv(1 << 16):
            pass


def _quiet() -> None:
    """Turns off what MLX's threads say when connections close, and nothing that Python prints."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.stderr.fileno() == 2:
            sys.stderr.flush()
            sys.stderr = open(os.dup(2), "w", buffering=1)  # noqa: SIM115 (for the rest of the process)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _addresses() -> list[str]:
    """Where the other ranks may reach this one: what MLX's host file says, or this machine's name."""
    path, rank = os.environ.get("MLX_HOSTFILE"), int(os.environ.get("MLX_RANK", "0"))
    found: list[str] = []
    if path:
        with contextlib.suppress(OSError, ValueError, LookupError, AttributeError), open(path) as file:
            found = [address.rpartition(":")[0] for address in json.load(file)[rank]]
    if found and all(address.startswith("127.") for address in found):
        return found[:1]
    return list(dict.fromkeys([*found, socket.gethostname()]))


def _first_line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < 1024:
        byte = connection.recv(1)
        if not byte:
            break
        data += byte
    return data
