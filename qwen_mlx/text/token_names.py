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


def split_in_turn(first: Callable[[str], list[str]], then: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    """A function that cuts a text by `first`, and what lies between its names by `then`."""

    def split(text: str) -> list[str]:
        pieces: list[str] = []
        for i, piece in enumerate(first(text)):
            pieces += [piece] if i % 2 else then(piece)
        return pieces

    return split


def normalized_splitter(names: Collection[str], normalize: Callable[[str], str]) -> Callable[[str], list[str]]:
    """name_splitter() for names that are found in the normalized text, by their normalized form."""
    forms = {form: name for name in names if (form := normalize(name))}
    find = name_splitter(forms)

    def split(text: str) -> list[str]:
        pieces = find(normalize(text))
        pieces[1::2] = [forms[form] for form in pieces[1::2]]
        return pieces

    return split


def _split(library: Any, names: frozenset[str], text: str) -> list[str]:
    searched = re.sub("[\ud800-\udfff]", OTHER, text)  # marks of a user's characters, which the library cannot read
    pieces, cut = list[str](), 0
    for a, b in library.encode(searched, add_special_tokens=False).offsets:
        if searched[a:b] in names:
            pieces += [text[cut:a], text[a:b]]
            cut = b
    return [*pieces, text[cut:]]
