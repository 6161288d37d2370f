"""How the converter stores a tensor in an MLX model folder, and what that costs against the source's values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .errors import QwenMLXError
from .gguf.unpack import pack
from .safetensors_writer import ShardedWriter, TensorSpec
from .sources import SourceTensor

CHUNK_WEIGHTS = 1 << 22  # a tensor is worked on in whole rows of about this many weights: 16 MB in float32
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8"}  # ours -> safetensors'
DENSE_TYPES = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")  # of GGUF: not quantized
FLOATS = ("bfloat16", "float16", "float32")
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Options:
    """What the user chose; see conversion.convert. Raises QwenMLXError for a value that is not offered."""

    dtype: str = "bfloat16"
    scales: str = "auto"
    requantize: int | None = None
    quantize: int | None = None
    group_size: int = 64
    allow_nan: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", FLOATS),
            ("scales", ("auto", *FLOATS)),
            ("requantize", (None, *BITS)),
            ("quantize", (None, *BITS)),
            ("group_size", GROUP_SIZES),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(str, allowed))
                raise QwenMLXError(f"{name} is {getattr(self, name)!r}, expected one of {choices}.")
        if self.requantize and self.quantize:
            raise QwenMLXError("quantize packs every matrix, requantize only some; give one of them.")


@dataclass(frozen=True)
class Form:
    """How a tensor is stored. mode "dense": in `dtype`. "affine", "mxfp4": as codes with scales (and biases) in `dtype`;
    from_source says that they are the source's own and not quantized here.
    """

    mode: str
    dtype: str
    bits: int = 0
    group_size: int = 0
    from_source: bool = False

    def specs(self, tensor: SourceTensor) -> list[TensorSpec]:
        """The tensors of the safetensors file, in the order of encode's arrays."""
        if self.mode == "dense":
            return [TensorSpec(tensor.name, DTYPES[self.dtype], tensor.shape)]
        rows, columns = tensor.shape
        module, groups = tensor.name.removesuffix(".weight"), (rows, columns // self.group_size)
        specs = [
            TensorSpec(f"{module}.weight", "U32", (rows, columns * self.bits // 32)),
            TensorSpec(f"{module}.scales", DTYPES[self.dtype], groups),
            TensorSpec(f"{module}.biases", DTYPES[self.dtype], groups),
        ]
        return specs if self.mode == "affine" else specs[:2]

    def config(self) -> dict[str, object]:
        """The layer's entry under `quantization` in config.json, as mlx-lm reads it."""
        mode = {} if self.mode == "affine" else {"mode": self.mode}
        return {"group_size": self.group_size, "bits": self.bits, **mode}

    def __str__(self) -> str:
        if self.mode == "dense":
            return self.dtype
        if self.mode == "mxfp4":
            return "mxfp4"
        return f"{self.bits} bits, group {self.group_size}, {self.dtype} scales"


def choose_form(tensor: SourceTensor, options: Options) -> Form:
    """The source's own codes where MLX has their arithmetic, unless `quantize` says otherwise; else dense, or quantized
    as the user asked. Matrices whose rows the group size does not divide stay dense.
    """

    def scales(automatic: str) -> str:
        return automatic if options.scales == "auto" else options.scales

    matrix = len(tensor.shape) == 2
    if tensor.form is not None and not options.quantize:
        form = tensor.form
        dtype = scales(form.scale_dtype) if form.mode == "affine" else form.scale_dtype
        return Form(form.mode, dtype, form.bits, form.group_size, from_source=True)
    bits = options.quantize or (options.requantize if tensor.type_name in _QUANTIZED_TYPES else None)
    if bits and matrix and tensor.shape[1] % options.group_size == 0:
        return Form("affine", scales(options.dtype), bits, options.group_size)
    return Form("dense", options.dtype)


@dataclass(frozen=True)
class Stored:
    """How one tensor was stored, and what that changed: relative_l2 = ||stored - source|| / ||source|| and max_abs, the
    largest difference, over finite values; both 0.0 if nothing changed. `not_finite` counts values that are not finite.
    """

    name: str
    source_name: str
    source_type: str
    stored_as: str
    shape: tuple[int, ...]
    nbytes: int
    relative_l2: float
    max_abs: float
    not_finite: int


def store(tensor: SourceTensor, form: Form, writer: ShardedWriter, allow_nan: bool) -> Stored:
    """Writes one tensor in pieces and measures what its form costs.

    Raises QwenMLXError naming the tensor: for values or scales that are not finite, unless allow_nan; for values that
    the form's dtype cannot hold.
    """
    specs = form.specs(tensor)
    squares = reference = max_abs = 0.0
    not_finite = 0
    for arrays, source, stored in _encode(tensor, form):
        bad = ~np.isfinite(source)
        if bad.any():
            not_finite += int(bad.sum())
            if not allow_nan:
                raise QwenMLXError(
                    f"tensor {tensor.source_name!r} ({tensor.type_name}) holds values or scales that are not finite: "
                    "the file is damaged, download it again (--allow-nan goes on)."
                )
        overflow = ~bad & ~np.isfinite(stored)
        if overflow.any():
            option = "--dtype" if form.mode == "dense" else "--scales"
            raise QwenMLXError(
                f"tensor {tensor.source_name!r} holds {float(source[overflow][0]):g}, more than {form.dtype} can; "
                f"give {option} float32."
            )
        for spec, array in zip(specs, arrays):
            writer.write(spec.name, array)
        if stored is not source:
            difference = np.where(bad, 0, stored - source).ravel()
            ...
