"""Rows of one loop with settings of their own, which join and leave between tokens: each as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_mlx import batch_generate, load, stream_generate
from qwen_mlx.generation.engine import Prompts, Rows, Token
from qwen_mlx.generation.text import settings_of
from qwen_mlx.model.batch_cache import BatchKVCache
from qwen_mlx.model.cache import KVCache
from reference.emulator import emulate
from reference.small_models import IM_END, TOKENS, RandomModel, write_gguf
from tests.helpers.cases import each

DEFAULTS = {"max_tokens": 25, "logit_bias": {IM_END: -50.0}}
REQUESTS = [
    {"temperature": 0},
    {"temperature": 1.2, "seed": 3, "top_k": 12, "top_p": 0.9},
    {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "seed": 2**63, "presence_penalty": 0.7, "frequency_penalty": 0.2, "logprobs": 0},
    {"temperature": 0, "no_repeat_ngram_size": 2, "min_tokens": 20, "logit_bias": {IM_END: 5.0}},
    {"temperature": 1.0, "seed": 5, "xtc_probability": 0.5, "xtc_threshold": 0.01, "min_p": 0.001},
    {"temperature": 1.0, "seed": 5, "typical_p": 0.8, "logprobs": 4},
]
LENGTHS = (3, 60, 17, 1, 90, 5, 33, 8)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    return load(write_gguf(tmp_path_factory.mktemp("rows") / "m.gguf", RandomModel(3, max_position_embeddings=256)))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [rng.integers(0, len(TOKENS) - 3, length).tolist() for length in LENGTHS]


def settings(small, request: dict):
    return settings_of(*small, DEFAULTS | request)


def alone(small, ids: list[int], request: dict) -> list[Token]:
    chunks = stream_generate(*small, ids, **DEFAULTS | request)
    return [Token(chunk.token, chunk.logprob, chunk.top_logprobs) for chunk in chunks]


def together(small, prompts: list[list[int]], chunk: int, every: int) -> list[list[Token]]:
    """A request arrives after each `every` steps; its prompt is read `chunk` tokens at a time between steps."""
    model, _ = small
    rows, answers = Rows(model), [[] for _ in prompts]
    running: list[int] = []
    waiting = list(range(len(prompts)))
    reading: tuple[int, Prompts] | None = None
    steps = 0
    while waiting or running or reading:
        if reading is None and waiting and steps >= every * (len(prompts) - len(waiting)):
            number = waiting.pop(0)
            reading = number, Prompts(model, [prompts[number]], [settings(small, REQUESTS[number])])
        if reading is not None and (logits := reading[1].reader.read(chunk)) is not None:
            rows.join(reading[1], logits)
            running.append(reading[0])
            reading = None
        steps += 1
        if not running:
            continue
        for number, token in zip(running, rows.step(), strict=True):
            answers[number].append(token)
        left = [i for i, n in enumerate(running) if len(answers[n]) < 25 and answers[n][-1].id != IM_END]
        if len(left) < len(running):
            rows.keep(left)
            running = [running[i] for i in left]
    return answers


def same(mine: list[Token], theirs: list[Token]) -> None:
    assert [token.id for token in mine] == [token.id for token in theirs]
    for one, other in zip(mine, theirs):
        assert (one.logprob is None) == (other.logprob is None)
        assert [i for i, _ in one.top_logprobs] == [i for i, _ in other.top_logprobs]
        if one.logprob is not None:
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            for (_, a), (_, b) in zip(one.top_logprobs, other.top_logprobs):
                assert a == pytest.approx(b, abs=1e-4)


@each(("chunk", "every"), [(7, 2), (512, 0), (16, 9), (16, 40)])
def test_each_row_gets_what_it_gets_alone(small, prompts, chunk: int, every: int):
    for number, tokens in enumerate(together(small, prompts, chunk, every)):
        same(tokens, alone(small, prompts[number], REQUESTS[number]))


def test_on_emulated_kernels_too(small, prompts):
    """One row steps by its own kernels, several by those of rows, and back."""
    expected = [alone(small, ids, request) for ids, request in zip(prompts, REQUESTS)]
    with emulate(checked=False):
        found = together(small, prompts, 40, 4)
    for mine, theirs in zip(found, expected):
        same(mine, theirs)


def test_every_request_differs_from_plain_greedy(small, prompts):
    """So that the tests above would see settings that got lost."""
    for ids, request in list(zip(prompts, REQUESTS))[1:]:
        tokens = [[token.id for token in alone(small, ids, one)] for one in (request, REQUESTS[0])]
        assert tokens[0] != tokens[1], request


def test_a_row_that_is_left_alone_has_a_plain_cache(small, prompts):
    """On a GPU the step of one row, which takes fewer launches, needs one."""
    model, _ = small
    rows = Rows(model)
    rows.add(prompts[:1], [settings(small, {})])
    assert {type(layer) for layer in rows.state.cache} == {KVCache}
    rows.add(prompts[1:3], [settings(small, {})] * 2)
    assert {type(layer) for layer in rows.state.cache} == {BatchKVCache}
    rows.keep([1])
    assert {type(layer) for layer in rows.state.cache} == {KVCache}
    assert rows.state.cache[0].size == len(prompts[1])


def test_a_batch_draws_what_its_prompts_draw_alone(small, prompts):
    """Prompt i with seed + i, however many rows there are at a time."""
    arguments = {"max_tokens": 12, "temperature": 1.0, "top_k": 30}
    for batch_size in (1, 3, 8):
        results = batch_generate(*small, prompts, seed=2**64 - 3, batch_size=batch_size, **arguments)
        for i, (ids, result) in enumerate(zip(prompts, results)):
            seed = (2**64 - 3 + i) % 2**64
            assert result.token_ids == [c.token for c in stream_generate(*small, ids, seed=seed, **arguments)]
