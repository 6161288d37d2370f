"""A thousand requests of all kinds at once, with clients that hang up and bodies that are none: no wrong answer, no
leak, every bound kept."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from qwen_mlx import load
from tests.helpers.fim_model import save_fim_folder
from tests.helpers.running_server import serving, wait_for

pytestmark = pytest.mark.slow
COUNT, AT_ONCE, CACHE = 1000, 24, 3_000_000
BAD = [
    b"",
    b"{",
    b"[" * 1000,
    b'{"messages": 3}',
    b'{"prompt": "x", "n": 0}',
    b"\xff",
    b'{"x": ' + b"9" * 100_000 + b"}",
]


def kinds(choose: random.Random) -> list[tuple[str, dict]]:
    """Forty different requests."""
    cases: list[tuple[str, dict]] = []
    for i in range(40):
        text = "hello " * choose.randint(0, 60) + "he" * (i % 5)
        cases.append(
            [
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": text or "x"}], "max_tokens": 5 + i}),
                ("/v1/completions", {"prompt": text or "x", "max_tokens": 3 + i, "logprobs": 1}),
                ("/infill", {"input_prefix": text, "input_suffix": "he\n" * (i % 7), "n_predict": 2 + i}),
                (
                    "/v1/chat/completions",
                    {"messages": [{"role": "user", "content": text + "?"}], "n": 2, "max_tokens": 9},
                ),
            ][i % 4]
        )
        sampled = {"temperature": 1.0, "seed": i, "top_k": 30} if i % 3 else {"temperature": 0}
        penalties = {"repeat_penalty": 1.2, "frequency_penalty": 0.3} if i % 5 == 0 else {}
        cases[-1][1].update(sampled | penalties)
    return cases


def answer(path: str, text: str) -> Any:
    body = json.loads(text)
    if path == "/infill":
        return body["content"], body["stop_type"]
    choices = body["choices"]
    return [(c.get("text", c.get("message", {}).get("content")), c["finish_reason"]) for c in choices]


def test_a_thousand_requests(tmp_path):
    import psutil

    small = load(save_fim_folder(tmp_path / "m", seed=3, max_position_embeddings=512))
    choose = random.Random(5)
    cases, memory, done = kinds(choose), [], 0
    orders = [(choose.choice(cases), choose.random()) for _ in range(COUNT)]

    async def one(client: httpx.AsyncClient, case: tuple[str, dict], fate: float) -> None:
        nonlocal done
        path, body = case
        if fate < 0.1:
            response = await client.post(path, content=choose.choice(BAD))
            assert response.status_code == 400
        elif fate < 0.2:
            limit = {"n_predict" if path == "/infill" else "max_tokens": 300, "min_tokens": 299}
            with pytest.raises(httpx.TimeoutException):
                await client.post(path, json=body | limit, timeout=0.05)
        elif fate < 0.3:
            async with client.stream("POST", path, json=body | {"stream": True}) as response:
                async for _ in response.aiter_lines():
                    break
        else:
            response = await client.post(path, json=body)
            assert answer(path, response.text) == expected[json.dumps(case)]
        done += 1
        if done in (100, COUNT):
            memory.append(psutil.Process().memory_info().rss)

    async def main(url: str) -> None:
        limits = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:

            async def turn(order: Any) -> None:
                async with limits:
                    await one(client, *order)

            await asyncio.gather(*map(turn, orders))

    with serving(small, slots=6, queue_size=200, cache_bytes=CACHE) as service:
        with httpx.Client(base_url=service.url, timeout=120) as client:
            expected = {json.dumps(case): answer(case[0], client.post(case[0], json=case[1]).text) for case in cases}
        asyncio.run(main(service.url))
        wait_for(lambda: service.scheduler.load == (0, 0))
        assert service.scheduler.metrics.failed == 0
        assert service.scheduler.metrics.cancelled > 50
        assert 0 < service.scheduler.cache.nbytes <= CACHE
    assert memory[1] - memory[0] < 50e6
