"""A tokenizer as llguidance asks for it."""

from __future__ import annotations

import unicodedata
import weakref
from typing import Any

from ..text.tokenizer import Tokenizer
from .grammars import library

_made: weakref.WeakKeyDictionary[Tokenizer, tuple[frozenset[int], Any]] = weakref.WeakKeyDictionary()


def llguidance_tokenizer(tokenizer: Tokenizer) -> Any:
    """llguidance's form of a tokenizer, made once for each and for its end tokens."""
    eos, made = _made.get(tokenizer, (None, None))
    if eos != tokenizer.eos_token_ids:
        ids = sorted(tokenizer.eos_token_ids)
        made = library().LLTokenizer(_Vocabulary(tokenizer), n_vocab=tokenizer.vocab_size, eos_token=ids)
        _made[tokenizer] = tokenizer.eos_token_ids, made
    return made


class _Vocabulary:
    """The part of a tokenizer that llguidance asks for, by the names of its TokenizerWrapper."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special.values())
        self._encode = weakref.WeakMethod(tokenizer.encode)  # the cache above must not keep the tokenizer
        self._of_byte = {token[0]: i for i, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of exactly these bytes; of text that the tokenizer would normalize, an id for each byte."""
        data, encode = text if isinstance(text, bytes) else text.encode(), self._encode()
        text = data.decode("utf-8", "replace")
        if encode is None or text.encode() != data or not unicodedata.is_normalized("NFC", text):
            return [self._of_byte[byte] for byte in data]
        return encode(text)
