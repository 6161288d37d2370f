"""Vocabularies as the `tokenizers` library reads them, and the bytes that a token stands for."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GGUFError, QwenMLXError, shortened
from .files import read_json, read_text
from .special_tokens import added_tokens, named_tokens

# Qwen2's rule (transformers' Qwen2Converter): contractions in any case, digits one by one, newlines with punctuation.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"  # SentencePiece's letter for a space
# Characters of a SentencePiece token, each of whose splits is looked at, and of all: SentencePiece's own limit is 16.
LONGEST_TOKEN = 512
MOST_SPLITS = 1 << 23
# The fields of an added token that tokenizer.json has and added_tokens.json leaves out.
_PLAIN_TOKEN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def byte_level(ids: dict[str, int], merges: list[str]) -> Any:
    """Qwen2's byte-level BPE. Raises GGUFError for merges that do not fit the tokens."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    for merge, (first, second) in zip(merges, pairs):
        # The library panics, which no `except Exception` sees, for a result that is not a token.
        if not second or " " in second or first + second not in ids:
            raise GGUFError(
                f"'tokenizer.ggml.merges' holds {merge!r}, which makes no token of the vocabulary; "
                "convert the model again."
            )
    library = _bpe(ids, pairs)
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    return library


def sentencepiece(ids: dict[str, int], scores: Sequence[float], unknown: str | None, space_first: bool) -> Any:
    """SentencePiece's BPE, as of CodeQwen1.5: of two neighbours those are joined first whose token has the highest
    score; a character without a token becomes its bytes. `space_first`: a text begins with a space of its own.

    Source: transformers' conversion of SentencePiece's models, which makes the same merges of the scores.
    """
    from tokenizers import decoders, normalizers

    long = next((token for token in ids if len(token) > LONGEST_TOKEN), None)
    if long is not None or sum(map(len, ids)) > MOST_SPLITS:
        found = f"one of {len(long):,}" if long is not None else f"{sum(map(len, ids)):,} in all"
        raise GGUFError(
            f"'tokenizer.ggml.tokens' has tokens with too many characters ({found}), expected {LONGEST_TOKEN} each and "
            f"{MOST_SPLITS:,} in all at most; the file is damaged, download it again."
        )
    pairs = []
    for token, i in ids.items():
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        ordered = sorted((ids[a], ids[b], a, b) for a, b in splits if a in ids and b in ids)
        pairs += [(-scores[i], a, b) for _, _, a, b in ordered]
    pairs.sort(key=lambda pair: pair[0])
    library = _bpe(ids, [(a, b) for _, a, b in pairs], byte_fallback=True, fuse_unk=True, unk_token=unknown)
    steps = [normalizers.Prepend(SPACE)] if space_first else []
    library.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    library.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if space_first else [])
    )
    return library


def tokenizer_json(folder: Path) -> dict[str, Any]:
    """A folder's tokenizer.json, or what vocab.json and merges.txt mean in its place, with the added tokens of
    tokenizer_config.json. Raises QwenMLXError naming the file that is missing or wrong."""
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    settings = read_json(config) if config.exists() else {}
    if path.exists():
        data = read_json(path)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        data = _from_vocab_and_merges(folder, settings)
    else:
        raise QwenMLXError(
            f"{folder}: tokenizer.json is missing; save the tokenizer with transformers' fast tokenizer."
        )
    try:
        return data | {"added_tokens": added_tokens(data, settings, named_tokens(folder, settings), _rows(folder))}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise QwenMLXError(
            f"{path}: the vocabulary or the added tokens, with those of tokenizer_config.json, are damaged "
            f"({shortened(repr(error))}); save it again."
        ) from None


def _rows(folder: Path) -> int | None:
    """The embeddings that the folder's config.json names, if it does."""
    config = folder / "config.json"
    rows = read_json(config).get("vocab_size") if config.exists() else None
    return rows if isinstance(rows, int) else None


def _from_vocab_and_merges(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.json of a folder that has vocab.json and merges.txt instead: with Qwen2's rules, and the tokens
    that tokenizer_config.json adds, else added_tokens.json. Raises QwenMLXError naming the file that is wrong."""
    vocab = read_json(folder / "vocab.json")
    lines = read_text(str(folder / "merges.txt")).splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    path = folder / "added_tokens.json"
    added = settings.get("added_tokens_decoder")
    try:
        if added is None:
            names = read_json(path) if path.exists() else {}
            added = {i: {"content": name, "special": True} for name, i in names.items()}
        tokens = [{**_PLAIN_TOKEN, **token, "id": int(i), "special": token["special"]} for i, token in added.items()]
        ordinary = {name: i for name, i in vocab.items() if name not in {token["content"] for token in tokens}}
        data: dict[str, Any] = json.loads(byte_level(ordinary, merges).to_str())
    except Exception as error:  # the library raises bare Exception
        raise QwenMLXError(f"{folder}: vocab.json, merges.txt or the added tokens are damaged ({error!r}).") from None
    return data | {"added_tokens": tokens}


def _bpe(ids: dict[str, int], pairs: list[tuple[str, str]], **options: Any) -> Any:
    from tokenizers import Tokenizer, models

    try:
        return Tokenizer(models.BPE(ids, pairs, **options))
    except Exception as error:  # the library raises bare Exception
        raise GGUFError(
            f"'tokenizer.ggml.merges' does not fit the tokens ({error}); convert the model again."
        ) from None


def byte_level_bytes(name: str) -> bytes:
    """The bytes of a token in GPT-2's alphabet; a token that is not in it stands for itself."""
    table = _byte_of_letter()
    return bytes(table[letter] for letter in name) if table.keys() >= set(name) else name.encode()


def sentencepiece_bytes(name: str) -> bytes:
    """The bytes of one of SentencePiece's tokens: "<0x0A>" is a byte, and a letter of its own stands for the space."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(SPACE, " ").encode()


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """GPT-2's printable letter for each byte: itself where printable, else the next free one from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
