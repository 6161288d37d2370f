"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import QwenMLXError
from ..generation.text import GenerationChunk
from . import llama_cpp
from .body import Body
from .chat_completions import ChatRequest
from .completions import CompletionRequest
from .errors import RequestError
from .limits import Guard, Limits, read_body
from .metrics import metrics
from .service import Service, Task
from .usage import Usage

LOGGER = logging.getLogger("qwen_mlx.server")
# The page runs its own script alone, asks this server alone, and is shown in no other page.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Answering(Protocol):
    """A request that was read: its tasks, and the shape of its answer."""

    path: str
    stream: bool
    tasks: list[Task]
    usage: Usage

    def add(self, index: int, chunk: GenerationChunk) -> Any:
        """Notes a token."""

    def response(self) -> Any:
        """The body once all is there."""
        ...

    def opening(self) -> list[dict[str, Any]]:
        """The events of a stream before the first token."""
        ...

    def events(self, index: int, chunk: GenerationChunk) -> list[dict[str, Any]]:
        """The events of a token."""
        ...

    def closing(self) -> list[dict[str, Any]]:
        """The events after the last token."""
        ...


def make_app(service: Service, limits: Limits | None = None, log_prompts: bool = False) -> Starlette:
    """The ASGI application. log_prompts: log lines carry the beginning of each request's body."""
    limits = limits or Limits()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.scheduler.start()
        try:
            yield
        except asyncio.CancelledError:
            pass  # a second Ctrl-C ends all tasks; Starlette would log this one's end with a traceback
        finally:
            await asyncio.to_thread(service.scheduler.stop)

    def answered(make: Callable[[Service, Body], Answering]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            raw = await read_body(request, limits)
            asked = await run_in_threadpool(lambda: make(service, Body.read(raw)))
            log = Log(asked, raw if log_prompts else b"")
            if asked.stream:
                return await _streamed(service, asked, log)
            return await _at_once(service, asked, log, request)

        return endpoint

    def called(function: Callable[[Service, Body], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            raw = await read_body(request, limits)
            return JSONResponse(await run_in_threadpool(lambda: function(service, Body.read(raw))))

        return endpoint

    async def models(request: Request) -> Response:
        entry = {"id": service.name, "object": "model", "created": service.started, "owned_by": "qwen_mlx"}
        wanted = request.path_params.get("name")
        if wanted is not None:
            if wanted != service.name:
                raise RequestError(404, f"There is no model {wanted[:80]!r}.", "model", "model_not_found")
            return JSONResponse(entry)
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def props(request: Request) -> Response:
        return JSONResponse(llama_cpp.props(service))

    async def prometheus(request: Request) -> Response:
        return PlainTextResponse(metrics(service.scheduler), media_type="text/plain; version=0.0.4")

    async def page(request: Request) -> Response:
        return HTMLResponse(_page(), headers=PAGE_HEADERS)

    infill, completion = (functools.partial(llama_cpp.NativeRequest, infill=infill) for infill in (True, False))
    posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/v1/chat/completions": answered(ChatRequest),
        "/v1/completions": answered(CompletionRequest),
        "/infill": answered(infill),
        "/completion": answered(completion),
        "/tokenize": called(llama_cpp.tokenize),
        "/detokenize": called(llama_cpp.detokenize),
    }
    gets: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/v1/models": models,
        "/v1/models/{name:path}": models,
        "/health": health,
        "/v1/health": health,
        "/props": props,
        "/metrics": prometheus,
        "/": page,
    }
    routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
    routes += [Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()]
    handlers: dict[Any, Any] = {
        RequestError: _refused,
        QwenMLXError: _mistaken,
        HTTPException: _http_error,
        ClientDisconnect: _gone,
        Exception: _broken,
    }
    middleware = [Middleware(Guard, limits)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)


class Log:
    """One line for each request, written when it has ended; without its text unless `raw` has it."""

    def __init__(self, asked: Answering, raw: bytes) -> None:
        self._asked, self._raw, self._start = asked, raw, time.monotonic()

    def write(self, outcome: str) -> None:
        """Logs the outcome with the counts of tokens."""
        asked, stats = self._asked, self._asked.usage.stats.values()
        text = f" {self._raw[:2000]!r}" if self._raw else ""
        LOGGER.info(
            "%s %s: %d prompt tokens, %d of them cached, %d generated, %.2f s%s",
            asked.path,
            outcome,
            sum(len(task.ids) for task in asked.tasks),
            sum(one.reused_tokens for one in stats),
            sum(one.generated_tokens for one in stats),
            time.monotonic() - self._start,
            text,
        )


async def _at_once(service: Service, asked: Answering, log: Log, request: Request) -> Response:
    """The whole answer in one body. A client that goes away ends it."""

    async def compute() -> None:
        async with service.answer(asked.tasks) as events:
            async for batch in events:
                for index, chunk in batch:
                    asked.add(index, chunk)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(compute()), asyncio.create_task(gone())]
    outcome = "failed"
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            outcome = "cancelled"
            raise ClientDisconnect
        tasks[0].result()
        outcome = "done"
    except RequestError as error:
        outcome = f"refused ({error.status})"
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        log.write(outcome)
    return JSONResponse(asked.response())


async def _streamed(service: Service, asked: Answering, log: Log) -> Response:
    """The answer as server-sent events. It is refused with a status where that is known before the first event."""
    block = service.answer(asked.tasks)
    try:
        events = await block.__aenter__()
    except RequestError as error:
        log.write(f"refused ({error.status})")
        raise

    async def lines() -> AsyncGenerator[str, None]:
        outcome = "cancelled"
        try:
            for event in asked.opening():
                yield _line(event)
            async for batch in events:
                text = "".join(_line(event) for index, chunk in batch for event in asked.events(index, chunk))
                if text:
                    yield text
            for event in asked.closing():
                yield _line(event)
            if asked.path.startswith("/v1/"):
                yield "data: [DONE]\n\n"
            outcome = "done"
        except RequestError as error:
            outcome = "failed"
            yield _line(error.body)
        finally:
            await block.__aexit__(None, None, None)
            log.write(outcome)

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return ClosedStream(lines(), headers=headers, media_type="text/event-stream")


class ClosedStream(StreamingResponse):
    """A stream whose generator is closed even where the client has gone before its first event."""

    def __init__(self, lines: AsyncGenerator[str, None], **arguments: Any) -> None:
        super().__init__(lines, **arguments)
        self._lines = lines

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()


def _line(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


@functools.cache
def _page() -> str:
    return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


async def _refused(request: Request, error: RequestError) -> Response:
    # What is left of a body that was not read is no request.
    headers = {503: {"retry-after": "1"}, 408: {"connection": "close"}, 413: {"connection": "close"}}.get(error.status)
    return JSONResponse(error.body, error.status, headers)


async def _mistaken(request: Request, error: QwenMLXError) -> Response:
    return JSONResponse(RequestError(400, str(error)).body, 400)


async def _http_error(request: Request, error: HTTPException) -> Response:
    path = request.scope["path"][:80]
    known = {404: f"There is no {path}.", 405: f"{path} has no {request.method}."}
    body = RequestError(error.status_code, known.get(error.status_code, error.detail)).body
    return JSONResponse(body, error.status_code, error.headers)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _broken(request: Request, error: Exception) -> Response:
    return JSONResponse(RequestError(500, "The server made a mistake; its log has more.").body, 500)
