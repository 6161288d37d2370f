"""The operations on a CPU, as functions that numba compiles on first use.

They compute at once, in float32, and know no gradients: dispatch.on_cpu says when they are used. numba is imported with
the first of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ...errors import QwenMLXError

if TYPE_CHECKING:
    from .operations import (
        add_rms_norm,
        attention,
        best_token,
        decode_attention,
        matmul,
        matvec,
        matvec_qkv,
        matvec_swiglu,
        multiply_all,
        multiply_transposed,
        put_recent,
        qkv_rope,
        reshaped,
        rms_norm,
        supports,
        swiglu,
        swiglu_joined,
        unpack,
    )
    from .rehearsal import compile_ahead
    from .replay import Replayed

__all__ = [
    "Replayed",
    "add_rms_norm",
    "attention",
    "best_token",
    "compile_ahead",
    "decode_attention",
    "matmul",
    "matvec",
    "matvec_qkv",
    "matvec_swiglu",
    "multiply_all",
    "multiply_transposed",
    "put_recent",
    "qkv_rope",
    "reshaped",
    "rms_norm",
    "supports",
    "swiglu",
    "swiglu_joined",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {"compile_ahead": "rehearsal", "Replayed": "replay"}.get(name, "operations")
    try:
        operations = importlib.import_module(f"{__name__}.{module}")
    except (ImportError, RuntimeError, ValueError) as error:
        raise QwenMLXError(
            f"numba cannot be loaded ({error}); unset the NUMBA_* variables, install it again, or switch the CPU's own "
            "functions off with QWEN_MLX_KERNELS=off."
        ) from error
    value = globals()[name] = getattr(operations, name)  # the next time Python finds it by itself
    return value
