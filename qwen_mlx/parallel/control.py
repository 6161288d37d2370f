"""The control channel of several ranks: signs of life, what rank 0 read, and the end of all.

It is a star of TCP connections to rank 0, watched by a thread of each rank, because a rank that waits for arrays waits
in C++ and cannot be interrupted: the thread notices a rank that died or fell silent, says so in one sentence and ends
its own process.
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
from pathlib import Path
from typing import Any, TypeVar

from ..errors import LONGEST_SENTENCE, QwenMLXError, shortened

BEAT = 1.0  # seconds between two signs of life
SILENCE = 6.0  # seconds without one that end all ranks
GRACE = 2.0  # seconds for an orderly end, before the thread ends the process
CONNECT = 30.0  # seconds for all ranks to connect
LOGIN = 1024  # bytes at most of a rank's first line
STRANGERS = 64  # connections at most that have not logged in; one more closes the oldest
LINE = 1 << 16  # bytes at most of a rank's message
VALUE = 1 << 28  # bytes at most of rank 0's, which may hold a text that it read
PIECE = 1 << 16  # bytes that another rank must take within SILENCE
ENDED, MISTAKE = 1, 2  # exit codes
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that Python handles
ERRORS = {kind.__name__: kind for kind in (QwenMLXError, EOFError, KeyboardInterrupt)}  # that rank 0 passes on

T = TypeVar("T")


def launched() -> bool:
    """True if a launcher's environment says that this process is one of several (mlx.launch, mpirun)."""
    return any(os.environ.get(name) for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))


def alone() -> bool:
    """True if this process is not one of several ranks."""
    return ControlChannel.of_process is None


def on_first(make: Callable[[], T]) -> T:
    """make() as rank 0 sees it, for what only rank 0 may do or see: files, the terminal, tools. Alone: make()."""
    channel = ControlChannel.of_process
    return make() if channel is None else channel.on_first(make)


def read_message(line: bytes | bytearray) -> dict[str, Any]:
    """The JSON object of a line; an empty one for a line that holds anything else."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def identity(pid: int | str = "self") -> str | None:
    """A text that only one process ever has: boot, PID namespace and start time. None where /proc does not say it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{boot} {os.readlink(f'/proc/{pid}/ns/pid')} {started}"
    except (OSError, IndexError):
        return None


def kill_proven(process: dict[str, Any]) -> bool:
    """Sends SIGKILL to a rank's process if it is surely still that process; one that cannot be proven is left to end
    itself. process: the rank's own "pid" and "identity". Returns True if the signal was sent."""
    pid = process.get("pid")
    if type(pid) is not int or pid < 2:
        return False
    try:
        descriptor = os.pidfd_open(pid)  # names the process that is compared, whoever gets its number later
    except (OSError, AttributeError, OverflowError):
        return False
    try:
        if identity(pid) is None or identity(pid) != process.get("identity"):
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


@dataclass
class _Peer:
    """The other end of a connection. process: what that rank told about itself through the group."""

    rank: int
    name: str  # in words
    process: dict[str, Any]
    socket: socket.socket
    heard: float = field(default_factory=time.monotonic)
    received: bytearray = field(default_factory=bytearray)  # of a line that is not complete
    sending: threading.Lock = field(default_factory=threading.Lock)
    stalled: bool = False  # it has not taken what was sent, of which it may have half
    ended: bool = False


class ControlChannel:
    """This rank's connections. exchange: gives every rank's text to all, by the group's own means."""

    of_process: ControlChannel | None = None

    def __init__(self, rank: int, size: int, exchange: Callable[[str], list[str]]):
        self.rank, self.size = rank, size
        self._stderr = sys.stderr  # what the other ranks print is turned off
        self._values: queue.Queue[dict[str, Any]] = queue.Queue()
        self._ending = False  # said, or heard, that it is over
        self._planned_end: tuple[float, str, int] | None = None  # its time, sentence and exit code
        self._peers = self._connect(exchange)
        self._signals: socket.socket | None = None
        if threading.current_thread() is threading.main_thread():
            self._take_signals()
        threading.Thread(target=self._watch, name="qwen_mlx ranks", daemon=True).start()

    def on_first(self, make: Callable[[], Any]) -> Any:
        """make() of rank 0, which alone calls it: something that JSON can hold. Its QwenMLXError, EOFError or
        KeyboardInterrupt is raised on every rank."""
        if self.rank:
            message = self._values.get()
            error_type = ERRORS.get(str(message.get("raise")))
            if error_type is not None:
                raise error_type(message.get("text"))
            return message.get("value")
        try:
            value = make()
        except tuple(ERRORS.values()) as error:
            name = next(name for name, kind in ERRORS.items() if isinstance(error, kind))
            self._send({"raise": name, "text": str(error)})
            raise
        self._send({"value": value})
        return value

    def leave(self, error: BaseException | None = None, *, all_end: bool = False) -> None:
        """Ends this rank's part. Rank 0 tells the error of another rank; its own error ends all ranks, and so does its
        orderly end with `all_end`."""
        if self._ending:
            return
        expected = error is None or isinstance(error, QwenMLXError | KeyboardInterrupt | SystemExit | BrokenPipeError)
        if not expected:
            time.sleep(GRACE)  # most likely another rank is gone: the thread then says which
        if self.rank and error is not None:
            text = str(error) if isinstance(error, QwenMLXError) else f"{type(error).__name__}: {error}"
            self._send({"error": shortened(text, LONGEST_SENTENCE)})
            time.sleep(2 * GRACE)  # rank 0 answers with the end
        self._ending = True
        _silence_stderr()
        now = error is not None or (all_end and self.rank == 0)
        self._send({"end": True, "now": now})
        if all_end and self.rank:
            time.sleep(2 * GRACE)  # rank 0 goes first: MLX's threads complain of every other that does
        deadline = time.monotonic() + GRACE
        while self.rank == 0 and now and time.monotonic() < deadline and not all(one.ended for one in self._peers):
            time.sleep(0.01)

    def _connect(self, exchange: Callable[[str], list[str]]) -> list[_Peer]:
        """Connects all ranks to rank 0, whose addresses and password the others learn through the group."""
        me: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "identity": identity()}
        server = None
        if self.rank == 0:
            addresses = _addresses()
            server = socket.socket()
            local = all(address.startswith("127.") for address in addresses)
            server.bind(("127.0.0.1" if local else "", 0))
            server.listen(STRANGERS + self.size)
            me |= {"addresses": addresses, "port": server.getsockname()[1], "password": secrets.token_hex(16)}
        ranks = [json.loads(text) for text in exchange(json.dumps(me))]
        names = [f"rank {i} of {self.size} (process {r['pid']} on {r['host']})" for i, r in enumerate(ranks)]
        if server is not None:
            return self._accept(server, me["password"], names, ranks)
        first = ranks[0]
        near = ["127.0.0.1"] if first["host"] == me["host"] else []
        for address in [*near, *first["addresses"]]:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((address, first["port"]), timeout=CONNECT / 3)
                connection.sendall(json.dumps({"password": first["password"], "rank": self.rank}).encode() + b"\n")
                return [_Peer(0, names[0], first, _prepared(connection))]
        raise QwenMLXError(
            f"{names[self.rank]} cannot reach rank 0 at {' or '.join(first['addresses'])}, port {first['port']}; let "
            "the machines' firewalls pass connections between them."
        )

    def _accept(
        self, server: socket.socket, password: str, names: list[str], ranks: list[dict[str, Any]]
    ) -> list[_Peer]:
        """One connection of every other rank. A stranger, who lacks the password, is turned away and keeps nobody
        waiting. Raises QwenMLXError naming a rank that did not connect in time."""
        peers: dict[int, _Peer] = {}
        strangers: dict[socket.socket, bytes] = {}  # with what each has sent
        deadline = time.monotonic() + CONNECT
        try:
            while missing := set(range(1, self.size)) - peers.keys():
                ready, _, _ = select.select([server, *strangers], [], [], max(0.0, deadline - time.monotonic()))
                if time.monotonic() > deadline:
                    raise QwenMLXError(f"{names[min(missing)]} did not connect to rank 0 in {CONNECT:g} s.")
                for connection in ready:
                    if connection is server:
                        if len(strangers) >= STRANGERS + self.size:  # select() and the process have limits
                            oldest = next(iter(strangers))
                            del strangers[oldest]
                            oldest.close()
                        with contextlib.suppress(OSError):  # it may be gone again
                            strangers[server.accept()[0]] = b""
                        continue
                    if connection not in strangers:  # it was closed for a newer one
                        continue
                    data = b""
                    with contextlib.suppress(OSError):
                        data = connection.recv(LOGIN)
                    strangers[connection] += data
                    line, end, rest = strangers[connection].partition(b"\n")
                    if data and not end and len(line) < LOGIN:
                        continue
                    del strangers[connection]
                    login = read_message(line)
                    rank = login.get("rank")
                    if (
                        secrets.compare_digest(str(login.get("password")).encode(errors="replace"), password.encode())
                        and type(rank) is int
                        and rank in missing - peers.keys()
                    ):
                        peers[rank] = _Peer(
                            rank, names[rank], ranks[rank], _prepared(connection), received=bytearray(rest)
                        )
                    else:
                        connection.close()
        finally:
            for connection in [server, *strangers]:
                connection.close()
        return list(peers.values())

    def _take_signals(self) -> None:
        """Lets the thread learn of signals even while the main thread waits for arrays. Ctrl-C reaches every rank of a
        machine: rank 0 alone acts on it."""
        if self.rank:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._signals, sender = socket.socketpair()
        self._signals.setblocking(False)
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)

    def _send(self, message: dict[str, Any], wait: float = -1) -> None:
        """Sends to every other rank. One to which another thread is sending is waited for, `wait` seconds at most
        unless that is negative, and then left out."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        for peer in self._peers:
            if peer.ended or not peer.sending.acquire(timeout=wait):
                continue
            try:
                for start in range(0, len(data), PIECE):
                    peer.socket.sendall(data[start : start + PIECE])
            except OSError as error:  # the thread sees why; after half a line no other one could be read
                peer.stalled = peer.stalled or isinstance(error, TimeoutError)
                with contextlib.suppress(OSError):
                    peer.socket.shutdown(socket.SHUT_RDWR)
            finally:
                peer.sending.release()

    def _watch(self) -> None:
        """Watches the other ranks until all have ended. An error in here ends all: nothing may go on unwatched."""
        try:
            beat = 0.0
            while any(not peer.ended for peer in self._peers):
                now = time.monotonic()
                if now - beat >= BEAT:
                    beat = now
                    self._send({"beat": True}, wait=0)  # all that another thread sends is a sign of life, too
                if self._planned_end and now >= self._planned_end[0]:
                    self._stop(*self._planned_end[1:])
                self._listen(now)
        except Exception as error:
            self._stop(f"the watch over the ranks failed ({type(error).__name__}: {error}); all ranks end.", ENDED)

    def _listen(self, now: float) -> None:
        """Takes what the other ranks and signals say, waiting for a moment at most."""
        live = [peer for peer in self._peers if not peer.ended]
        sockets = [peer.socket for peer in live] + ([self._signals] if self._signals else [])
        ready, _, _ = select.select(sockets, [], [], BEAT / 4)
        if time.monotonic() - now > 2 * BEAT:  # this process itself was stopped, as by Ctrl-Z, or starved
            for peer in live:
                peer.heard = time.monotonic()
        if self._signals is not None and self._signals in ready:
            asked = [number for number in self._signals.recv(64) if number in ENDING]
            if asked:
                self._plan_end(GRACE, "", 128 + asked[0])
        for peer in live:
            if peer.socket in ready:
                self._receive(peer)
            elif time.monotonic() - peer.heard > SILENCE:
                peer.ended = True
                if not self._ending:
                    kill_proven(peer.process)  # a process that is stopped obeys nothing else
                self._lose(peer, f"has not answered for {SILENCE:g} s")

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.socket.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._lose(peer, f"has taken nothing for {SILENCE:g} s" if peer.stalled else "has died")
            return
        peer.heard = time.monotonic()
        peer.received += data
        if b"\n" not in data:
            if len(peer.received) > (LINE if self.rank == 0 else VALUE):
                self._lose(peer, f"has sent {len(peer.received):,} bytes without the end of a line")
            return
        *lines, peer.received = peer.received.split(b"\n")
        for message in map(read_message, lines):
            if "error" in message:
                self._plan_end(GRACE / 2, f"{peer.name}: {message['error']}", MISTAKE)
            elif "end" in message:
                now = bool(message.get("now"))
                peer.ended = self.rank == 0 or not now
                if now and peer.rank == 0:  # whatever this rank still waits for
                    _silence_stderr()
                    self._send({"end": True, "now": False})
                    _await_close(peer.socket)
                    os._exit(0)
                elif now:
                    self._lose(peer, "was ended")
            elif self.rank and ("value" in message or "raise" in message):
                self._values.put(message)

    def _lose(self, peer: _Peer, how: str) -> None:
        peer.ended = True
        # Rank 0 sees every other rank's end, and rank 1 sees rank 0's: one of them says it, and no other repeats it.
        self._stop(f"{peer.name} {how}; all ranks end." if self.rank < 2 else "", ENDED)

    def _plan_end(self, seconds: float, text: str, code: int) -> None:
        if self._planned_end is None:
            self._planned_end = (time.monotonic() + seconds, text, code)

    def _stop(self, text: str, code: int) -> None:
        """Ends the process, unless the main thread is about to."""
        if self._ending:
            self._planned_end = None
            return
        self._ending = True
        if text:
            text = shortened(" ".join(text.split()), LONGEST_SENTENCE)
            text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
            with contextlib.suppress(OSError, ValueError):
                print(f"\nerror: {text}", file=self._stderr, flush=True)  # MLX may have begun a line
        self._send({"end": True, "now": True}, wait=GRACE)
        os._exit(code)


def _prepared(connection: socket.socket) -> socket.socket:
    connection.settimeout(SILENCE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _await_close(connection: socket.socket) -> None:
    """Waits until the other process is gone, for GRACE seconds at most."""
    with contextlib.suppress(OSError):
        connection.settimeout(GRACE)
        while connection.recv(1 << 16):
            pass


def _silence_stderr() -> None:
    """Turns off what MLX's threads say when connections close, and nothing that Python prints."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.stderr.fileno() == 2:
            sys.stderr.flush()
            sys.stderr = open(os.dup(2), "w", buffering=1)  # noqa: SIM115 (for the rest of the process)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _addresses() -> list[str]:
    """The addresses at which other ranks may reach this one: the host file's of MLX, or this machine's name."""
    path, rank = os.environ.get("MLX_HOSTFILE"), int(os.environ.get("MLX_RANK", "0"))
    addresses: list[str] = []
    if path:
        with contextlib.suppress(OSError, ValueError, LookupError, AttributeError), open(path) as file:
            addresses = [address.rpartition(":")[0] for address in json.load(file)[rank]]
    if addresses and all(address.startswith("127.") for address in addresses):
        return addresses[:1]
    return list(dict.fromkeys([*addresses, socket.gethostname()]))
