"""The GGUF type of each tensor in a file of one named type: llama.cpp's choice, without an importance matrix.

Source: llama_tensor_get_type of llama.cpp's llama-quant.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..gguf.blocks import BLOCK_TYPES, BlockType
from ..gguf.names import to_gguf
from ..model.config import ModelConfig

TYPES = {kind.name: kind for kind in BLOCK_TYPES.values()}
# For rows that a type's blocks do not divide.
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Mix:
    """A named type: the type of most matrices, general.file_type, and whether some layers' are stored in more bits."""

    matrices: str
    file_type: int
    more_bits: bool = False


MIXES = {
    "f16": Mix("F16", 1),
    "bf16": Mix("BF16", 32),
    "q8_0": Mix("Q8_0", 7),
    "q4_0": Mix("Q4_0", 2),
    "q4_k_m": Mix("Q4_K", 15, more_bits=True),
    "q5_k_m": Mix("Q5_K", 17, more_bits=True),
    "q6_k": Mix("Q6_K", 18),
}


def tensor_type(mix: Mix, name: str, shape: tuple[int, ...], config: ModelConfig) -> BlockType:
    """The type of a parameter by Hugging Face's name. Vectors are F32: norms and biases cost nothing, and llama.cpp
    computes with them so."""
    if len(shape) == 1:
        return TYPES["F32"]
    kind, columns = mix.matrices, shape[1]
    if mix.matrices in ("F16", "BF16"):
        return TYPES[kind]
    _, _, rest = to_gguf(name).partition("blk.")
    layer, _, part = rest.partition(".")
    is_head = name == "lm_head.weight" or (config.tie_word_embeddings and name == "model.embed_tokens.weight")
    if is_head and kind != "Q8_0":
        kind = "Q8_0" if columns % TYPES[kind].block_size else "Q6_K"
    elif mix.more_bits and part in ("attn_v.weight", "ffn_down.weight"):
        layers = config.num_hidden_layers
        if _takes_more_bits(int(layer), layers):
            kind = "Q6_K"
        elif part == "attn_v.weight" and layers == 80 and kind == "Q4_K":  # 72B: eight heads share each value
            kind = "Q5_K"
    if columns % TYPES[kind].block_size:
        kind = FALLBACKS.get(kind, kind)
    return TYPES["F16" if columns % TYPES[kind].block_size else kind]


def _takes_more_bits(layer: int, layers: int) -> bool:
    """True for the first and last eighth of the layers, and for every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
