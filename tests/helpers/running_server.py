"""A server of a small random model on a free port of this machine, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from qwen_mlx.server.app import make_app
from qwen_mlx.server.connection import Connection
from qwen_mlx.server.limits import Limits
from qwen_mlx.server.scheduler import Scheduler
from qwen_mlx.server.service import Service


@contextlib.contextmanager
def serving(loaded: Any, limits: Limits | None = None, seconds: float = 60.0, **options: Any) -> Iterator[Any]:
    """Serves a (model, tokenizer) and yields the Service, whose attribute `url` is its address."""
    service = Service(*loaded, Scheduler(*loaded, **options), "small", seconds)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(service, limits), http=Connection, log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            service.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield service
        finally:
            server.should_exit = True
            thread.join()


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    """Waits until the condition holds; fails where it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this never happened"
        time.sleep(0.01)
