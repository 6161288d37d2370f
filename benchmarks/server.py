"""`python -m benchmarks.server`: what the server costs and gains, each figure beside its goal.

- `stream`: a stream's tokens a second, as a share of the library's.
- `batch`: eight streams' tokens a second, as a share of batch_generate's.
- `mlx-lm`: the same as a multiple of mlx_lm.server's, which gets the file's weights by `qwen-mlx convert` (it needs the
  extra `bench` and some GB of disk).
- `keystroke`: the time to a fill's first token after a second keystroke in a file of about 1,500 tokens, as a share of
  the time after the first.
- `scale`: what `--streams` streams make together, as a multiple of one stream's tokens a second. Their clients run in a
  process of their own, and count what comes from the first request to the last token.
- `mask`: what a JSON schema adds to a decoding step.
- `memory`: the resident memory after `--requests` mixed requests less that after the hundredth, and the number of wrong
  answers.

The two sides of a ratio alternate, `--repeats` times over, and the median of the ratios is printed. The server runs in
a thread of this process, mlx_lm.server in a process of its own. The goals are those of the default model on a CPU, and
of `scale` those of 7B on an H200. Takes about ten minutes on two cores. `--size` takes random weights, packed as
Q4_K_M, where no file is:

    python -m benchmarks.server --size 7B --parts scale --streams 32 --tokens 256
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import httpx
    import llguidance  # noqa: F401
    import uvicorn
except ModuleNotFoundError as missing:
    print(f"error: {missing.name} is not installed: pip install -e '.[cpu,bench]'.", file=sys.stderr)
    sys.exit(2)

from benchmarks import structured
from benchmarks.arguments import Parser, at_least, positive, require_module
from benchmarks.random_models import SHAPES, byte_tokenizer, raw_model
from benchmarks.server_load import answers_alone, mixed_cases, send_mixed, streamed_speed
from qwen_mlx import QwenMLXError, batch_generate, load, stream_generate
from qwen_mlx.backend import describe
from qwen_mlx.cli import command as cli
from qwen_mlx.conversion.convert import convert
from qwen_mlx.generation.sampling import SamplingSettings
from qwen_mlx.generation.structured import constraint
from qwen_mlx.generation.text import encode_prompt
from qwen_mlx.loading import hub
from qwen_mlx.server.app import make_app
from qwen_mlx.server.scheduler import Scheduler
from qwen_mlx.server.service import Service

PARTS = ("stream", "batch", "mlx-lm", "keystroke", "scale", "mask", "memory")
OF_FILES = ("mlx-lm", "keystroke", "mask", "memory")  # parts that random weights cannot measure
TEXT = "def reverse(text):\n    return text[::-1]\n\n\ndef count(text, letter):\n    return text.count(letter)\n\n\n"
HUNDREDTH = 100
LOAD_CACHE = 50_000_000  # bytes: full after a hundred requests, so that what grows afterwards is a leak
PEER_TOKENS = 8  # mlx-lm takes seconds a token on a CPU


def random_weights(size: str) -> Any:
    """A model of random weights and a tokenizer of its vocabulary, as load() gives them."""
    model = raw_model(size)
    model.generation_defaults = SamplingSettings()
    return model, byte_tokenizer(model.config.vocab_size)


@contextlib.contextmanager
def serving(loaded: Any, slots: int, **options: Any) -> Iterator[httpx.Client]:
    """A server in a thread, and a client of it."""
    model, tokenizer = loaded
    service = Service(model, tokenizer, Scheduler(model, tokenizer, slots=slots, **options), "model", 3600)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=3600) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def serving_mlx_lm(path: Path) -> Iterator[httpx.Client]:
    """mlx_lm.server with the same weights in a process of its own, and a client of it. Raises QwenMLXError where it
    does not start."""
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        convert(path, work / "model")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", work / "model", "--port", str(port)]
        log = stack.enter_context((work / "log").open("w+"))
        process = subprocess.Popen(command, stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=3600))
        for _ in range(600):
            if process.poll() is not None:
                raise QwenMLXError(f"mlx_lm.server does not start: {(work / 'log').read_text()[-300:]}")
            with contextlib.suppress(httpx.ConnectError):
                client.get("/health").raise_for_status()
                break
            time.sleep(0.2)
        yield client


def stream_speed(client: httpx.Client, ids: list[int], tokens: int) -> float:
    """Tokens a second of a stream that no end token ends, from its first token to its last."""
    body = {"prompt": ids, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0, "stream": True, "logprobs": 0}
    times = []
    with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["logprobs"]["tokens"]:
                times.append(time.perf_counter())
    return (len(times) - 1) / (times[-1] - times[0])


def library_speed(loaded: Any, ids: list[int], tokens: int) -> float:
    """The same without a server."""
    times = []
    for _ in stream_generate(*loaded, ids, max_tokens=tokens, min_tokens=tokens, temperature=0, logprobs=0):
        times.append(time.perf_counter())
    return (len(times) - 1) / (times[-1] - times[0])


def streams_speed(client: httpx.Client, prompts: list[str], tokens: int, **fields: Any) -> float:
    """Tokens a second of all prompts at once, their reading included."""
    bodies = [{"prompt": text, "max_tokens": tokens, "temperature": 0, **fields} for text in prompts]
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda body: client.post("/v1/completions", json=body).raise_for_status(), bodies))
    seconds = time.perf_counter() - start
    return sum(answer.json()["usage"]["completion_tokens"] for answer in answers) / seconds


def batch_speed(loaded: Any, prompts: list[str], tokens: int) -> float:
    """The same without a server."""
    start = time.perf_counter()
    batch_generate(*loaded, prompts, raw=True, max_tokens=tokens, min_tokens=tokens, temperature=0)
    return len(prompts) * tokens / (time.perf_counter() - start)


def keystroke_seconds(client: httpx.Client, number: int, typed: str) -> float:
    """Seconds to the first token of a fill in a file of about 1,500 tokens, which `number` tells from others."""
    body = {"input_prefix": f"# {number}\n{TEXT * 36}", "input_suffix": TEXT * 12, "n_predict": 1, "prompt": typed}
    start = time.perf_counter()
    client.post("/infill", json=body).raise_for_status()
    return time.perf_counter() - start


def scaling(client: httpx.Client, prompts: Callable[[int], list[str]], repeats: int, tokens: int) -> None:
    """Prints the speed of all prompts' streams at once as a multiple of one stream's. Their clients share a process, so
    that their work takes none of the server's time."""
    url = str(client.base_url)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients:

        def speed(texts: list[str]) -> float:
            return clients.submit(streamed_speed, url, texts, tokens).result()

        for several in (prompts(-1), prompts(-2)[:1]):  # what a first time compiles is not measured
            speed(several)
        compare(
            f"{len(prompts(0))} streams as a multiple of one",
            "tok/s",
            "at least 8 for 32 of 7B in Q4_K_M on an H200",
            repeats,
            lambda i: speed(prompts(2 * i)),
            lambda i: speed(prompts(2 * i + 1)[:1]),
        )


def compare(title: str, unit: str, goal: str, repeats: int, ours: Callable[[int], float], theirs: Any) -> None:
    """Prints the medians of two measurements that take turns, and of their ratios."""
    pairs = [(ours(i), theirs(i)) for i in range(repeats)]
    mine, other = (statistics.median(side) for side in zip(*pairs))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{title}: {ratio:.3f} ({goal}); {mine:.2f} and {other:.2f} {unit}", flush=True)


def mask_share(loaded: Any, steps: int) -> None:
    """Prints what a JSON schema adds to a step."""
    model, tokenizer = loaded
    made = constraint(tokenizer, json_schema=structured.SCHEMA)
    times = structured.measure(model, encode_prompt(tokenizer, structured.PROMPT), made, steps)
    print(
        f"a JSON schema's share of a step: {times['share']:+.3f} (at most 0.1); {times['structured']:.2f} and "
        f"{times['free']:.2f} ms, its mask {times['mask']:.2f} ms",
        flush=True,
    )


def memory_growth(loaded: Any, slots: int, count: int) -> None:
    """Prints the growth of the resident memory over `count` mixed requests after the hundredth, and wrong answers."""
    import psutil

    cases, memory = mixed_cases(most_tokens=8), []

    def ended(number: int) -> None:
        if number in (HUNDREDTH, count):
            memory.append(psutil.Process().memory_info().rss)

    with serving(loaded, slots, cache_bytes=LOAD_CACHE) as client:
        url = str(client.base_url)
        expected = answers_alone(url, cases)
        mistakes = asyncio.run(send_mixed(url, cases, expected, count, ended))
    grown = (memory[1] - memory[0]) / 1e6
    print(f"memory after {count} mixed requests less that after {HUNDREDTH}: {grown:.1f} MB (at most 50)")
    print(f"wrong answers: {len(mistakes)} (0)", *mistakes[:3], sep="\n  ", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each part."""
    parser = Parser("server", __doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="a GGUF or a folder (default: the built-in model)")
    source.add_argument("--size", choices=SHAPES, help="random weights of this size, for stream, batch and scale")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help="(default: all)")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--tokens", type=at_least(2), default=32, help="of each stream (%(default)s)")
    parser.add_argument("--streams", type=positive, default=8)
    parser.add_argument("--requests", type=at_least(HUNDREDTH + 1), default=300, help="of `memory`; the goal's: 1000")
    measure(parser.parse_args(argv))


def measure(arguments: argparse.Namespace) -> None:
    """Measures the parts that are asked for."""
    size, repeats, tokens = arguments.size, arguments.repeats, arguments.tokens
    parts = arguments.parts or [part for part in PARTS if size is None or part not in OF_FILES]
    if size is not None and (wrong := next((part for part in parts if part in OF_FILES), None)):
        raise QwenMLXError(f"--parts {wrong} needs a file, and --size makes random weights; leave one of them out.")
    if "mlx-lm" in parts:
        require_module("mlx_lm", "install the extra bench, or leave mlx-lm out of --parts")
    if "memory" in parts:
        require_module("psutil", "install the extra bench, or leave memory out of --parts")
    path = "" if size else hub.resolve(arguments.model)
    loaded = load(path) if size is None else random_weights(size)
    ids = loaded[1].encode(TEXT)
    several = f"{arguments.streams} streams"

    def prompts(round_: int) -> list[str]:
        """Prompts that no prompt cache knows."""
        return [f"# {round_}, {i}\n{TEXT}" for i in range(arguments.streams)]

    print(describe(), flush=True)
    with serving(loaded, arguments.streams) as client:
        stream_speed(client, ids, 4)
        if "stream" in parts:
            compare(
                "one stream as a share of the library",
                "tok/s",
                "at least 0.97",
                repeats,
                lambda i: stream_speed(client, ids, tokens),
                lambda i: library_speed(loaded, ids, tokens),
            )
        if "batch" in parts:
            compare(
                f"{several} as a share of batch_generate",
                "tok/s",
                "at least 0.9",
                repeats,
                lambda i: streams_speed(client, prompts(i), tokens, min_tokens=tokens),
                lambda i: batch_speed(loaded, prompts(i), tokens),
            )
        if "mlx-lm" in parts:
            with serving_mlx_lm(Path(path)) as peer:
                compare(
                    f"{several} as a multiple of mlx_lm.server",
                    "tok/s",
                    "at least 4",
                    repeats,
                    lambda i: streams_speed(client, prompts(repeats + i), PEER_TOKENS),
                    lambda i: streams_speed(peer, prompts(repeats + i), PEER_TOKENS),
                )
        if "keystroke" in parts:
            seconds = [
                [keystroke_seconds(client, i, typed) for typed in ("def mea", "def mean")] for i in range(repeats)
            ]
            first, second = (statistics.median(side) for side in zip(*seconds))
            ratio = statistics.median(b / a for a, b in seconds)
            print(
                f"a second keystroke as a share of the first: {ratio:.3f} (at most 0.1); {second:.3f} and {first:.3f} s"
            )
        if "scale" in parts:
            scaling(client, prompts, repeats, tokens)
    if "mask" in parts:
        mask_share(loaded, max(tokens, 32))
    if "memory" in parts:
        memory_growth(loaded, arguments.streams, arguments.requests)


if __name__ == "__main__":
    cli.run(main)
