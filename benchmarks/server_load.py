"""Mixed requests for a server, of clients that wait, hang up or send what is no body, and what was wrong about the
answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

AT_ONCE, SECONDS = 24, 600
BAD = [
    b"",
    b"{",
    b"[" * 1000,
    b'{"messages": 3}',
    b'{"prompt": "x", "n": 0}',
    b"\xff",
    b'{"x": ' + b"9" * 100_000 + b"}",
]

Case = tuple[str, dict[str, Any]]  # a path and a body


def mixed_cases(seed: int = 5, most_tokens: int = 40) -> list[Case]:
    """Forty different requests, with answers of up to most_tokens."""
    choose, cases = random.Random(seed), []
    for i in range(40):
        text, limit = "hello " * choose.randint(0, 60) + "he" * (i % 5), 2 + i % (most_tokens - 1)
        chat = {"messages": [{"role": "user", "content": text or "x"}], "max_tokens": limit}
        kinds: list[Case] = [
            ("/v1/chat/completions", chat),
            ("/v1/completions", {"prompt": text or "x", "max_tokens": limit, "logprobs": 1}),
            ("/infill", {"input_prefix": text, "input_suffix": "he\n" * (i % 7), "n_predict": limit}),
            ("/v1/chat/completions", chat | {"n": 2}),
        ]
        path, body = kinds[i % 4]
        body |= {"temperature": 1.0, "seed": i, "top_k": 30} if i % 3 else {"temperature": 0}
        body |= {"repeat_penalty": 1.2, "frequency_penalty": 0.3} if i % 5 == 0 else {}
        cases.append((path, body))
    return cases


def answers_alone(url: str, cases: list[Case]) -> list[Any]:
    """The texts and ends of each case's answer, asked for one after the other."""
    with httpx.Client(base_url=url, timeout=SECONDS) as client:
        return [_answer(path, client.post(path, json=body).raise_for_status().text) for path, body in cases]


async def send_mixed(
    url: str, cases: list[Case], expected: list[Any], count: int, ended: Callable[[int], None], seed: int = 5
) -> list[str]:
    """Sends `count` requests, AT_ONCE at a time: seven of ten are cases, whose answers are compared with `expected`;
    the others hang up early, hang up in a stream, or send what is no body. ended: called with the number of requests
    that have ended. Returns a sentence for each wrong answer."""
    choose, slots, mistakes, done = random.Random(seed), asyncio.Semaphore(AT_ONCE), list[str](), 0
    orders = [(choose.randrange(len(cases)), choose.random(), choose.choice(BAD)) for _ in range(count)]

    async def one(client: httpx.AsyncClient, number: int, fate: float, bad: bytes) -> None:
        path, body = cases[number]
        if fate < 0.1:
            status = (await client.post(path, content=bad)).status_code
            if status != 400:
                mistakes.append(f"{path} answers {bad[:20]!r} with {status}.")
        elif fate < 0.2:
            limit = {"n_predict" if path == "/infill" else "max_tokens": 300, "min_tokens": 299}
            with contextlib.suppress(httpx.TimeoutException):
                await client.post(path, json=body | limit, timeout=0.05)
                mistakes.append(f"{path} answers 300 tokens in no time.")
        elif fate < 0.3:
            async with client.stream("POST", path, json=body | {"stream": True}) as response:
                async for _ in response.aiter_lines():
                    break
        else:
            response = await client.post(path, json=body)
            answer = _answer(path, response.text) if response.is_success else response.text
            if answer != expected[number]:
                mistakes.append(f"{path} answers {body} with {answer}, expected {expected[number]}.")

    async def turn(client: httpx.AsyncClient, number: int, fate: float, bad: bytes) -> None:
        nonlocal done
        async with slots:
            await one(client, number, fate, bad)
            done += 1
            ended(done)

    async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as client:
        await asyncio.gather(*(turn(client, *order) for order in orders))
    return mistakes


def streamed_speed(url: str, prompts: list[str], tokens: int) -> float:
    """Tokens a second of a stream for each prompt, all at once, from the first request to the last token."""
    start = time.perf_counter()
    counts = asyncio.run(_streamed(urlsplit(url), prompts, tokens))
    return sum(counts) / (time.perf_counter() - start)


async def _streamed(url: SplitResult, prompts: list[str], tokens: int) -> list[int]:
    return await asyncio.gather(*(_tokens_of_stream(url, text, tokens) for text in prompts))


async def _tokens_of_stream(url: SplitResult, prompt: str, tokens: int) -> int:
    """The number of tokens that a stream says to have sent. Plain sockets: a client's parser for each event would take
    more time than the server's."""
    asked = {"max_tokens": tokens, "min_tokens": tokens, "temperature": 0, "stream_options": {"include_usage": True}}
    body = json.dumps({"prompt": prompt, "stream": True, **asked}).encode()
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    headers = f"host: {url.netloc}\r\nconnection: close\r\ncontent-length: {len(body)}"
    writer.write(f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    if not answer.startswith(b"HTTP/1.1 200") or not (counts := re.findall(rb'"completion_tokens":(\d+)', answer)):
        raise ValueError(f"The server answers {answer[:300]!r}.")
    return int(counts[-1])


def _answer(path: str, text: str) -> Any:
    body = json.loads(text)
    if path == "/infill":
        return body["content"], body["stop_type"]
    return [(c.get("text", c.get("message", {}).get("content")), c["finish_reason"]) for c in body["choices"]]
