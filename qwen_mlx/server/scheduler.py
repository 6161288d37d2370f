"""One thread that owns the model: it reads prompts chunk by chunk, steps all running rows together, and hands out text.

Requests join between two tokens and leave after any. Prompts that are being read take turns, a chunk each or several
short ones in a chunk, and between two chunks every running row gets a token, so that prompts delay others by one chunk
at most.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..backend import mx
from ..errors import QwenMLXError
from ..generation.engine import NOT_FINITE, GenerationStats, Prompts, Rows, Token, default_prefill_step_size
from ..generation.fill import FillStop
from ..generation.settings import GenerationSettings
from ..generation.structured import Constraint
from ..generation.text import CANNOT_GO_ON, GenerationChunk, TextStream
from ..model.batch_cache import select
from ..model.cache import KVCache
from ..model.qwen2 import Qwen2
from ..text.thoughts import Thoughts
from ..text.tokenizer import Tokenizer
from .prefix_cache import PrefixCache

LOGGER = logging.getLogger("qwen_mlx.server")


class QueueFull(Exception):
    """As many requests wait as may wait."""


class FormTooLarge(QwenMLXError):
    """The form that a request asks for outgrows its bounds while the answer is written."""


@dataclass(eq=False)
class Job:
    """A prompt to be answered in a row of its own.

    events: gets (index, chunk) of each token, the last with a finish_reason, or (index, error). read_only: the prompt
    is read for later requests, and one chunk without a token ends the job. use_cache: starts from known prefixes and
    leaves the text for others. fill_stop: where a fill ends. deadline: seconds of time.monotonic() when the answer ends
    with "length". prompt_seconds: reading stops after so many, as if the job were read_only. predict_seconds: the
    answer ends with the first line that is complete after so many. after: a job with the same prompt, read first.
    """

    ids: list[int]
    settings: GenerationSettings
    events: asyncio.Queue[tuple[int, GenerationChunk | Exception]]
    index: int = 0
    read_only: bool = False
    use_cache: bool = True
    fill_stop: FillStop | None = None
    deadline: float | None = None
    prompt_seconds: float | None = None
    predict_seconds: float | None = None
    after: Job | None = None
    cancelled: bool = False
    stats: GenerationStats = field(default_factory=GenerationStats)
    # Kept by the scheduler.
    prompts: Prompts | None = None
    stream: TextStream | None = None
    thoughts: Thoughts | None = None
    answer: list[int] = field(default_factory=list)
    began: float = 0.0  # when reading began, and later when the first token came
    new_line: bool = False
    started: bool = False  # its prompt is read, or it ended before
    followed: bool = False  # others wait for its prompt
    failed: bool = False


@dataclass
class Metrics:
    """Counts since the start; times in seconds."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0


class Scheduler:
    """Answers jobs in at most `slots` rows at a time; `queue_size` more may wait."""

    def __init__(
        self,
        model: Qwen2,
        tokenizer: Tokenizer,
        *,
        slots: int = 8,
        queue_size: int = 64,
        cache_bytes: int = 2 * 10**9,
        prefill_step_size: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.slots, self.queue_size = model, tokenizer, slots, queue_size
        self.cache, self.metrics = PrefixCache(cache_bytes), Metrics()
        self._chunk = prefill_step_size or default_prefill_step_size()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self._running: list[Job] = []
        self._outbox: list[tuple[Job, GenerationChunk | Exception]] = []
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    # -----------------------------------------------------------------------------------------------------------------
    # Called by the event loop's thread

    def start(self) -> None:
        """Starts the thread. Call it from the event loop whose queues get the events."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """Ends the thread after its current step; jobs that are not answered get an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes the jobs of one request. Raises QueueFull if they would have to wait in too long a queue."""
        with self._changed:
            free = max(0, self.slots - len(self._reading) - len(self._running))
            if len(self._waiting) + len(jobs) > self.queue_size + free:
                self.metrics.refused += 1
                raise QueueFull
            for job in jobs:
                if job.after is not None:
                    job.after.followed = True
            self._waiting += jobs
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ends jobs before their next token; those that have ended stay as they are."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    @property
    def load(self) -> tuple[int, int]:
        """Requests that are read or answered now, and those that wait."""
        return len(self._reading) + len(self._running), len(self._waiting)

    # -----------------------------------------------------------------------------------------------------------------
    # The model's thread

    def _run(self) -> None:
        rows = Rows(self.model)
        while True:
            with self._changed:
                while not (self._stopping or self._waiting or self._reading or self._running):
                    self._changed.wait()
                if self._stopping:
                    break
                admitted = self._admit()
            try:
                for job in admitted:
                    self._begin(job)
                self._drop(rows)
                self._read(rows)
                self._step(rows)
            except Exception as error:  # one for all rows, which share the computation
                if not isinstance(error, QwenMLXError):
                    LOGGER.exception("The model's thread made a mistake; all answers under way end.")
                rows.close()
                self._fail(error)
            self._flush()
        rows.close()
        self._fail(QwenMLXError("The server is going down."))
        self._flush()

    def _admit(self) -> list[Job]:
        """Takes jobs that wait, in order, while there are slots; one that follows another waits for its prompt."""
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            job.started = True
            self._count(job)
        free = max(0, self.slots - len(self._reading) - len(self._running))
        ready = [job for job in self._waiting if job.after is None or job.after.started][:free]
        for job in ready:
            self._waiting.remove(job)
        self._reading += ready
        return ready

    def _begin(self, job: Job) -> None:
        cached = self.cache.longest(job.ids) if job.use_cache else None
        count = cached[0].offset if cached else 0
        job.began = time.monotonic()
        job.stats.prompt_tokens, job.stats.reused_tokens = len(job.ids) - count, count
        job.prompts = Prompts(self.model, [job.ids[count:]], [job.settings], cached, job.ids[:count])
        job.stream = TextStream(self.tokenizer, job.settings)
        if not isinstance(job.settings.constraint, Constraint):  # an answer that has a form has no thought before it
            job.thoughts = self.tokenizer.thoughts(job.ids)
        self.metrics.reused_tokens += count

    def _drop(self, rows: Rows) -> None:
        """Lets go of jobs whose clients have gone."""
        for job in [job for job in self._reading if job.cancelled]:
            self._end_reading(job)
        self._leave(rows, [i for i, job in enumerate(self._running) if job.cancelled])

    def _read(self, rows: Rows) -> None:
        """Reads a chunk of the prompt whose turn it is, and the next ones as long as all of their rest fits into the
        same chunk: a step of few rows costs hardly less than one of all."""
        # Shorter chunks while others wait for their next token, unless one chunk lets more rows go on than it holds up.
        crowd = len(self._reading) > len(self._running) and sum(map(_unread, self._reading)) <= self._chunk
        left = max(64, self._chunk // 4) if self._running and not crowd else self._chunk
        read = 0
        while self._reading and (not read or read + _unread(self._reading[0]) <= left):
            read += self._read_chunk(rows, left - read)

    def _read_chunk(self, rows: Rows, length: int) -> int:
        """Reads a chunk of the first prompt, or at once all of it and of others, and returns how many tokens it had."""
        job = self._reading[0]
        prompts = _prompts(job)
        reader = prompts.reader
        left = reader.total - reader.done
        if _late(job) or (job.read_only and left <= 1):
            self._end_reading(job)
            self._post(job, GenerationChunk("", -1, "length", job.stats))
            return 0
        jobs = self._together(length)
        if len(jobs) > 1:
            prompts = Prompts(self.model, [job.ids for job in jobs], [job.settings for job in jobs])
            count, logits = sum(len(job.ids) for job in jobs), prompts.reader.read(length)
        else:
            count = min(length, left - 1 if job.read_only else left)
            logits = reader.read(count)
        self.metrics.prompt_tokens += count
        if logits is None:
            self._reading.rotate(-1)
            return count
        if job.followed and job.use_cache:
            self.cache.add(job.ids, prompts.state.cache)
        rows.join(prompts, logits)
        now = time.monotonic()
        for job in jobs:
            self._reading.remove(job)
            self._running.append(job)
            job.prompts, job.started = None, True
            job.stats.prompt_seconds, job.began = now - job.began, now
            self.metrics.prompt_seconds += job.stats.prompt_seconds
        return count

    def _together(self, length: int) -> list[Job]:
        """The first job, and the next ones if a pass of `length` tokens reads all of their prompts, at most half of it
        padding: a pass of few tokens costs hardly less than one of many."""
        jobs = list(itertools.takewhile(_is_new, self._reading)) or [self._reading[0]]
        while len(jobs) > 1:
            sizes = [len(job.ids) for job in jobs]
            if max(sizes) * len(jobs) <= min(length, 2 * sum(sizes)):
                break
            jobs.pop()
        return jobs

    def _end_reading(self, job: Job) -> None:
        """Ends a job whose prompt is read in part; what is read is kept for the next request."""
        self._reading.remove(job)
        prompts = job.prompts
        if prompts is not None and prompts.reader.done and job.use_cache:
            self.cache.add(job.ids, prompts.state.cache)
        job.prompts, job.started = None, True
        job.stats.prompt_seconds = time.monotonic() - job.began
        self._count(job)

    def _step(self, rows: Rows) -> None:
        """Gives each running row a token."""
        if not self._running:
            return
        tokens = rows.step(ahead=any(len(job.answer) + 1 < job.settings.max_tokens for job in self._running))
        now = time.monotonic()
        ended = [i for i, (job, token) in enumerate(zip(self._running, tokens)) if self._take(job, token, now)]
        self._leave(rows, ended)

    def _take(self, job: Job, token: Token, now: float) -> bool:
        """Hands a token's text out, and returns True if it is the last."""
        stream, stats = job.stream, job.stats
        if stream is None:
            raise ValueError("The job has not begun.")
        if token.id < 0 or token.error is not None:
            broken = QwenMLXError(NOT_FINITE) if token.id < 0 else FormTooLarge(CANNOT_GO_ON.format(token.error))
            self._post(job, broken)
            job.failed = True
            return True
        stats.generated_tokens += 1
        stats.generation_seconds = now - job.began
        job.answer.append(token.id)
        late = job.deadline is not None and now > job.deadline
        late |= job.new_line and job.predict_seconds is not None and now - job.began > job.predict_seconds
        if late:
            stream.end_now()
        text, reason = stream.add(token.id, token.closing)
        if job.fill_stop is not None:
            text, ended = job.fill_stop.add(text, last=reason is not None)
            reason = "stop" if ended else reason
        job.new_line |= "\n" in text
        thought, answer = ("", text) if job.thoughts is None else job.thoughts.add(text, reason is not None)
        chunk = GenerationChunk(text, token.id, reason, stats, token.logprob, token.top_logprobs, thought, answer)
        self._post(job, chunk)
        self.metrics.generated_tokens += 1
        return reason is not None

    def _leave(self, rows: Rows, numbers: Sequence[int]) -> None:
        """Takes rows out of the batch, and keeps what they computed for the next request."""
        if not numbers:
            return
        for i in numbers:
            job = self._running[i]
            if job.use_cache and self.cache.max_bytes and not job.failed:  # it copies the row
                self.cache.add(job.ids + job.answer, self._row(rows, i))
            self.metrics.generation_seconds += job.stats.generation_seconds
            self._count(job)
        left = [i for i in range(len(self._running)) if i not in set(numbers)]
        rows.keep(left)
        self._running = [self._running[i] for i in left]
        mx.clear_cache()

    def _row(self, rows: Rows, number: int) -> Sequence[KVCache]:
        cache = rows.state.cache
        return cache if len(self._running) == 1 else select(cache, [number])

    def _count(self, job: Job) -> None:
        if job.failed:
            self.metrics.failed += 1
        elif job.cancelled:
            self.metrics.cancelled += 1
        else:
            self.metrics.finished += 1

    def _fail(self, error: Exception) -> None:
        """Answers every job that has begun with an error, and where the server goes down those that wait too."""
        jobs = [*self._reading, *self._running]
        with self._changed:
            if self._stopping:
                jobs += self._waiting
                self._waiting.clear()
        self._reading.clear()
        self._running = []
        for job in jobs:
            job.prompts, job.started = None, True
            self._post(job, error)
        self.metrics.failed += len(jobs)

    def _post(self, job: Job, event: GenerationChunk | Exception) -> None:
        self._outbox.append((job, event))

    def _flush(self) -> None:
        """Hands the events of a turn to the event loop at once: each call wakes it."""
        if self._outbox and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, self._outbox)
        self._outbox = []


def _prompts(job: Job) -> Prompts:
    if job.prompts is None:
        raise ValueError("The job has not begun.")
    return job.prompts


def _unread(job: Job) -> int:
    """Tokens of a job's prompt that are still to be read."""
    reader = _prompts(job).reader
    return reader.total - reader.done


def _is_new(job: Job) -> bool:
    """True for a whole prompt, none of which is known, that nothing but its answer is wanted of."""
    known = job.stats.reused_tokens + _prompts(job).reader.done
    return not (known or job.read_only or job.followed or _late(job))


def _late(job: Job) -> bool:
    """True where a job's time for reading is over."""
    now, done = time.monotonic(), _prompts(job).reader.done
    late = job.deadline is not None and now > job.deadline
    return late or (job.prompt_seconds is not None and done > 0 and now - job.began > job.prompt_seconds)


def _deliver(events: list[tuple[Job, GenerationChunk | Exception]]) -> None:
    for job, event in events:
        job.events.put_nowait((job.index, event))
