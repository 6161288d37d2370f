"""HTTP connections that have a bounded time to say what they want."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """uvicorn's connection, which is closed where no request has begun `head_seconds` after it was made, or after its
    last answer: one that sends its headers byte by byte would stay open for ever."""

    head_seconds = 20.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio for a new connection."""
        super().connection_made(transport)
        self._watch()

    def on_response_complete(self) -> None:
        """Called by uvicorn after an answer."""
        self._watch()
        super().on_response_complete()

    def _watch(self) -> None:
        self.loop.call_later(self.head_seconds, self._close_unless_new, self.cycle)

    def _close_unless_new(self, cycle: Any) -> None:
        if self.cycle is cycle and not self.transport.is_closing():
            self.transport.close()
