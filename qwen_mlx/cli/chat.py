"""The command `chat`: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import QwenMLXError
from ..loading.hub import DEFAULT
from ..parallel.control import alone, on_first
from .arguments import add_model_arguments, open_model, ranks
from .command import Parser, ProgressLine, cut_at, program, require_at_least
from .terminal import Pipe, Terminal

if TYPE_CHECKING:
    from ..backend import mx
    from ..generation.chat import Chat, Turn
    from ..generation.tools import Tool

HELP = '''/retry             answer my last message again
/undo              take my last message and its answer back
/edit [N] [TEXT]   change my message N (default: the last) and go on from there
/history           show the conversation
/system [TEXT]     show, or set, the system message
/clear             forget all but the system message
/save FILE         write the conversation as JSON
/load FILE         go on with a saved conversation
/help              show this
/exit              end, as Ctrl-D does

Ctrl-C stops an answer; what was written of it stays in the conversation.
A paste of several lines is one message; so is everything between two lines of """.
A message that begins with / is written with two of them.'''


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    description = "Talk to Qwen2.5. In a pipe each line of standard input is a message. /help lists the commands."
    p = Parser(prog=program("chat"), description=description, usage="%(prog)s [options]")
    add_model_arguments(p, max_tokens=2048)
    p.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    p.add_argument(
        "--tools",
        metavar="FILE",
        help="tools the model may call: the functions of a .py file, WHICH IS RUN, or a .json list of schemas, whose "
        "results you type",
    )
    p.add_argument(
        "--max-tool-rounds", type=int, default=5, metavar="N", help="rounds of tool calls in a turn (default 5)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes raise QwenMLXError."""
    with ranks() as group:
        return _main(parser().parse_args(argv), group)


def _main(arguments: argparse.Namespace, group: mx.distributed.Group | None) -> int:
    require_at_least(1, "--max-tool-rounds", arguments.max_tool_rounds)
    from ..generation.tools import load_tools

    tools = load_tools(arguments.tools) if arguments.tools else []
    if arguments.load:
        from ..generation.chat import read_messages

        on_first(lambda: read_messages(arguments.load))
    model, tokenizer, settings = open_model(arguments, group)
    name = arguments.model or DEFAULT.title

    from ..generation.chat import Chat

    interactive = on_first(lambda: sys.stdin.isatty() and sys.stdout.isatty())
    drawn = interactive and (group is None or group.rank() == 0)
    window: Pipe | Terminal = Terminal([*COMMANDS, "/exit"]) if drawn else Pipe()
    window.interactive = interactive
    window.hides_reasoning = arguments.hide_reasoning
    chat = Chat(
        model,
        tokenizer,
        tools=[tool if tool.function else replace(tool, function=_asks_user(tool, window)) for tool in tools],
        max_tool_rounds=arguments.max_tool_rounds,
        **settings,
    )
    if arguments.load:
        _load_messages(chat, arguments.load)
    if interactive:
        window.note(f"{name}. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.")
    if tools and arguments.model is None:
        window.note(f"warning: {name} does not follow the format of tool calls; take a larger Instruct model.")
    try:
        with contextlib.suppress(EOFError):
            while turn(chat, window):
                pass
    finally:
        if arguments.prompt_cache and chat.prompt_cache.ids:
            chat.prompt_cache.save(arguments.prompt_cache)
    return 0


def turn(chat: Chat, window: Pipe | Terminal) -> bool:
    """One message or command. False if it was /exit; raises EOFError at the end of the input.

    On a terminal a mistake is told and Ctrl-C ends the answer; in a pipe both end the program.
    """
    try:
        with _interruptible(window):
            text = on_first(window.read)
            if not text.strip():
                return True
            if window.interactive and text.strip() in ("exit", "quit"):
                return False
            if not text.startswith("/") or text.startswith("//") or "\n" in text:
                answer(chat, window, chat.send(text[1:] if text.startswith("//") else text))
                return True
            name, _, rest = text.partition(" ")
            if name in ("/exit", "/quit"):
                return False
            if name not in COMMANDS:
                raise QwenMLXError(f"There is no command {name}; /help lists them, and // begins a message with /.")
            COMMANDS[name](chat, window, rest.strip())
    except QwenMLXError as error:
        if not window.interactive:
            raise
        window.note(f"error: {error}")
    return True


@contextlib.contextmanager
def _interruptible(window: Pipe | Terminal) -> Iterator[None]:
    """Lets Ctrl-C end this block only, where a terminal is left to go on with."""
    try:
        yield
    except KeyboardInterrupt:
        if not window.interactive or not alone():
            raise


def answer(chat: Chat, window: Pipe | Terminal, stream: Turn) -> None:
    """Shows an answer while it is made, then what it cost."""
    from ..generation.text import GenerationChunk, overlap
    from ..generation.tools import OPEN

    hidden = (OPEN,) if chat.tools else ()  # a tool call is shown when it has run
    written, n_shown, ended = "", 0, None
    progress = chat.progress = ProgressLine("Reading the prompt")
    try:
        with _interruptible(window), contextlib.closing(stream), progress:
            for event in stream:
                progress.clear()
                if isinstance(event, GenerationChunk):
                    ended = event.finish_reason
                    written += event.answer if window.hides_reasoning else event.text
                    call = written.find(OPEN) if hidden else -1
                    end = len(written) - (0 if event.finish_reason else overlap(written, hidden))
                    end = end if call < 0 else call
                    window.show(written[n_shown:end])
                    n_shown = end
                    if event.finish_reason:
                        window.finish()  # a tool may write to the terminal, or ask there
                else:
                    written, n_shown = "", 0
                    window.note(f"{event.call}: {event.text}")
    finally:
        progress.clear()
        window.finish()
    window.note(summary(chat, ended))


def summary(chat: Chat, ended: str | None) -> str:
    """A line about the tokens and the speed of the last turn; ended: its finish_reason, None where it was stopped."""
    turn = chat.turn
    if not turn:
        return "nothing was answered; the message is not part of the conversation"
    reading, writing = sum(one.prompt_seconds for one in turn), sum(one.generation_seconds for one in turn)
    share = sum(one.communication_seconds for one in turn) / (reading + writing)
    shared = "" if alone() else f", {share:.0%} of the time in communication"
    repeated = turn[-1].repeated_tokens
    if repeated:
        end = f"; the text repeats itself every {repeated} tokens, /undo takes it back"
    elif ended == "length":
        end = f"; {cut_at(turn[-1].generated_tokens, chat.settings.max_tokens)}"
    else:
        end = "" if ended else "; stopped"
    return (
        f"{turn[0].reused_tokens} tokens reused, {sum(one.prompt_tokens for one in turn)} read, "
        f"{sum(one.generated_tokens for one in turn)} written, "
        f"{sum(one.generated_tokens - 1 for one in turn) / writing if writing else 0:.1f} tok/s{shared}{end}"
    )


def _asks_user(tool: Tool, window: Pipe | Terminal) -> Callable[..., str]:
    """A function that lets the user give the tool's result."""

    def ask(**arguments: object) -> str:
        window.finish()
        window.note(f"The model calls {tool.name} with {arguments}; what is the result?")
        return window.read()

    return ask


def _edit(chat: Chat, window: Pipe | Terminal, rest: str) -> None:
    number, _, text = rest.partition(" ")
    if not number.isdecimal():
        number, text = str(max(len(chat.questions), 1)), rest
    before = list(chat.messages)
    old = chat.edit(int(number))
    try:
        text = text or on_first(lambda: window.read(default=old))
        answer(chat, window, chat.send(text))
    finally:
        if not chat.turn or not text:
            chat.messages = before


def _history(chat: Chat, window: Pipe | Terminal, rest: str) -> None:
    number = 0
    for message in chat.messages:
        number += message["role"] == "user"
        label = f"{number}" if message["role"] == "user" else message["role"]
        window.note(f"{label}: {message['content']}")


def _system(chat: Chat, window: Pipe | Terminal, rest: str) -> None:
    if rest:
        chat.system = rest
    window.note(chat.system or "The chat template's own system message, if it has one.")


def _undo(chat: Chat, window: Pipe | Terminal, rest: str) -> None:
    window.note(f"taken back: {chat.undo()}")


def _clear(chat: Chat, window: Pipe | Terminal, rest: str) -> None:
    chat.clear()
    window.note("the conversation is empty")


def _save(chat: Chat, window: Pipe | Terminal, rest: str) -> None:
    _require_file_name(rest, "/save")
    on_first(lambda: chat.save(rest))
    window.note(f"{len(chat.messages)} messages in {rest}")


def _load(chat: Chat, window: Pipe | Terminal, rest: str) -> None:
    _require_file_name(rest, "/load")
    _load_messages(chat, rest)
    window.note(f"{len(chat.messages)} messages; /history shows them")


def _require_file_name(rest: str, command: str) -> None:
    if not rest:
        raise QwenMLXError(f"There is no file name; write {command} FILE.")


def _load_messages(chat: Chat, path: str) -> None:
    def load() -> list[dict[str, Any]]:
        chat.load(path)
        return chat.messages

    chat.messages = on_first(load)


COMMANDS: dict[str, Callable[[Chat, Pipe | Terminal, str], None]] = {
    "/retry": lambda chat, window, rest: answer(chat, window, chat.retry()),
    "/undo": _undo,
    "/edit": _edit,
    "/history": _history,
    "/system": _system,
    "/clear": _clear,
    "/save": _save,
    "/load": _load,
    "/help": lambda chat, window, rest: window.note(HELP),
}
