"""Finding the names of control and added tokens in a text, of which some models for speech have 65,536."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection
from typing import Any

MANY = 256  # names; a regular expression tries each of them at each character
OTHER = "\ufdd0"  # a character that no name has


def name_splitter(names: Collection[str]) -> Callable[[str], list[str]]:
    """A function that cuts a text before and after each of these names, the longest that stands at a place: every
    second piece is a name."""
    if len(names) <= MANY:
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        return re.compile(f"({longest_first})" if names else "(?!)").split
    from tokenizers import AddedToken, Tokenizer, models

    # The library finds all names at once; a text between them is one unknown word.
    library = Tokenizer(models.WordLevel({OTHER: 0}, unk_token=OTHER))
    library.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return functools.partial(_split, library, frozenset(names))


def _split(library: Any, names: frozenset[str], text: str) -> list[str]:
    searched = re.sub("[\ud800-\udfff]", OTHER, text)  # marks of a user's characters, which the library cannot read
    pieces, cut = list[str](), 0
    for a, b in library.encode(searched, add_special_tokens=False).offsets:
        if searched[a:b] in names:
            pieces += [text[cut:a], text[a:b]]
            cut = b
    return [*pieces, text[cut:]]
