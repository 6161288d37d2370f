"""GGUF's tensor names for the qwen2 architecture and Hugging Face's, in both directions.

Source: gguf-py's tensor_mapping for MODEL_ARCH.QWEN2. qwen2 permutes no rows of q and k: a name is all that changes.
"""

from __future__ import annotations

ROPE_FACTORS = "rope_freqs.weight"  # optional divisors of the rotary frequencies, (head_dim / 2,): not a parameter

# The head of classifiers and rerankers, which stands in place of a language head.
SCORE_HEAD = {"cls.output.weight": "score.weight", "cls.output.bias": "score.bias"}

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",  # of `convert_hf_to_gguf.py --fuse-qkv`: q, k and v, one above the other
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_BACK = {hf: gguf for gguf, hf in _MODEL.items()}
_LAYER_BACK = {hf: gguf for gguf, hf in _LAYER.items()}


def to_hf(name: str) -> str | None:
    """ "blk.0.attn_q.weight" -> "model.layers.0.self_attn.q_proj.weight"; None for a name that Qwen2 does not have."""
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if module in _MODEL:
        return f"{_MODEL[module]}.{kind}"
    prefix, _, rest = module.partition(".")
    index, _, part = rest.partition(".")
    if prefix != "blk" or not (index.isascii() and index.isdigit()) or str(int(index)) != index or part not in _LAYER:
        return None
    return f"model.layers.{index}.{_LAYER[part]}.{kind}"


def to_gguf(name: str) -> str:
    """The inverse of to_hf. Raises KeyError for a name that is no Qwen2 parameter."""
    module, _, kind = name.rpartition(".")
    if module in _MODEL_BACK:
        return f"{_MODEL_BACK[module]}.{kind}"
    _, _, index, part = module.split(".", 3)
    return f"blk.{index}.{_LAYER_BACK[part]}.{kind}"
