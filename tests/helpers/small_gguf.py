"""A small GGUF model as fields and tensors, each of which a test may spoil."""

from __future__ import annotations

import struct

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

from tests.helpers.gguf_bytes import build, field, tensor, text

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
HIDDEN, LAYERS, VOCABULARY = 32, 2, ["a", "b", "ab", "<|endoftext|>", "<|im_end|>"]


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def strings(values: list[str]) -> bytes:
    return struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))


def small_fields() -> dict[str, tuple[int, bytes]]:
    """name -> (value type, payload) of the metadata of a model of 32 x 2 layers."""
    f32 = struct.Struct("<f").pack
    return {
        "general.architecture": (8, text("qwen2")),
        "general.name": (8, text("Small Instruct")),
        "general.alignment": (4, u32(32)),
        "general.sampling.temp": (6, f32(0.5)),
        "qwen2.block_count": (4, u32(LAYERS)),
        "qwen2.context_length": (4, u32(64)),
        "qwen2.embedding_length": (4, u32(HIDDEN)),
        "qwen2.feed_forward_length": (4, u32(HIDDEN)),
        "qwen2.attention.head_count": (4, u32(2)),
        "qwen2.attention.head_count_kv": (4, u32(1)),
        "qwen2.attention.layer_norm_rms_epsilon": (6, f32(1e-6)),
        "qwen2.rope.freq_base": (6, f32(1e6)),
        "qwen2.rope.scaling.type": (8, text("yarn")),
        "qwen2.rope.scaling.factor": (6, f32(4)),
        "tokenizer.ggml.model": (8, text("gpt2")),
        "tokenizer.ggml.pre": (8, text("qwen2")),
        "tokenizer.ggml.tokens": (9, strings(VOCABULARY)),
        "tokenizer.ggml.token_type": (9, struct.pack("<IQ5i", 5, 5, 1, 1, 1, 3, 3)),
        "tokenizer.ggml.merges": (9, strings(["a b"])),
        "tokenizer.ggml.eos_token_id": (4, u32(4)),
        "tokenizer.ggml.add_bos_token": (7, b"\0"),
        "tokenizer.chat_template": (8, text(TEMPLATE)),
    }


def small_tensors() -> dict[str, tuple[list[int], T]]:
    """name -> (dimensions as the file lists them, type)."""
    tensors = {"token_embd.weight": ([HIDDEN, len(VOCABULARY)], T.Q8_0), "output_norm.weight": ([HIDDEN], T.F32)}
    for n in range(LAYERS):
        for name, columns, rows, kind in (
            ("attn_q", HIDDEN, HIDDEN, T.Q4_0),
            ("attn_k", HIDDEN, HIDDEN // 2, T.Q5_0),
            ("attn_v", HIDDEN, HIDDEN // 2, T.F16),
            ("attn_output", HIDDEN, HIDDEN, T.BF16),
            ("ffn_gate", HIDDEN, HIDDEN, T.MXFP4),
            ("ffn_up", HIDDEN, HIDDEN, T.IQ4_NL),
            ("ffn_down", HIDDEN, HIDDEN, T.Q4_1),
        ):
            tensors[f"blk.{n}.{name}.weight"] = ([columns, rows], kind)
        for name, size in (("attn_q", HIDDEN), ("attn_k", HIDDEN // 2), ("attn_v", HIDDEN // 2)):
            tensors[f"blk.{n}.{name}.bias"] = ([size], T.F32)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{n}.{name}.weight"] = ([HIDDEN], T.F32)
    return tensors


def layout(fields: dict[str, tuple[int, bytes]], tensors: dict[str, tuple[list[int], T]]) -> tuple[bytes, int]:
    """A file's header, and the number of tensor bytes that follow it."""
    entries, offset = [], 0
    for name, (dims, kind) in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[kind]
        entries.append(tensor(name, dims, int(kind), offset))
        offset += -(-int(np.prod(dims)) // block * size // 32) * 32
    return build([field(name, *value) for name, value in fields.items()], entries), offset
