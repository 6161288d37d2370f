"""The model's operations: what each computes and how it rounds stands in its docstring."""

from .attend import attend_one
from .attention import attention
from .best_token import best_token, or_not_finite
from .dispatch import compiled, executor, explain, forced, no_grad, recording
from .matmul import matmul
from .matvec import matvec, matvec_qkv, matvec_swiglu, put_in_tail
from .rms_norm import add_rms_norm, rms_norm
from .rope import Rotary, qkv_rope, rope
from .swiglu import swiglu, swiglu_joined
from .unpack import Format, Matrix, raw_matrix, unpack

__all__ = [
    "Format",
    "Matrix",
    "Rotary",
    "add_rms_norm",
    "attend_one",
    "attention",
    "best_token",
    "compiled",
    "executor",
    "explain",
    "forced",
    "matmul",
    "matvec",
    "matvec_qkv",
    "matvec_swiglu",
    "no_grad",
    "or_not_finite",
    "put_in_tail",
    "qkv_rope",
    "raw_matrix",
    "recording",
    "rms_norm",
    "rope",
    "swiglu",
    "swiglu_joined",
    "unpack",
]
