"""The model's operations: what each computes and how it rounds stands in its docstring."""

from .attention import attention
from .rms_norm import rms_norm
from .rope import Rotary, rope
from .swiglu import swiglu

__all__ = ["Rotary", "attention", "rms_norm", "rope", "swiglu"]
