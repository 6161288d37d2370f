"""`python -m benchmarks.server`: the server beside the library, in one process and in one run.

One stream, eight streams, and the second keystroke of a fill. Rounds of both sides alternate; medians are compared.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn

from benchmarks.arguments import positive
from qwen_mlx import batch_generate, load, stream_generate
from qwen_mlx.backend import describe
from qwen_mlx.cli import command as cli
from qwen_mlx.server.app import make_app
from qwen_mlx.server.scheduler import Scheduler
from qwen_mlx.server.service import Service

TEXT = "def reverse(text):\n    return text[::-1]\n\n\ndef count(text, letter):\n    return text.count(letter)\n\n\n"


@contextlib.contextmanager
def serving(loaded: Any, slots: int) -> Iterator[httpx.Client]:
    """A server in a thread, and a client of it."""
    model, tokenizer = loaded
    service = Service(model, tokenizer, Scheduler(model, tokenizer, slots=slots), "model", 3600)
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


def stream(client: httpx.Client, ids: list[int], tokens: int) -> float:
    """Seconds from the first token to the last of a stream that the end token does not end."""
    body = {"prompt": ids, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0, "stream": True, "logprobs": 0}
    times = []
    with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["logprobs"]["tokens"]:
                times.append(time.perf_counter())
    return times[-1] - times[0]


def one_stream(loaded: Any, client: httpx.Client, ids: list[int], tokens: int) -> tuple[float, float]:
    """Tokens a second of a stream, by the server and by the library."""
    served = stream(client, ids, tokens)
    times = []
    for _ in stream_generate(*loaded, ids, max_tokens=tokens, min_tokens=tokens, temperature=0, logprobs=0):
        times.append(time.perf_counter())
    return (tokens - 1) / served, (tokens - 1) / (times[-1] - times[0])


def many_streams(loaded: Any, client: httpx.Client, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Tokens a second of many prompts, reading included, by the server and by batch_generate."""
    start = time.perf_counter()
    bodies = [{"prompt": ids, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0} for ids in prompts]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        for response in pool.map(lambda body: client.post("/v1/completions", json=body), bodies):
            response.raise_for_status()
    served = time.perf_counter() - start
    start = time.perf_counter()
    batch_generate(*loaded, prompts, max_tokens=tokens, min_tokens=tokens, temperature=0)
    return len(prompts) * tokens / served, len(prompts) * tokens / (time.perf_counter() - start)


def keystrokes(client: httpx.Client, number: int) -> tuple[float, float]:
    """Seconds to the first token of a fill in a new file of about 1,500 tokens, and of the next keystroke's."""
    body = {"input_prefix": f"# {number}\n{TEXT * 36}", "input_suffix": TEXT * 12, "n_predict": 1}
    seconds = []
    for typed in ("def mea", "def mean"):
        start = time.perf_counter()
        client.post("/infill", json=body | {"prompt": typed}).raise_for_status()
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]


def main() -> None:
    """Prints a line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--tokens", type=positive, default=32)
    parser.add_argument("--streams", type=positive, default=8)
    arguments = parser.parse_args()
    loaded = load(arguments.model) if arguments.model else load()
    base = loaded[1].encode(TEXT)
    prompts = [[*base, *loaded[1].encode(f"# {i}\n")] for i in range(arguments.streams)]
    print(describe(), flush=True)
    with serving(loaded, arguments.streams) as client:
        one_stream(loaded, client, prompts[0], 4)
        for name, measure in (
            ("one stream", lambda i: one_stream(loaded, client, prompts[0], arguments.tokens)),
            (f"{arguments.streams} streams", lambda i: many_streams(loaded, client, prompts, arguments.tokens)),
        ):
            served, library = (statistics.median(side) for side in zip(*map(measure, range(arguments.repeats))))
            print(f"{name}: {served:.1f} tok/s, the library {library:.1f}; ratio {served / library:.3f}", flush=True)
        first, second = (statistics.median(side) for side in zip(*(keystrokes(client, i) for i in range(2))))
        print(f"a fill's first token: {first:.2f} s, the next keystroke's {second:.2f} s; ratio {second / first:.3f}")


if __name__ == "__main__":
    cli.run(main)
