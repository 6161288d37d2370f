"""The command `serve`: a model behind HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import math
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import QwenMLXError
from ..loading import hub
from ..parallel.control import launched
from ..text.files import read_text
from .arguments import add_adapter_argument
from .command import Parser, ProgressLine, program, require_at_least

KEY_VARIABLE = "QWEN_MLX_API_KEY"
DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = Parser(
        prog=program("serve"),
        description="Answer editors, chat programs and SDKs over HTTP, as OpenAI and llama.cpp do; a page "
        "is at /. Without --model: Qwen2.5-Coder-0.5B-Instruct, fetched once.",
    )
    p.add_argument(
        "--model", "-m", metavar="MODEL", help=".gguf file, folder of safetensors, or hub id (org/repo[:quant])"
    )
    add_adapter_argument(p)
    p.add_argument("--name", metavar="NAME", help="what clients call the model (default: its file's name)")
    p.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    p.add_argument("--yarn", type=float, metavar="F", help="extend the context F times by YaRN")
    network = p.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (%(default)s)")
    network.add_argument("--port", type=int, default=8080, metavar="N", help="port to listen on (%(default)s)")
    network.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="serve under this name too (can be repeated)"
    )
    network.add_argument(
        "--api-key-file", metavar="FILE", help=f"ask for the key in this file; or set {KEY_VARIABLE} to the key"
    )
    bounds = p.add_argument_group("bounds")
    bounds.add_argument("--slots", type=int, default=8, metavar="N", help="answer N prompts at a time (%(default)s)")
    bounds.add_argument("--queue", type=int, default=64, metavar="N", help="let N more wait (%(default)s)")
    bounds.add_argument(
        "--cache-gb", type=float, default=2.0, metavar="X", help="memory for prompts that come again (%(default)s)"
    )
    bounds.add_argument("--time-limit", type=float, default=600.0, metavar="S", help="seconds for a request (600)")
    bounds.add_argument(
        "--reasoning-budget",
        type=int,
        metavar="N",
        help="end thoughts after N tokens, unless a request says otherwise",
    )
    bounds.add_argument("--max-body-mb", type=float, default=10.0, metavar="X", help="largest request (%(default)s)")
    bounds.add_argument("--prefill-step-size", type=int, metavar="N", help="read prompts N tokens at a time")
    p.add_argument("--log-prompts", action="store_true", help="write the text of requests into the log too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command until a signal ends it, and returns its exit code; mistakes raise QwenMLXError."""
    arguments = parser().parse_args(argv)
    if launched():
        raise QwenMLXError("serve runs in one process; start it without a launcher.")
    require_at_least(1, "--slots", arguments.slots)
    require_at_least(0, "--queue", arguments.queue)
    require_at_least(1, "--prefill-step-size", arguments.prefill_step_size)
    require_at_least(0, "--reasoning-budget", arguments.reasoning_budget)
    for option in ("cache_gb", "time_limit", "max_body_mb"):
        value = getattr(arguments, option)
        if not 0 <= value < float("inf"):
            raise QwenMLXError(f"--{option.replace('_', '-')} is {value}, expected 0 or more.")
    try:
        import uvicorn

        from ..server.app import make_app
        from ..server.connection import Connection
    except ModuleNotFoundError as error:
        raise QwenMLXError(f"The server needs {error.name}: pip install '.[server]' in qwen_mlx's folder.") from None
    from ..server.limits import Limits

    key = _api_key(arguments.api_key_file)
    hosts = tuple(name.lower() for name in arguments.allow_host)
    limits = Limits(max_body=int(arguments.max_body_mb * 10**6), api_key=key, hosts=hosts)
    # Everything that can be refused is refused before the weights are read.
    listener = _listen(arguments.host, arguments.port)
    with listener:
        service = _service(arguments)
        address = _url(listener)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
        # A request's line comes from the server itself, once the answer has ended.
        config = uvicorn.Config(
            make_app(service, limits, arguments.log_prompts),
            http=Connection,
            log_config=None,
            access_log=False,
            server_header=False,
            # No answer takes longer; a client that does not read its own is not waited for.
            timeout_graceful_shutdown=math.ceil(arguments.time_limit) + 1,
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        print(f"{service.name} is served at {address}; Ctrl-C ends it.", file=sys.stderr, flush=True)
        if key is None and not _only_here(listener):
            print(
                f"Warning: everybody who reaches {arguments.host} may use it; set a key by --api-key-file or "
                f"{KEY_VARIABLE}.",
                file=sys.stderr,
                flush=True,
            )
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _service(arguments: argparse.Namespace) -> Any:
    path = hub.resolve(arguments.model)

    from ..loading.load import load
    from ..server.scheduler import Scheduler
    from ..server.service import Service

    with ProgressLine("Loading") as line:
        asked = {"dtype": arguments.dtype, "yarn": arguments.yarn, "adapter": arguments.adapter}
        model, tokenizer = load(path, **asked, progress=line)
    scheduler = Scheduler(
        model,
        tokenizer,
        slots=arguments.slots,
        queue_size=arguments.queue,
        cache_bytes=int(arguments.cache_gb * 10**9),
        prefill_step_size=arguments.prefill_step_size,
    )
    given = arguments.model
    name = given if given is not None and not Path(given).exists() else Path(path).name.removesuffix(".gguf")
    name = arguments.name or name
    return Service(model, tokenizer, scheduler, name, arguments.time_limit, arguments.reasoning_budget)


def _api_key(file: str | None) -> str | None:
    """The key that clients must give. Raises QwenMLXError for one that no header can carry."""
    key = os.environ.get(KEY_VARIABLE) if file is None else read_text(file).strip()
    if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
        where = KEY_VARIABLE if file is None else file
        raise QwenMLXError(f"{where}: the API key is empty or not of printable ASCII; write one word.")
    return key


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises QwenMLXError for an address that cannot be had."""
    if not 0 <= port < 65536:
        raise QwenMLXError(f"--port is {port}, expected 0 (any) to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise QwenMLXError(f"--host {host} is no address ({error}).") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise QwenMLXError(
            f"{host} port {port} cannot be used ({error.strerror}); choose another with --port."
        ) from None
    return listener


def _only_here(listener: socket.socket) -> bool:
    """True if the address belongs to this machine alone."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
