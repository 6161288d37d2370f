"""A tokenizer as a GGUF's metadata: the inverse of Tokenizer.from_gguf."""

from __future__ import annotations

from typing import Any

from ..errors import QwenMLXError
from .special_tokens import END_TOKENS, end_ids
from .tokenizer import CONTROL, NORMAL, SPLIT_NAMES, USER_DEFINED, Tokenizer
from .vocabulary import SPLIT

UNUSED = 5  # tokenizer.ggml.token_type of ids that only pad
BEGINNING = "<|endoftext|>"  # Qwen's files name it where a model has no token for a text's beginning
CONVERT = "convert the original model with llama.cpp's convert_hf_to_gguf.py"


def tokenizer_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The `tokenizer.*` fields for a model whose embedding has so many rows.

    Raises QwenMLXError for a tokenizer that Qwen2's name does not describe: SentencePiece's, one with another rule for
    splitting text, or with other tokens around a text than a GGUF can name.
    """
    data = tokenizer.library_json()
    if tokenizer.is_sentencepiece or not _splits_as_qwen2(data.get("pre_tokenizer")):
        rule = "is SentencePiece's" if tokenizer.is_sentencepiece else "splits text by another rule than Qwen2's"
        raise QwenMLXError(f"the tokenizer {rule}, of which a folder does not tell all; {CONVERT}.")
    special = tokenizer.special
    control = {special[name] for name in tokenizer.control}
    padded = [name or f"[PAD{i}]" for i, name in enumerate(tokenizer.names)]
    padded += [f"[PAD{i}]" for i in range(len(padded), rows)]
    kinds = [NORMAL if name else UNUSED for name in tokenizer.names] + [UNUSED] * (rows - len(tokenizer.names))
    for i in special.values():
        kinds[i] = CONTROL if i in control else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    fields: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.pre": SPLIT_NAMES[0],
        "ggml.tokens": padded,
        "ggml.token_type": kinds,
        "ggml.merges": merges,
        **_roles(tokenizer),
    }
    templates = dict(tokenizer.chat_templates)
    if "default" in templates:
        fields["chat_template"] = templates.pop("default")
    if templates:
        fields["chat_templates"] = [*templates]
        fields |= {f"chat_template.{name}": text for name, text in templates.items()}
    return {f"tokenizer.{name}": value for name, value in fields.items() if value not in ("", [])}


def _roles(tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields that name tokens with a role, and say which of them stand around a text."""
    special, named, ends = tokenizer.special, tokenizer.special_tokens, tokenizer.eos_token_ids
    by_name = [special[name] for name in (named.get("eos_token"), *END_TOKENS) if name in special]
    first = [i for i in by_name if i in ends] or sorted(ends)
    others = [i for i in sorted(ends) if i not in {first[0], *end_ids(special)}]
    bos = special.get(named.get("bos_token") or BEGINNING)
    ids = {"eos": first[0], "padding": special.get(named.get("pad_token", "")), "bos": bos}
    ids |= dict(zip(("eot", "eom"), others))
    if tokenizer.prefix_ids:
        ids["bos"] = tokenizer.prefix_ids[0]
    if len(tokenizer.prefix_ids) > 1 or tokenizer.suffix_ids not in ((), (first[0],)):
        around = [tokenizer.names[i] for i in (*tokenizer.prefix_ids, *tokenizer.suffix_ids)]
        raise QwenMLXError(f"the tokenizer puts {around} around a text, which a GGUF cannot say; {CONVERT}.")
    fields: dict[str, Any] = {f"ggml.{role}_token_id": i for role, i in ids.items() if i is not None}
    fields["ggml.add_bos_token"] = bool(tokenizer.prefix_ids)
    return fields | ({"ggml.add_eos_token": True} if tokenizer.suffix_ids else {})


def _splits_as_qwen2(pre_tokenizer: Any) -> bool:
    """True for a tokenizer.json's pre-tokenizer with Qwen2's rule."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    return [step.get("pattern") for step in steps if step and step.get("type") == "Split"] == [{"Regex": SPLIT}]
