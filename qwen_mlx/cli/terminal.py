"""A chat's two ends: a terminal, with line editing and Markdown, or a pipe, with plain lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..text.files import LARGEST, decoded
from .command import CONTROLS, shown

PAUSE = 0.08  # seconds between two drawings, so that drawing takes little of the time that answering has
BLOCK = '"""'
FIRST = "> "


class Pipe:
    """Each line of standard input is a message; text goes out as it is made, nothing else does."""

    interactive = False

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
        print(shown(text, sys.stdout), end="", flush=True)

    def finish(self) -> None:
        """Ends the line, if there is one."""
        if self._within_line:
            print(flush=True)
        self._within_line = False

    def note(self, text: str) -> None:
        print(shown(text, sys.stderr), file=sys.stderr, flush=True)


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

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from rich.console import Console

        self._session: PromptSession[str] = PromptSession()
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
    """Meanwhile the terminal does not show what is typed: a ^C or an Enter would shift what is drawn again."""
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

    def __init__(self, console: Any):
        from markdown_it import MarkdownIt
        from rich.live import Live

        self._console = console
        self._parser = MarkdownIt().enable("table")
        self._text = ""  # of the block that is not complete
        self._printed = 0  # lines of it that are printed for good
        self._drawn = 0.0
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible", transient=True)
        self._live.start()

    def add(self, text: str) -> None:
        self._text += text
        if time.monotonic() - self._drawn >= PAUSE:
            self._draw()

    def finish(self) -> None:
        """Prints what is left and gives the terminal back."""
        self._live.stop()
        self._print(self._lines(self._text))

    def _draw(self) -> None:
        blocks = [token.map[0] for token in self._parser.parse(self._text) if token.level == 0 and token.map]
        if blocks and blocks[-1] > blocks[0]:
            lines = self._text.splitlines(keepends=True)
            self._print([*self._lines("".join(lines[: blocks[-1]])), []])
            self._text, self._printed = "".join(lines[blocks[-1] :]), 0
        lines = self._lines(self._text)
        room = max(self._console.height - 2, 1)
        if len(lines) - self._printed > room:
            self._print(lines[:-room])
            self._printed = len(lines) - room
        self._live.update(_Lines(lines[self._printed :]), refresh=True)
        self._drawn = time.monotonic()

    def _lines(self, text: str) -> list[Any]:
        from rich.markdown import Markdown

        options = self._console.options.update(width=min(self._console.width, 100))
        lines = self._console.render_lines(Markdown(text, hyperlinks=False), options, pad=False) if text.strip() else []
        blank = [not "".join(segment.text for segment in line).strip() for line in lines]
        first, last = (blank.index(False), len(blank) - blank[::-1].index(False)) if False in blank else (0, 0)
        return lines[first:last]

    def _print(self, lines: list[Any]) -> None:
        """Prints above what is live, less the lines that were printed before."""
        rest = lines[self._printed :]
        if rest:
            self._console.print(_Lines(rest))


class _Lines:
    """Rendered lines, as rich wants them."""

    def __init__(self, lines: list[Any]):
        self._lines = lines

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.segment import Segment

        for line in self._lines:
            yield from line
            yield Segment.line()
