"""The model behind all routes, and requests on their way through it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..errors import QwenMLXError
from ..generation.fill import FillStop
from ..generation.settings import GenerationSettings
from ..generation.text import GenerationChunk, room_after, with_budget
from ..model.qwen2 import Qwen2
from ..text.tokenizer import Tokenizer
from .body import Body, short
from .errors import RequestError
from .scheduler import FormTooLarge, Job, QueueFull, Scheduler

Event = tuple[int, GenerationChunk]


@dataclass
class Task:
    """A prompt that a request asks to be answered, before it becomes a job. Fields as Job's."""

    ids: list[int]
    settings: GenerationSettings
    read_only: bool = False
    use_cache: bool = True
    fill_stop: FillStop | None = None
    prompt_seconds: float | None = None
    predict_seconds: float | None = None


@dataclass
class Service:
    """A loaded model with its scheduler. name: what clients call it; seconds: a request may take at most;
    reasoning_budget: of requests that give none."""

    model: Qwen2
    tokenizer: Tokenizer
    scheduler: Scheduler
    name: str
    seconds: float = 600.0
    reasoning_budget: int | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, body: Body) -> None:
        """Takes the field `model`, which may be missing or empty. Raises RequestError (404) for another model."""
        name = body.string("model")
        if name and name != self.name:
            raise RequestError(
                404, f"There is no model {short(name)}; this server has {self.name!r}.", "model", "model_not_found"
            )

    @functools.cached_property
    def most_characters(self) -> int:
        """Characters that the context has room for if each token is the longest: more are certainly too many."""
        return self.model.config.context_length * max(map(len, self.tokenizer.names))

    def check_length(self, *texts: str) -> None:
        """Raises RequestError (400) for a text so long that it need not be tokenized to know that it is too long."""
        count = sum(map(len, texts))
        if count > self.most_characters:
            size = self.model.config.context_length
            message = f"The prompt has {count} characters, which is more than the model's context of {size} tokens."
            raise RequestError(400, message, None, "context_length_exceeded")

    def prepare(self, task: Task) -> Task:
        """The task with its limits cut to what the context has room for. Raises RequestError (400) for a prompt that
        leaves no room."""
        try:
            room = room_after(self.model, task.ids)
        except QwenMLXError as error:
            raise RequestError(400, str(error), None, "context_length_exceeded") from None
        limit = min(task.settings.max_tokens, room)
        if task.settings.constraint is not None:
            task.settings.constraint.check_fits(limit)
        settings = replace(task.settings, max_tokens=limit, min_tokens=min(task.settings.min_tokens, limit))
        if settings.constraint is None and settings.reasoning_budget is None:
            settings = replace(settings, reasoning_budget=self.reasoning_budget)
        return replace(task, settings=with_budget(settings, self.tokenizer, task.ids))

    @contextlib.asynccontextmanager
    async def answer(self, tasks: Sequence[Task]) -> AsyncIterator[AsyncIterator[list[Event]]]:
        """Submits the tasks and gives their (index, chunk) as they come, those that are there at once together, each
        index until its finish_reason. Leaving the block ends what still runs. Raises RequestError for more answers than
        can ever wait (400), and where too many wait now (503)."""
        most = self.scheduler.slots + self.scheduler.queue_size
        if len(tasks) > most:
            raise RequestError(400, f"The request asks for {len(tasks)} answers, expected at most {most} at a time.")
        events: asyncio.Queue[tuple[int, GenerationChunk | Exception]] = asyncio.Queue()
        deadline = time.monotonic() + self.seconds
        jobs: list[Job] = []
        for index, task in enumerate(tasks):
            same = next((job for job in jobs if job.ids == task.ids), None)
            jobs.append(Job(events=events, index=index, deadline=deadline, after=same, **vars(task)))
        try:
            self.scheduler.submit(jobs)
        except QueueFull:
            message = f"All {self.scheduler.slots} slots are busy and the queue is full; try again."
            raise RequestError(503, message, None, "queue_full") from None
        try:
            yield _events(events, range(len(jobs)))
        finally:
            self.scheduler.cancel(jobs)


async def _events(
    queue: asyncio.Queue[tuple[int, GenerationChunk | Exception]], numbers: Iterable[int]
) -> AsyncIterator[list[Event]]:
    left = set(numbers)
    while left:
        batch: list[Event] = []
        # A loop that lags behind the model catches up: the more tokens wait, the less is written for each.
        while not (batch and queue.empty()):
            index, event = await queue.get()
            if isinstance(event, Exception):
                if batch:
                    yield batch
                if isinstance(event, FormTooLarge):
                    raise RequestError(400, str(event)) from None
                raise RequestError(500, f"The answer could not be computed: {event}") from None
            if event.finish_reason is not None:
                left.discard(index)
            batch.append((index, event))
        yield batch
