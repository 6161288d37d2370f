"""The model's operations: what each computes and how it rounds stands in its docstring."""

from ..gguf.packing import DENSE, Packing
from .attention import attention
from .best_token import best_token, or_not_finite
from .decode_attention import decode_attention
from .dispatch import compiled, executor, explain, forced, no_grad, recording
from .matmul import matmul
from .matrix import LowRank, Matrix, rows_of
from .matvec import matvec, matvec_qkv, matvec_swiglu, put_recent
from .multiply import TILE, multiply, multiply_all, reshaped, unpacks
from .rms_norm import add_rms_norm, rms_norm
from .rope import Rotary, qkv_rope, rope
from .swiglu import swiglu, swiglu_joined
from .unpack import compile_ahead, computes_on_cpu, packing_kinds, raw_matrix, unpack

__all__ = [
    "DENSE",
    "TILE",
    "LowRank",
    "Matrix",
    "Packing",
    "Rotary",
    "add_rms_norm",
    "attention",
    "best_token",
    "compile_ahead",
    "compiled",
    "computes_on_cpu",
    "decode_attention",
    "executor",
    "explain",
    "forced",
    "matmul",
    "matvec",
    "matvec_qkv",
    "matvec_swiglu",
    "multiply",
    "multiply_all",
    "no_grad",
    "or_not_finite",
    "packing_kinds",
    "put_recent",
    "qkv_rope",
    "raw_matrix",
    "recording",
    "reshaped",
    "rms_norm",
    "rope",
    "rows_of",
    "swiglu",
    "swiglu_joined",
    "unpack",
    "unpacks",
]
