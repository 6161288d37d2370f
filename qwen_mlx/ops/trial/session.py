"""The trial: on a device that nobody here has seen, a kernel is used where it has proved itself, else MLX's own.

A process of its own (child.py) compiles, launches, checks and times the kernels that one model uses. What it says
is a verdict, kept in a file under the cache folder, whose name and content tell the device, the system, MLX, the
kernels and the model's shapes: any change asks anew. A file that is damaged or another machine's is no verdict.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import tunings
from .cases import Spec, cases
from .verdict import Verdict, file_of, identity, is_time, read, read_choices, write

CASE_SECONDS, ALL_SECONDS = 20.0, 90.0  # of one case, and of all: what takes longer is refused
MARGIN = 1.03  # times of plain MLX that a kernel may take: the measure's noise
LONGEST = 1 << 20  # bytes of a line that the process prints
# A step is made of these; an embedding's rows are unpacked for it too.
STEP = ("matvec", "attend", "unpack")

Progress = Callable[[int, int], None]  # called with cases done and cases in all


def prove(spec: Spec, folder: Path, again: bool = False, progress: Progress | None = None) -> tuple[Verdict, bool]:
    """The verdict on a model's kernels here, and whether a trial was held for it now: where none is kept, or `again`.

    folder: the cache's.
    """
    known = identity(spec)
    path = file_of(folder, known)
    kept = None if again else read(path, known)
    if kept is not None:
        return kept, False
    verdict = hold(spec, progress)
    if verdict.proven or verdict.refused:
        write(path, known, verdict)
    return verdict, True


def hold(spec: Spec, progress: Progress | None = None) -> Verdict:
    """Holds a trial. A process that crashes, hangs or answers nonsense costs the part that it was trying, and another
    one goes on with the rest."""
    start = time.monotonic()
    parts = {case.name: case.part for case in cases(spec)}
    trial = _Trial(parts, progress)
    while trial.left and time.monotonic() - start < ALL_SECONDS:
        before = len(trial.left)
        trial.ask(spec, ALL_SECONDS - (time.monotonic() - start))
        if len(trial.left) == before:
            break
    return trial.verdict(time.monotonic() - start)


class _Trial:
    """The results so far, which processes add to."""

    def __init__(self, parts: Mapping[str, str], progress: Progress | None) -> None:
        self._parts, self._progress = parts, progress
        self._times: dict[str, tuple[int, float, float]] = {}  # of a case that is right: its count, kernel's, plain's
        self._refused: dict[str, str] = {}
        self._choices: dict[str, tunings.Choice] = {}
        self._cut = False  # the cuts are chosen, or given up
        self._trouble = ""  # why no process could be asked

    @property
    def left(self) -> list[str]:
        """Cases without a result."""
        return [name for name, part in self._parts.items() if name not in self._times and part not in self._refused]

    def ask(self, spec: Spec, seconds: float) -> None:
        """Asks one process for what is left."""
        token, running = f"{secrets.token_hex(8)} ", ""
        skip = [*self._times, *self._refused, *["cuts"] * self._cut]
        request = {"token": token, "seconds": seconds, "skip": skip, "spec": spec.as_json()}
        end = time.monotonic() + seconds
        with answers(request) as child:
            while True:
                wait = min(CASE_SECONDS, end - time.monotonic()) if running else end - time.monotonic()
                try:
                    line = child.lines.get(timeout=max(wait, 0.01))
                except queue.Empty:
                    line, why = None, "it did not end in time"
                else:
                    why = child.end() if line is None else ""
                if line is None:
                    break
                message = _message(line, token)
                if message is None:
                    continue
                if message.get("end") is True:
                    why = "it gave no result"
                    break
                if running:
                    self._take(running, message)
                    running = ""
                if message.get("start") in (*self._parts, "cuts"):
                    running = message["start"]
        self._trouble = why
        if running:
            self._refuse(running, why)

    def _take(self, name: str, message: Mapping[str, Any]) -> None:
        """Takes the result of the case that was running; anything but a whole one refuses its part."""
        if message.get("done") != name:
            self._refuse(name, "its result was lost")
        elif name == "cuts":
            self._cut = True
            try:
                self._choices = read_choices(message["choices"])
            except (ValueError, KeyError, TypeError, AttributeError):
                self._refuse(name, "its result was lost")
        elif isinstance(message.get("fault"), str):
            self._refuse(name, message["fault"])
        elif "fault" in message and all(is_time(message.get(key)) for key in ("count", "kernel", "plain")):
            self._times[name] = message["count"], message["kernel"], message["plain"]
        else:
            self._refuse(name, "its result was lost")
        if self._progress is not None:
            self._progress(len(self._parts) - len(self.left), len(self._parts))

    def _refuse(self, name: str, reason: str) -> None:
        part = self._parts.get(name, "matvec")  # whose cuts were being chosen
        self._refused.setdefault(part, f"{name}: {reason}")

    def verdict(self, seconds: float) -> Verdict:
        """The verdict on all parts; parts without a result are refused."""
        refused = dict(self._refused)
        for name in self.left:
            refused.setdefault(self._parts[name], self._trouble or "the trial took too long")
        tried = list(dict.fromkeys(self._parts.values()))
        for part in tried:
            times = [self._times[name] for name, p in self._parts.items() if p == part and name in self._times]
            kernel, plain = (sum(max(t[0], 1) * t[i] for t in times) for i in (1, 2))
            if part not in refused and kernel > MARGIN * plain:
                refused[part] = f"slower than MLX's own, {kernel * 1e6:.0f} us against {plain * 1e6:.0f}"
        missing = next((part for part in STEP if part in refused), None)
        if missing is not None:
            refused["step"] = f"it needs {missing}"
        proven = [part for part in ("step", *tried) if part not in refused]
        pairs = {name: (kernel, plain) for name, (_, kernel, plain) in self._times.items()}
        return Verdict(tuple(proven), refused, self._choices, self._speedup(refused), pairs, seconds)

    def _speedup(self, refused: Mapping[str, str]) -> float | None:
        of_token = [(self._parts[name], *times) for name, times in self._times.items() if times[0]]
        plain = sum(count * plain for _, count, _, plain in of_token)
        used = sum(
            count * (plain if {part, "step"} & refused.keys() else kernel) for part, count, kernel, plain in of_token
        )
        return plain / used if used else None


def _message(line: bytes, token: str) -> dict[str, Any] | None:
    """A line of the process's own, None for what anything else has printed."""
    if not line.startswith(token.encode()):
        return None
    try:
        message = json.loads(line[len(token) :])
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def command() -> list[str]:
    """The process's command: this Python, with this process's path and none of the folder that it runs in."""
    code = "import sys; sys.path[:] = sys.argv[1:]; from qwen_mlx.ops.trial.child import main; main()"
    return [sys.executable, "-c", code, *(os.path.abspath(path) for path in sys.path)]


@dataclass
class Answers:
    """A process's answers. lines: its own, None at the end; end: says how it ended."""

    lines: queue.Queue[bytes | None]
    end: Callable[[], str]


@contextlib.contextmanager
def answers(request: Mapping[str, Any]) -> Iterator[Answers]:
    """A process that answers the request; it is killed with all that it started when the block ends."""
    environment = {**os.environ, "QWEN_MLX_KERNELS": "on", "MLX_ENABLE_TF32": "0"}
    lines: queue.Queue[bytes | None] = queue.Queue()
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command(), stdin=pipe, stdout=pipe, stderr=errors, env=environment, start_new_session=True
            )
        except OSError as error:
            reason = f"no process could be started ({error.strerror})"
            lines.put(None)
            yield Answers(lines, lambda: reason)
            return
        token = request["token"].encode()
        threads = [
            threading.Thread(target=_feed, args=(process.stdin, json.dumps(request).encode()), daemon=True),
            threading.Thread(target=_drain, args=(process.stdout, lines, token), daemon=True),
        ]
        try:
            for thread in threads:
                thread.start()
            yield Answers(lines, lambda: _end(process, errors))
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for thread in threads:
                thread.join()


def _end(process: subprocess.Popen[bytes], errors: Any) -> str:
    """A process's end in words, with the last line that it wrote on standard error."""
    code = process.wait()
    errors.seek(0)
    said = [line.strip() for line in errors.read()[-2000:].decode(errors="replace").splitlines() if line.strip()]
    how = f"it ended with {f'signal {-code}' if code < 0 else f'status {code}'}"
    return f"{how}: {said[-1][:200]}" if said else how


def _feed(stream: Any, data: bytes) -> None:
    with contextlib.suppress(OSError), stream:
        stream.write(data)


def _drain(stream: Any, lines: queue.Queue[bytes | None], token: bytes) -> None:
    """Queues the lines that begin with the token; others, however many, are dropped."""
    with stream:
        while line := stream.readline(LONGEST):
            if line.startswith(token):
                lines.put(line)
    lines.put(None)
