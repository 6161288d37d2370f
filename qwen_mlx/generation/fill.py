"""Fill in the middle: the text between a prefix and a suffix, in Qwen2.5-Coder's format, with other files as context.

    <|repo_name|>REPOSITORY
    <|file_sep|>PATH
    TEXT
    <|file_sep|>PATH
    <|fim_prefix|>PREFIX<|fim_suffix|>SUFFIX<|fim_middle|>

The first line and the files are left out where there is no context. Source: examples/Qwen2.5-Coder.md, "Code Insertion"
and "Repository Level Code Infilling", in Qwen's repository Qwen2.5-Coder; arXiv:2409.12186, section 3.2.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from ..errors import QwenMLXError, check_integer, refuses_wrong_arguments
from ..model.qwen2 import Qwen2
from ..text.tokenizer import Tokenizer
from .engine import Progress
from .prompt_cache import PromptCache
from .settings import Draft
from .text import GenerationChunk, check_caches, settings_of, stream

PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
REPOSITORY, FILE = "<|repo_name|>", "<|file_sep|>"
# Qwen's own list of what ends a fill (examples/Qwen2.5-Coder-fim.py), by name.
ENDS = (PREFIX, SUFFIX, MIDDLE, "<|fim_pad|>", REPOSITORY, FILE, "<|im_end|>", "<|endoftext|>")
# Names where none are given: those that llama.cpp's /infill writes.
UNNAMED_REPOSITORY, UNNAMED_FILE = "myproject", "filename"
SMALLEST_FILE = 64  # tokens: less of a file says nothing
CHARACTERS = 32  # a token at most, on average: what lies further from the cursor is not even tokenized

StopAt = Literal["line", "indent"]


def check_fills(tokenizer: Tokenizer, name: str = "The model") -> None:
    """Raises QwenMLXError, naming model and tokens, for a tokenizer without those of fill in the middle."""
    missing = [token for token in (PREFIX, SUFFIX, MIDDLE) if token not in tokenizer.special]
    if missing:
        raise QwenMLXError(
            f"{name} cannot fill in the middle: its vocabulary lacks {', '.join(missing)}; take a Qwen2.5-Coder."
        )


def fill_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a fill, rising: the tokenizer's own end tokens and every token of the format. Raises
    QwenMLXError as check_fills."""
    check_fills(tokenizer)
    return tuple(
        sorted(tokenizer.eos_token_ids | {tokenizer.special[name] for name in ENDS if name in tokenizer.special})
    )


def fill_prompt(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    files: Iterable[tuple[str, str]] = (),
    repository: str | None = None,
    path: str | None = None,
    max_prompt_tokens: int,
) -> list[int]:
    """Token ids of the prompt for the text between prefix and suffix, at most max_prompt_tokens.

    files: (path, text) of other files, or a mapping, the most useful one last; repository, path: names of the
    repository and of the file that is filled. Names of control tokens in any of these texts are text.
    Too long a text is cut around the cursor: files get at most half of the tokens, and of the other half prefix and
    suffix get 3 to 1; where one needs less, the other takes the rest. A prefix loses its beginning, in steps of an
    eighth of its share, so that the next keystrokes keep most of a prompt cache; a suffix loses its end; the first
    files go, and the last of them that does not fit loses its end.
    Raises QwenMLXError for what is not text, for a model that cannot fill, or where not one token of text has room.
    """
    check_fills(tokenizer)
    pairs = _check_texts(prefix, suffix, files, repository, path)
    prefix_id, suffix_id, middle_id = (tokenizer.special[name] for name in (PREFIX, SUFFIX, MIDDLE))
    start = list(tokenizer.prefix_ids)
    heading: list[int] = []
    if pairs or repository is not None or path is not None:
        start += _section(tokenizer, REPOSITORY, f"{UNNAMED_REPOSITORY if repository is None else repository}\n")
        heading = _section(tokenizer, FILE, f"{UNNAMED_FILE if path is None else path}\n")
    room = max_prompt_tokens - len(start) - len(heading) - 3
    if room < 1:
        raise QwenMLXError(
            f"max_prompt_tokens is {max_prompt_tokens}, expected more than {max_prompt_tokens - room}, which the "
            "tokens around the text take."
        )
    before = tokenizer.encode(prefix[max(0, len(prefix) - CHARACTERS * room) :])
    after = tokenizer.encode(suffix[: CHARACTERS * room])
    sections: list[list[int]] = []  # the last file first
    for name, text in reversed(pairs):
        if sum(map(len, sections)) >= room:
            break
        sections.append(_section(tokenizer, FILE, f"{name}\n{text[: CHARACTERS * room]}\n"))
    around, left = share(room, len(before) + len(after), sum(map(len, sections)), at_least=room // 2)
    for number, section in enumerate(sections):
        if len(section) > left:
            sections[number:] = [section[:left]] if left >= SMALLEST_FILE else []
            break
        left -= len(section)
    length, after_length = share(around, len(before), len(after), at_least=3 * around // 4)
    if len(before) > length:
        step = max(1, length // 8)
        before = before[-((length - len(before)) // step) * step :]
    ids = [*start, *(token for section in reversed(sections) for token in section), *heading]
    return [*ids, prefix_id, *before, suffix_id, *after[:after_length], middle_id]


def share(room: int, first: int, second: int, at_least: int) -> tuple[int, int]:
    """Divides `room` between two that want `first` and `second`: what both want if it fits, else `at_least` for the
    first and the rest for the second, and more for one where the other wants less."""
    given = min(first, max(at_least, room - second))
    return given, min(second, room - given)


def _section(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    """A separator and the text after it; without the separator's token in the vocabulary, the text alone."""
    ids = tokenizer.encode(text)
    return [tokenizer.special[name], *ids] if name in tokenizer.special else ids


def _check_texts(
    prefix: str, suffix: str, files: Iterable[tuple[str, str]], repository: str | None, path: str | None
) -> list[tuple[str, str]]:
    """The files as pairs of strings. Raises QwenMLXError for anything that is not a string."""
    for what, text in {"prefix": prefix, "suffix": suffix, "repository": repository, "path": path}.items():
        if not isinstance(text, str) and (text is not None or what in ("prefix", "suffix")):
            raise QwenMLXError(f"{what} is {type(text).__name__}, expected a string.")
    if not isinstance(files, Iterable):
        raise QwenMLXError(f"files is {type(files).__name__}, expected pairs of strings: a path and its text.")
    pairs = list(files.items() if isinstance(files, Mapping) else files)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise QwenMLXError(f"files holds {str(pair)[:80]!r}, expected pairs of strings: a path and its text.")
    return [(name, text) for name, text in pairs]


class FillStop:
    """Ends a fill before the end of its first line that is not blank (`line`), or before a line that is indented less
    than `indent` columns. White space that may lie beyond the end is held back."""

    def __init__(self, line: bool = False, indent: int = 0) -> None:
        self._line, self._indent = line, indent
        self._pending, self._blank = "", True

    @classmethod
    def of(cls, stop_at: StopAt | None, prefix: str) -> FillStop:
        """The stop that a fill's stop_at means. Raises QwenMLXError for another value."""
        if stop_at not in ("line", "indent", None):
            raise QwenMLXError(f"stop_at is {stop_at!r}, expected 'line' or 'indent'.")
        return cls(stop_at == "line", indentation(prefix.rpartition("\n")[2]) if stop_at == "indent" else 0)

    def add(self, text: str, last: bool = False) -> tuple[str, bool]:
        """The text that is safe to show now, and whether the fill ends after it; last: no more text will come."""
        pending = self._pending + text
        cut = self._cut(pending)
        held = None if last else re.compile(r"[\r\n]").search(pending, len(pending.rstrip()))
        end = cut if cut is not None else held.start() if held else len(pending)
        shown, self._pending = pending[:end], pending[end:]
        self._blank = self._blank and not shown.strip()
        return shown, cut is not None

    def _cut(self, text: str) -> int | None:
        """The index where the fill ends, if it does."""
        if self._line:
            first = len(text) - len(text.lstrip()) if self._blank else 0
            newline = re.compile("\r?\n").search(text, first)
            return newline.start() if newline else None
        if not self._indent or not text.strip():  # nothing to decide on, however many blank lines a model writes
            return None
        end, position = None, 0  # `end`: of the last line that is not blank
        for number, line in enumerate(text.split("\n")):
            if number and line.strip() and indentation(line) < self._indent:
                return end
            if line.strip() or end is None:
                end = position + len(line.removesuffix("\r"))
            position += len(line) + 1
        return None


def indentation(line: str) -> int:
    """Columns of white space that a line begins with; a tab ends at a multiple of 8."""
    line = line.expandtabs()
    return len(line) - len(line.lstrip())


@refuses_wrong_arguments
def stream_fill(
    model: Qwen2,
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    files: Iterable[tuple[str, str]] = (),
    repository: str | None = None,
    path: str | None = None,
    max_prompt_tokens: int | None = None,
    stop_at: StopAt | None = None,
    max_tokens: int = 256,
    min_tokens: int = 0,
    stop: str | Sequence[str] = (),
    temperature: float | None = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    typical_p: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    xtc_probability: float | None = None,
    xtc_threshold: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    logprobs: int | None = None,
    seed: int | None = None,
    prompt_cache: PromptCache | None = None,
    draft_model: Draft | Qwen2 | str | None = None,
    num_draft_tokens: int | None = None,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
) -> Generator[GenerationChunk, None, None]:
    """Generates the text between prefix and suffix, and yields it as it becomes complete.

        for chunk in stream_fill(model, tokenizer, "def gcd(a, b):", "return a", stop_at="indent"):
            print(chunk.text, end="")

    files: (path, text) of other files, the most useful one last.
    repository: the name of the repository that the files belong to.
    path: the path of the file that is filled.
    max_prompt_tokens: cuts the context around the cursor as fill_prompt does; None leaves room for max_tokens.
    stop_at: "line" ends with the first line that is not blank, "indent" before a line indented less than the cursor's.
    temperature: 0, greedy, unless it is given.
    prompt_cache: computes only what changed since the last call that used it.

    The other arguments are stream_generate's.

    Raises QwenMLXError for an impossible argument or a model that cannot fill, before any work.
    """
    settings = replace(settings_of(model, tokenizer, locals()), eos_token_ids=fill_ends(tokenizer))
    check_caches(model, settings, None, prompt_cache)
    context = model.config.context_length
    if max_prompt_tokens is None:
        max_prompt_tokens = context - min(settings.max_tokens, context // 2)
    most = check_integer("max_prompt_tokens", max_prompt_tokens, 1, float("inf"), "1 or more")
    ends = FillStop.of(stop_at, prefix if isinstance(prefix, str) else "")
    ids = fill_prompt(tokenizer, prefix, suffix, files=files, repository=repository, path=path, max_prompt_tokens=most)
    chunks = stream(model, tokenizer, ids, settings, prompt_cache=prompt_cache, progress=progress)
    return _until(chunks, ends)


def _until(chunks: Generator[GenerationChunk, None, None], ends: FillStop) -> Generator[GenerationChunk, None, None]:
    with contextlib.closing(chunks):
        for chunk in chunks:
            text, ended = ends.add(chunk.text, last=chunk.finish_reason is not None)
            yield replace(chunk, text=text, finish_reason="stop" if ended else chunk.finish_reason)
            if ended:
                return


@refuses_wrong_arguments
def fill(
    model: Qwen2,
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    files: Iterable[tuple[str, str]] = (),
    repository: str | None = None,
    path: str | None = None,
    max_prompt_tokens: int | None = None,
    stop_at: StopAt | None = None,
    max_tokens: int = 256,
    min_tokens: int = 0,
    stop: str | Sequence[str] = (),
    temperature: float | None = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    typical_p: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    xtc_probability: float | None = None,
    xtc_threshold: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    logprobs: int | None = None,
    seed: int | None = None,
    prompt_cache: PromptCache | None = None,
    draft_model: Draft | Qwen2 | str | None = None,
    num_draft_tokens: int | None = None,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
) -> str:
    """Generates the text between prefix and suffix and returns it; arguments and errors as for stream_fill."""
    return "".join(chunk.text for chunk in stream_fill(**locals()))
