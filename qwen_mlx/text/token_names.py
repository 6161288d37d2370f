"""Finding the names of control and added tokens in a text, of which some models for speech have 65,536."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection
from typing import Any

MANY = 256  # names; a regular expression tries each of them at each character


def name_splitter(names: Collection[str], guard: str) -> Callable[[str], list[str]]:
    """A function that cuts a text before and after each of these names, the longest that stands at a place, unless
    `guard`, a character that no name has, follows it."""
    if len(names) <= MANY:
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        return re.compile(f"((?:{longest_first})(?!{guard}))" if names else "(?!)").split
    from tokenizers import AddedToken, Tokenizer, models

    # The library finds all names at once; a text between them is one unknown word.
    library = Tokenizer(models.WordLevel({guard: 0}, unk_token=guard))
    library.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return functools.partial(_split, library, frozenset(names), guard)


def _split(library: Any, names: frozenset[str], guard: str, text: str) -> list[str]:
    pieces, cut, start = list[str](), 0, 0
    for part in text.split(guard):
        stop = start + len(part)
        searched = part if stop == len(text) else part[:-1]  # so that no name ends before the guard
        for a, b in library.encode(searched, add_special_tokens=False).offsets:
            if searched[a:b] in names:
                pieces += [text[cut : start + a], text[start + a : start + b]]
                cut = start + b
        start = stop + len(guard)
    return [*pieces, text[cut:]]
