"""The model's operations: what each computes and how it rounds stands in its docstring."""

from .attention import attention
from .dispatch import executor, explain, forced, no_grad
from .rms_norm import add_rms_norm, rms_norm
from .rope import Rotary, qkv_rope, rope
from .swiglu import swiglu, swiglu_joined

__all__ = [
    "Rotary",
    "add_rms_norm",
    "attention",
    "executor",
    "explain",
    "forced",
    "no_grad",
    "qkv_rope",
    "rms_norm",
    "rope",
    "swiglu",
    "swiglu_joined",
]
