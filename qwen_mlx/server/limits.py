"""The limits before any route: hosts, origins, keys, and the size and time of bodies."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse

from .errors import RequestError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/v1/health")  # they need no key: a page that asks for one, and a sign of life


@dataclass(frozen=True)
class Limits:
    """max_body: bytes; body_seconds: time for them to come; api_key: None asks for none; hosts: names beside localhost
    and addresses."""

    max_body: int = 10 * 10**6
    body_seconds: float = 60.0
    api_key: str | None = None
    hosts: Sequence[str] = ()


class Guard:
    """Refuses requests with a Host that is a foreign name, which a rebound DNS entry makes browsers send, requests that
    other sites' pages send, and those without the key."""

    def __init__(self, app: App, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(Request(scope))
        except RequestError as error:
            headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
            await JSONResponse(error.body, error.status, headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "")
        if not self._allows(host):
            raise RequestError(403, f"The host {host[:80]!r} is not this server's; start it with --allow-host NAME.")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise RequestError(403, "Pages of other origins are not served.")
        if self._limits.api_key is not None and request.scope["path"] not in OPEN_PATHS:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            given = key.strip() if scheme.lower() == "bearer" else ""
            if not hmac.compare_digest(given.encode(), self._limits.api_key.encode()):
                raise RequestError(401, "The API key is missing or wrong.", None, "invalid_api_key")

    def _allows(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name == "localhost" or name.endswith(".localhost") or name in self._limits.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


async def read_body(request: Request, limits: Limits) -> bytes:
    """The request's bytes. Raises RequestError as soon as there are more than max_body (413), and where they do not
    come in time (408)."""
    try:
        return await asyncio.wait_for(_read(request, limits), limits.body_seconds)
    except asyncio.TimeoutError:
        message = f"The body did not come within {limits.body_seconds:g} seconds."
        raise RequestError(408, message, None, "body_too_slow") from None


async def _read(request: Request, limits: Limits) -> bytes:
    too_large = RequestError(413, f"The body has more than {limits.max_body} bytes.", None, "body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > limits.max_body:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.max_body:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)
