"""A chat's two ends: a terminal, with line editing and Markdown, or a pipe, with plain lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..text.files import LARGEST, decoded
from .command import CONTROLS, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment

PAUSE = 0.08  # seconds between two drawings
FAST = 0.008  # seconds of a drawing; the pause after a slower one grows with it, so that drawing never takes over
BLOCK = '"""'
FIRST = "> "


class Pipe:
    """Each line of standard input is a message; text goes out as it is made, nothing else does."""

    interactive = False
    hides_reasoning = False

    def __init__(self) -> None:
        self._within_line = False

    def read(self, default: str = "") -> str:
        """The next message. Raises EOFError at the end of the input."""
        return read_block(self._line)

    @staticmethod
    def _line(prompt: str) -> str:
        data = sys.stdin.buffer.readline(LARGEST)
        if not data:
            raise EOFError
        return decoded(data, "standard input").rstrip("\r\n")

    def show(self, text: str) -> None:
        self._within_line |= bool(text)
        print(printable(text, sys.stdout), end="", flush=True)

    def finish(self) -> None:
        """Ends the line, if there is one."""
        if self._within_line:
            print(flush=True)
        self._within_line = False

    def note(self, text: str) -> None:
        print(printable(text, sys.stderr), file=sys.stderr, flush=True)


def read_block(line: Callable[[str], str]) -> str:
    """One message from a function that reads lines: a line, or everything between two lines that are three quotes.

    Raises EOFError at the end of the input.
    """
    text = line(FIRST)
    if not text.startswith(BLOCK):
        return text
    lines = [text[len(BLOCK) :]]
    while not lines[-1].rstrip().endswith(BLOCK):
        try:
            lines.append(line("... "))
        except EOFError:
            break
    lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
    return "\n".join(lines).strip("\n")


class Terminal:
    """prompt_toolkit reads (a paste of several lines is one message), rich shows Markdown while it comes."""

    interactive = True
    hides_reasoning = False

    def __init__(self, commands: Sequence[str] = ()) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from rich.console import Console

        completer = WordCompleter(commands, sentence=True)
        self._session: PromptSession[str] = PromptSession(completer=completer, complete_while_typing=False)
        self._console = Console()
        self._answer: StreamedMarkdown | None = None
        self._quiet = contextlib.ExitStack()

    def read(self, default: str = "") -> str:
        """The next message, `default` being there already for editing. Raises EOFError at Ctrl-D, KeyboardInterrupt at
        Ctrl-C."""
        return read_block(lambda prompt: self._session.prompt(prompt, default=default if prompt == FIRST else ""))

    def show(self, text: str) -> None:
        if self._answer is None:
            self._quiet.enter_context(no_echo())
            self._answer = StreamedMarkdown(self._console)
        self._answer.add(text.translate(CONTROLS))

    def finish(self) -> None:
        answer, self._answer = self._answer, None
        with self._quiet:
            if answer is not None:
                answer.finish()

    def note(self, text: str) -> None:
        self._console.print(text.translate(CONTROLS), style="dim", markup=False, highlight=False)


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """Keeps the terminal from showing what is typed: a ^C or an Enter would shift what is drawn again."""
    import termios

    try:
        before = termios.tcgetattr(sys.stdin)
    except (termios.error, ValueError):  # no terminal
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class StreamedMarkdown:
    """Markdown that grows: blocks that are complete are printed once, the last one is drawn again as text comes.

    A block taller than the terminal scrolls: the lines above its last screen are printed for good.
    """

    def __init__(self, console: Console):
        from markdown_it import MarkdownIt
        from rich.live import Live

        self._console = console
        self._parser = MarkdownIt().enable("table")
        self._text = ""  # of the block that is not complete
        self._n_printed = 0  # lines of it that are printed for good
        self._next_drawing = 0.0
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible", transient=True)
        self._live.start()

    def add(self, text: str) -> None:
        self._text += text
        start = time.monotonic()
        if start >= self._next_drawing:
            self._draw()
            end = time.monotonic()
            self._next_drawing = end + PAUSE * max(1.0, (end - start) / FAST)

    def finish(self) -> None:
        """Prints what is left and gives the terminal back."""
        self._live.stop()
        self._print(self._lines(self._text))

    def _draw(self) -> None:
        from rich.segment import SegmentLines

        blocks = [token.map[0] for token in self._parser.parse(self._text) if token.level == 0 and token.map]
        if blocks and blocks[-1] > blocks[0]:
            lines = self._text.splitlines(keepends=True)
            self._print([*self._lines("".join(lines[: blocks[-1]])), []])
            self._text, self._n_printed = "".join(lines[blocks[-1] :]), 0
        rendered = self._lines(self._text)
        room = max(self._console.height - 2, 1)
        if len(rendered) - self._n_printed > room:
            self._print(rendered[:-room])
            self._n_printed = len(rendered) - room
        self._live.update(SegmentLines(rendered[self._n_printed :], new_lines=True), refresh=True)

    def _lines(self, text: str) -> list[list[Segment]]:
        """The lines of rendered Markdown, without blank ones at its ends."""
        from rich.markdown import Markdown

        options = self._console.options.update(width=min(self._console.width, 100))
        lines = self._console.render_lines(Markdown(text, hyperlinks=False), options, pad=False)
        for end in (0, -1):
            while lines and not "".join(segment.text for segment in lines[end]).strip():
                lines.pop(end)
        return lines

    def _print(self, lines: list[list[Segment]]) -> None:
        """Prints the lines that were not printed before, above what is live."""
        from rich.segment import SegmentLines

        if lines[self._n_printed :]:
            self._console.print(SegmentLines(lines[self._n_printed :], new_lines=True))
