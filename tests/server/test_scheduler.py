"""The scheduler: every job gets what it gets alone, whatever is beside it; slots, queue and limits hold."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from qwen_mlx import QwenMLXError, load, stream_generate
from qwen_mlx.backend import mx
from qwen_mlx.generation.engine import Rows
from qwen_mlx.generation.fill import FillStop
from qwen_mlx.generation.text import settings_of
from qwen_mlx.model.fused import FusedModel
from qwen_mlx.server.prefix_cache import PrefixCache
from qwen_mlx.server.scheduler import Job, QueueFull, Scheduler
from reference.small_models import IM_END, TOKENS, RandomModel, write_gguf

GOES_ON = {"logit_bias": {IM_END: -50.0}}
KINDS = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 11, "top_k": 20},
    {"temperature": 0, "repetition_penalty": 1.2, "logprobs": 2},
    {"temperature": 0.7, "seed": 5, "frequency_penalty": 0.4, **GOES_ON},
    {"temperature": 0, "min_tokens": 12, "logit_bias": {IM_END: 4.0}},
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    return load(write_gguf(tmp_path_factory.mktemp("jobs") / "m.gguf", RandomModel(3, max_position_embeddings=512)))


def run(scheduler: Scheduler, body: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        scheduler.start()
        try:
            return await asyncio.wait_for(body(), 60)
        finally:
            await asyncio.to_thread(scheduler.stop)

    return asyncio.run(main())


def job(small, ids: list[int], arguments: dict, **fields: Any) -> Job:
    return Job(ids, settings_of(*small, {"max_tokens": 20} | arguments), asyncio.Queue(), **fields)


async def result(one: Job) -> list[Any]:
    chunks = []
    while not chunks or chunks[-1].finish_reason is None:
        _, chunk = await one.events.get()
        if isinstance(chunk, Exception):
            raise chunk
        chunks.append(chunk)
    return chunks


def seen(chunks: list[Any]) -> tuple[list[int], str, str | None]:
    return [c.token for c in chunks], "".join(c.text for c in chunks), chunks[-1].finish_reason


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{"slots": 3, "prefill_step_size": 32}, {"slots": 8, "cache_bytes": 0}], ids=str)
def test_jobs_get_what_they_get_alone(small, options):
    """Forty jobs whose prompts share beginnings, some of whose clients go away."""
    rng = np.random.default_rng(7)
    stems = [rng.integers(0, len(TOKENS) - 3, length).tolist() for length in (3, 40, 150)]
    cases = []
    for i in range(40):
        ids = stems[i % 3] + rng.integers(0, len(TOKENS) - 3, int(rng.integers(0, 30))).tolist()
        cases.append((ids, KINDS[i % len(KINDS)] | {"max_tokens": 12 + i % 9}))
    scheduler = Scheduler(*small, queue_size=100, **options)

    async def body() -> list[Any]:
        jobs = [job(small, *case) for case in cases]
        for one in jobs:
            scheduler.submit([one])
            await asyncio.sleep(0.01 if one is jobs[20] else 0)
        for one in jobs[5::9]:
            await one.events.get()
            scheduler.cancel([one])
        return [await result(one) for i, one in enumerate(jobs) if (i - 5) % 9]

    left = [case for i, case in enumerate(cases) if (i - 5) % 9]
    for chunks, (ids, arguments) in zip(run(scheduler, body), left, strict=True):
        expected = list(stream_generate(*small, ids, **{"max_tokens": 20} | arguments))
        assert seen(chunks) == seen(expected)
        assert chunks[0].stats.prompt_tokens + chunks[0].stats.reused_tokens == len(ids)
        for mine, theirs in zip(chunks, expected):
            assert [i for i, _ in mine.top_logprobs] == [i for i, _ in theirs.top_logprobs]
    counts = scheduler.metrics
    assert counts.finished + counts.cancelled == 40
    assert (counts.reused_tokens > 0) == ("cache_bytes" not in options)
    assert scheduler.load == (0, 0)


def test_a_long_prompt_lets_running_rows_go_on_and_short_prompts_pass(small, monkeypatch):
    """Between two chunks of the long prompt each running row gets a token, and a later short prompt is answered."""
    order: list[str] = []
    scheduler = Scheduler(*small, prefill_step_size=256)
    step = Rows.step

    def counted(self, ahead=True):
        order.append(f"step {len(self.state.settings)}")
        return step(self, ahead)

    monkeypatch.setattr(Rows, "step", counted)

    async def body() -> None:
        running = job(small, [1, 2, 3], {"temperature": 0, "max_tokens": 200, **GOES_ON})
        scheduler.submit([running])
        await running.events.get()
        order.clear()
        long, short = job(small, [5] * 450, {"temperature": 0}), job(small, [7, 8], {"temperature": 0})
        scheduler.submit([long])
        scheduler.submit([short])
        await result(short)
        assert order.count("step 1") <= 3
        assert long.events.empty() or order.count("step 2") >= 5
        await result(long)
        assert order.count("step 1") + order.count("step 2") >= 450 // 64
        scheduler.cancel([running])

    run(scheduler, body)


def test_short_prompts_join_together_and_no_turn_reads_more_than_a_chunk(small, monkeypatch):
    """Eight prompts of 20 tokens: where they wait together they are read in one turn, also beside a running row, and
    beside as many running rows in turns of 64 tokens. One pass reads all of a turn, but for prompts of other lengths
    and those that begin as a known one."""
    scheduler = Scheduler(*small, slots=17, prefill_step_size=256)
    sizes: list[int] = []
    passes: list[tuple[int, int]] = []
    step, hidden = Rows.step, FusedModel.hidden

    def counted(self, ahead=True):
        sizes.append(len(self.state.settings))
        return step(self, ahead)

    def passed(self, input_ids, cache, keep=0):
        if input_ids.shape[1] > 1:
            passes.append(input_ids.shape)
        return hidden(self, input_ids, cache, keep)

    monkeypatch.setattr(Rows, "step", counted)
    monkeypatch.setattr(FusedModel, "hidden", passed)
    asked = {"temperature": 0, "max_tokens": 100, **GOES_ON}

    async def body() -> None:
        together = [job(small, [i] * 20, asked) for i in range(8)]
        scheduler.submit(together)
        for one in together:
            await result(one)
        assert sizes[0] == 8
        assert scheduler.load == (0, 0)
        assert passes == [(8, 20)]
        running = job(small, [9, 9], asked | {"max_tokens": 400})
        scheduler.submit([running])
        await running.events.get()
        sizes.clear()
        first = [job(small, [i, i + 1] * 10, asked | {"max_tokens": 400}) for i in range(8)]
        scheduler.submit(first)
        for one in first:
            await one.events.get()
        assert set(sizes) - {1} == {9}  # all eight in one turn
        together = [job(small, [i, i + 2] * 10, asked) for i in range(8)]
        scheduler.submit(together)
        for one in together:
            await result(one)
        joining = sizes[: sizes.index(17)]
        assert joining == sorted(joining)
        assert {12, 15} <= set(joining) <= {1, 9, 12, 15}
        assert passes[1:] == [(1, 2), (8, 20), (3, 20), (3, 20), (2, 20)]
        scheduler.cancel([running, *first])
        passes.clear()
        known = [2] * 20 + [5]  # as the third of the first eight
        uneven = [job(small, ids, asked) for ids in ([1, 6] * 20, [1, 7] * 10, known, [5, 3, 1], [5, 1])]
        scheduler.submit(uneven)
        for one in uneven:
            await result(one)
        assert passes == [(2, 40), (2, 3)]  # and the known one's last token by itself

    run(scheduler, body)


def test_a_client_that_goes_away_costs_no_further_token(small):
    scheduler = Scheduler(*small, slots=2)

    async def body() -> None:
        one = job(small, [1, 2, 3], {"temperature": 0, "max_tokens": 400, **GOES_ON})
        scheduler.submit([one])
        for _ in range(5):
            await one.events.get()
        scheduler.cancel([one])
        while scheduler.load != (0, 0):
            await asyncio.sleep(0.005)
        assert one.stats.generated_tokens < 60
        assert scheduler.metrics.cancelled == 1

    run(scheduler, body)


def test_the_queue_is_bounded(small):
    scheduler = Scheduler(*small, slots=1, queue_size=2)

    async def body() -> None:
        jobs = [job(small, [i, i], {"temperature": 0, "max_tokens": 100, **GOES_ON}) for i in range(5)]
        scheduler.submit([jobs[0]])
        await jobs[0].events.get()
        scheduler.submit(jobs[1:3])
        with pytest.raises(QueueFull):
            scheduler.submit([jobs[3]])
        scheduler.cancel(jobs[:3])
        while scheduler.load != (0, 0):
            await asyncio.sleep(0.005)
        scheduler.submit(jobs[3:])
        assert len(await result(jobs[4])) == 100

    run(scheduler, body)
    assert scheduler.metrics.refused == 1


def test_answers_to_one_prompt_read_it_once(small):
    scheduler = Scheduler(*small, slots=4)
    ids = list(range(60))

    async def body() -> list[Any]:
        first = job(small, ids, {"temperature": 1.0, "seed": 1})
        others = [job(small, ids, {"temperature": 1.0, "seed": seed}, after=first) for seed in (2, 3)]
        scheduler.submit([first, *others])
        return [await result(one) for one in (first, *others)]

    for seed, chunks in enumerate(run(scheduler, body), 1):
        expected = list(stream_generate(*small, ids, temperature=1.0, seed=seed, max_tokens=20))
        assert seen(chunks) == seen(expected)
    assert scheduler.metrics.prompt_tokens == 62


def test_a_prompt_that_is_only_read_is_there_for_the_next(small):
    scheduler = Scheduler(*small)
    ids = list(range(100))

    async def body() -> None:
        warm = job(small, ids, {"temperature": 0}, read_only=True)
        scheduler.submit([warm])
        chunks = await result(warm)
        assert [(c.text, c.token, c.finish_reason) for c in chunks] == [("", -1, "length")]
        one = job(small, [*ids, 7], {"temperature": 0})
        scheduler.submit([one])
        chunks = await result(one)
        assert seen(chunks) == seen(list(stream_generate(*small, [*ids, 7], temperature=0, max_tokens=20)))
        assert one.stats.reused_tokens == 99

    run(scheduler, body)


def test_reading_that_runs_out_of_time_goes_on_with_the_next_request(small):
    scheduler = Scheduler(*small, prefill_step_size=32)
    ids = list(range(200))

    async def body() -> None:
        read = 0
        while read < 180:
            one = job(small, ids, {"temperature": 0}, prompt_seconds=1e-9)
            scheduler.submit([one])
            await result(one)
            assert one.stats.reused_tokens >= read
            read = one.stats.reused_tokens + 32

    run(scheduler, body)


def test_time_limits_end_an_answer_with_length(small):
    scheduler = Scheduler(*small)
    new_line = TOKENS.index("Ċ")

    async def body() -> None:
        always = {"temperature": 0, "max_tokens": 300, "logit_bias": {new_line: 60.0}}
        for limit in ({"deadline": 0.0}, {"predict_seconds": 1e-9}):
            one = job(small, [1, 2], always, **limit)
            scheduler.submit([one])
            chunks = await result(one)
            assert chunks[-1].finish_reason == "length"
            assert len(chunks) <= 3
        # Without a complete line a fill goes on.
        one = job(small, [1, 2], {"temperature": 0, "logit_bias": {5: 60.0}}, predict_seconds=1e-9)
        scheduler.submit([one])
        assert len(await result(one)) == 20

    run(scheduler, body)


def test_a_fill_ends_at_a_line_of_less_indentation(small):
    scheduler = Scheduler(*small)
    new_line = TOKENS.index("Ċ")

    async def body() -> None:
        arguments = {"temperature": 0, "logit_bias": {new_line: 40.0, 70: 40.5}, "no_repeat_ngram_size": 2}
        one = job(small, [70], arguments, fill_stop=FillStop(indent=4))
        scheduler.submit([one])
        chunks = await result(one)
        assert chunks[-1].finish_reason == "stop"
        assert "\n" + TOKENS[70] not in "".join(c.text for c in chunks)

    run(scheduler, body)


@pytest.mark.parametrize("what", ["longest", "add"])
def test_an_error_at_any_point_reaches_its_client(small, monkeypatch, what):
    """A cache that breaks stands for a lack of memory; nobody waits for ever, and the next request is served."""
    scheduler = Scheduler(*small)
    works = getattr(PrefixCache, what)

    def broken(self, *arguments):
        monkeypatch.setattr(PrefixCache, what, works)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PrefixCache, what, broken)

    async def body() -> None:
        first, second = (job(small, list(range(40)), {"temperature": 0}) for _ in range(2))
        second.after = first
        scheduler.submit([first, second])
        with pytest.raises(RuntimeError):
            await result(first)
        assert len(await result(second)) > 0

    run(scheduler, body)


def test_an_error_of_the_model_ends_its_rows_and_not_the_server(small, monkeypatch):
    scheduler = Scheduler(*small)
    step, broken = Rows.step, [True]

    def once(self, ahead=True):
        if broken.pop() if broken else False:
            raise QwenMLXError("The model's logits are not finite.")
        return step(self, ahead)

    monkeypatch.setattr(Rows, "step", once)

    async def body() -> None:
        one, other = (job(small, [1, 2], {"temperature": 0}) for _ in range(2))
        scheduler.submit([one])
        with pytest.raises(QwenMLXError, match="not finite"):
            await result(one)
        scheduler.submit([other])
        assert seen(await result(other)) == seen(list(stream_generate(*small, [1, 2], temperature=0, max_tokens=20)))

    run(scheduler, body)


def test_logits_that_are_not_finite_end_their_row_alone(small, monkeypatch):
    """The fused model's logits of the first row are spoilt, as an overflow of float16 does it."""
    scheduler = Scheduler(*small)
    call = FusedModel.__call__

    def spoilt(self, ids, cache, logits_to_keep=1):
        logits = call(self, ids, cache, logits_to_keep)
        return mx.where(mx.arange(2)[:, None, None] == 0, mx.nan, logits) if ids.shape == (2, 1) else logits

    async def body() -> None:
        jobs = [job(small, [i, 2], {"temperature": 0, "max_tokens": 60, "logprobs": 1, **GOES_ON}) for i in (1, 3)]
        for one in jobs:
            scheduler.submit([one])
            await one.events.get()
        monkeypatch.setattr(FusedModel, "__call__", spoilt)
        with pytest.raises(QwenMLXError, match="not finite"):
            await result(jobs[0])
        assert len(await result(jobs[1])) == 59

    run(scheduler, body)
    assert scheduler.metrics.failed == 1


def test_stopping_answers_everyone(small):
    scheduler = Scheduler(*small, slots=1)

    async def body() -> None:
        jobs = [job(small, [i, 1], {"temperature": 0, "max_tokens": 500, **GOES_ON}) for i in range(3)]
        scheduler.submit(jobs)
        await jobs[0].events.get()
        await asyncio.to_thread(scheduler.stop)
        for one in jobs:
            with pytest.raises(QwenMLXError, match="going down"), contextlib.suppress(asyncio.QueueEmpty):
                await result(one)

    run(scheduler, body)
