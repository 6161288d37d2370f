"""A folder with a tokenizer whose ordinary tokens are the 256 bytes; its special tokens are those of many models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_mlx.text.vocabulary import SPLIT

CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<s>",
    "</s>",
]
USER_DEFINED = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<tool_call>", "</tool_call>"]


def special_ids() -> dict[str, int]:
    """name -> id of the special tokens."""
    return {name: 256 + i for i, name in enumerate([*CONTROL, *USER_DEFINED])}


def write_byte_folder(folder: Path, **changes: Any) -> Path:
    """Writes tokenizer.json and tokenizer_config.json with `changes`."""
    from tokenizers import pre_tokenizers

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": name, **flags, "special": name in CONTROL} for name, i in special_ids().items()]
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    data = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": changes.pop("post_processor", None),
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    text = json.dumps(settings | changes, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return folder
