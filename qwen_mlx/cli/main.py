"""The installed program `qwen-mlx`, which is also `python -m qwen_mlx`, and its subcommands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import QwenMLXError, refuse_unknown
from .command import Parser, run

# Name: what it does, in a line. The command is main(arguments) of the file of that name in this folder.
COMMANDS = {
    "generate": "generate text from a prompt",
    "chat": "talk to a model in the terminal, or through a pipe",
    "serve": "answer editors and other programs over HTTP",
    "convert": "convert a GGUF or safetensors model to an MLX model folder",
    "lora": "train an adapter on examples",
    "fuse": "merge adapters into a model and write a folder",
    "export": "write a model as a GGUF file",
    "embed": "turn texts into vectors with an embedding model",
    "score": "score texts with a classifier, a reranker or a reward model",
    "evaluate": "measure a model's perplexity, and what quantizing cost",
    "selftest": "compare every kernel on this machine's GPU with float64",
}


def main() -> NoReturn:
    """Runs `qwen-mlx` and exits: the entry point of the installed script."""
    run(lambda: dispatch(sys.argv[1:]))


def run_module(name: str, caller: str) -> None:
    """Runs `python -m qwen_mlx.NAME` and exits; `caller` is the door's `__name__`.

    A process that multiprocessing spawned imports the door again, and gets nothing. Raises ImportError for any other
    import: Python would set `qwen_mlx.generate` to the door, in place of the function of that name.
    """
    if caller == "__main__":
        run(lambda: command(name, sys.argv[1:]))
    if caller != "__mp_main__":
        raise ImportError(f"qwen_mlx.{name} is a command: `python -m qwen_mlx.{name}`; import from qwen_mlx itself.")


def command(name: str, arguments: Sequence[str]) -> Any:
    """Runs one command and returns its exit code. Only its own file is imported."""
    return importlib.import_module(f".{name}", __package__).main(arguments)


def dispatch(arguments: Sequence[str]) -> Any:
    """Runs the command that the first argument names. Raises QwenMLXError if it names none."""
    if arguments and arguments[0] in COMMANDS:
        return command(arguments[0], arguments[1:])
    if arguments and arguments[0] == "help":
        return dispatch([*arguments[1:2], "--help"])
    if arguments and not arguments[0].startswith("-"):
        refuse_unknown(arguments[:1], COMMANDS, "command")
    if arguments and arguments[0] not in ("-h", "--help", "--version"):
        import shlex

        wanted = f"qwen-mlx generate {shlex.join(arguments)}"
        raise QwenMLXError(f"a command comes first, such as {wanted}; qwen-mlx --help lists the commands.")
    parser = Parser(prog="qwen-mlx", description="Qwen2.5 on Apple's MLX.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", prog="qwen-mlx")
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    parser.epilog = "qwen-mlx COMMAND --help describes a command's options."
    parser.parse_args(arguments)
    raise QwenMLXError(f"no command is given: {', '.join(COMMANDS)}; qwen-mlx --help describes them.")
