"""Limits for the `tokenizers` library: what a tokenizer.json may ask of it, and how much text it gets at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import QwenMLXError

PIECE = 1 << 16  # characters that the library, which needs 500 bytes for each, gets at once
LONGEST_PIECE = 1 << 20
QWEN2_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # the end of Qwen2's split rule
# Qwen2's rule begins a new word here, and no character composes with what stands before it.
_BORDER = re.compile(
    r"(?<=\n)(?=[!-~])|(?<=[A-Za-z])(?=[ ,.;:!?()\[\]{}\"/_=-][A-Za-z])|(?<=[^\W\d_])(?=[。、，！？][^\W\d_])"
)
# The parts of a tokenizer.json that neither lengthen a text without end nor stop the library's process.
_PARTS = {
    "model": ("BPE",),
    "normalizer": (
        "Sequence",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Lowercase",
        "Strip",
        "StripAccents",
        "Prepend",
        "Replace",
    ),
    "pre_tokenizer": ("Sequence", "Split", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"),
}
LONGEST_REPLACEMENT = 4  # characters; SentencePiece's is one
LONGEST_PATTERN = 16  # characters of a text that is searched for
LONGEST_RULES = 1000  # characters of all regular expressions of a field
MOST_PARTS = 16


def _linear_rules() -> re.Pattern[str]:
    """The regular expressions that take a time in proportion to the text: those of GPT-2, GPT-4, Llama 3, Qwen and the
    like.

    Each of their alternatives is a few characters, then at most one run of a class of characters, then what may be
    left out: where the run begins, the alternative matches, and nothing is read twice. Alternatives of two runs, which
    can fail after a long way, are those of these models only, together with what matches the same characters then.
    """
    escape = r"\\p\{\^?\w+\}|\\[sSdDwWrnt]|\\[^\w\s]"
    item = rf"(?:{escape}|\[\^?(?:{escape}|[^\[\]\\])+\]|[^\\\[\](){{}}*+?|^$])"
    group = r"\(\?i?:['\w|\[\]]+\)"  # such as (?i:'s|'t)
    run = rf"(?:{item}(?:\?\+?)?){{0,3}}{item}(?:[+*]\+?|\?|\{{\d\d?(?:,\d?\d?)?\}})?(?:{item}[*?]|{group}\?)*"
    start = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = "\\|".join(
        re.escape(f"{start}{two}") + rf"(?:{group}\?)?" for two in (f"{upper}*{lower}+", f"{upper}+{lower}*")
    )
    blanks = r"(?:(?:\\s\*\[\\r\\n\]\+?\|)?\\s\+\(\?!\\S\)\|\\s\+|\\s\+\(\?!\\S\))"
    one = f"(?:{run}|'?{group}|{words})"
    return re.compile(rf"{one}(?:\|{one})*(?:\|{blanks})?")


_LINEAR = _linear_rules()


def splits_after_lines(library: Any) -> bool:
    """True if the library's tokenizer splits as Qwen2's, so that `pieces` may be read one by one."""
    rule = library.pre_tokenizer
    return rule is not None and json.dumps(QWEN2_LINES)[1:-1] in rule.__getstate__().decode()


def pieces(text: str) -> Iterator[str]:
    """The text in pieces whose tokens are together those of the text. Raises QwenMLXError for a word that is too long
    for any model."""
    start = 0
    while len(text) - start > PIECE:
        border = _BORDER.search(text, start + PIECE)
        stop = border.start() if border else len(text)
        if stop - start > LONGEST_PIECE:
            raise QwenMLXError(f"The text has a word of more than {LONGEST_PIECE - PIECE:,} characters; is it binary?")
        yield text[start:stop]
        start = stop
    yield text[start:]


def pieces_for(library: Any, text: str) -> Iterator[str]:
    """A text as the library's tokenizer gets it: in pieces, where it is long and can be cut."""
    return pieces(text) if len(text) > PIECE and splits_after_lines(library) else iter([text])


def check_length(text: str, names: Iterator[str], context_length: int) -> None:
    """Raises QwenMLXError for a text with more characters than `context_length` tokens, with these names, can have."""
    if len(text) <= context_length:
        return
    longest = max(map(len, names), default=1)
    if len(text) > context_length * longest:
        raise QwenMLXError(
            f"The prompt has {len(text):,} characters, and the model's context of {context_length:,} tokens, whose "
            f"longest has {longest}, cannot hold them; give a shorter one."
        )


def is_panic(error: BaseException) -> bool:
    """True for a panic of a library written in Rust, which is not an Exception."""
    return type(error).__name__ == "PanicException"


def check_parts(data: Mapping[str, Any]) -> None:
    """Raises ValueError for a tokenizer.json that may take all memory, or that no Qwen2 model has."""
    for field in ("normalizer", "pre_tokenizer", "decoder"):
        _check_patterns(field, [part.get("pattern") for part in _parts(data.get(field))])
    for field, kinds in _PARTS.items():
        growing = 0
        for part in _parts(data.get(field)):
            if part.get("type", "BPE") not in kinds:
                raise ValueError(f"a {field} of type {part.get('type')!r:.40}, expected {', '.join(kinds)}")
            if part.get("continuing_subword_prefix"):  # the library cuts as many bytes off, also within a character
                raise ValueError("a continuing_subword_prefix, which no Qwen2 model has")
            texts = ("content", "prepend", "end_of_word_suffix")
            added = "".join(str(part.get(name) or "") for name in texts)
            growing += part.get("type") in ("Prepend", "Replace")
            if len(added) > LONGEST_REPLACEMENT or growing > 2:
                raise ValueError(f"a {field} that lengthens the text")


def _check_patterns(field: str, patterns: list[Any]) -> None:
    """Raises ValueError for patterns that may take the library much longer than a text is long: of some regular
    expressions it tries all ways to match, for minutes."""
    patterns = [pattern for pattern in patterns if isinstance(pattern, Mapping)]
    rules, texts = ([str(pattern[kind]) for pattern in patterns if kind in pattern] for kind in ("Regex", "String"))
    odd = next((rule for rule in rules if not _LINEAR.fullmatch(rule[: LONGEST_RULES + 1])), None)
    if odd is not None:
        raise ValueError(f"a {field} with the rule {odd!r:.80}, which could take very long; known ones are accepted")
    if sum(map(len, rules)) > LONGEST_RULES or max(map(len, texts), default=0) > LONGEST_PATTERN:
        raise ValueError(f"a {field} with patterns of too many characters")


def _parts(part: Any) -> Iterator[Mapping[str, Any]]:
    """A part of a tokenizer.json, with those that a sequence holds."""
    waiting, count = [part], 0
    while waiting:
        part, count = waiting.pop(), count + 1
        if part is None:
            continue
        if not isinstance(part, Mapping):
            raise ValueError(f"{part!r:.40} in place of an object")
        if count > MOST_PARTS:
            raise ValueError(f"more than {MOST_PARTS} parts in a sequence")
        yield part
        for inner in ("normalizers", "pretokenizers", "decoders"):
            waiting += part.get(inner) or []


def check_ids(ids: Mapping[str, Any]) -> None:
    """Raises ValueError unless the ids are numbers that leave few gaps."""
    most = 2 * len(ids) + 4096
    for name, i in ids.items():
        if type(i) is not int or not 0 <= i < most:
            raise ValueError(f"the id {i!r:.40} of {name!r:.40}, expected 0 to {most - 1}")
