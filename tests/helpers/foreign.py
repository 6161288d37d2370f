"""Matrices packed as other libraries pack them, written from those libraries' definitions, a bit field at a time, with
the values that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from reference.small_models import RandomModel, save_folder

Stored = tuple[str, np.ndarray]  # the dtype as safetensors names it, the elements
Packed = tuple[dict[str, Stored], np.ndarray]  # by the end of the name; values float32 (rows, columns)
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
STORAGE = {"U8": np.uint8, "BF16": np.uint16, "F32": np.float32}
FP4 = [0.0, 0.00520833, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
FP4 += [-value for value in FP4]


def write_safetensors(path: Path, tensors: dict[str, Stored]) -> None:
    """A safetensors file of any dtype."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (dtype, array) in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    replace_bytes(path, len(text).to_bytes(8, "little") + text + body)


def replace_bytes(path: Path, data: bytes) -> None:
    """Puts a new file in the place of one that may be mapped."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)


def bit_fields(codes: np.ndarray, bits: int, order: list[int] | None = None) -> np.ndarray:
    """Packs axis 0 of unsigned codes (n, m) into int32 (n * bits / 32, m): the i-th field of a word, the lowest first,
    is the code order[i] of the word's."""
    count = 32 // bits
    order = order or list(range(count))
    padded = np.zeros((-(-len(codes) // count) * count, codes.shape[1]), np.uint64)
    padded[: len(codes)] = codes
    words = np.zeros((len(padded) // count, codes.shape[1]), np.uint64)
    for word in range(len(words)):
        for field, place in enumerate(order):
            words[word] |= padded[word * count + place] << np.uint64(bits * field)
    return words.astype(np.uint32).view(np.int32)


def random_scales(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    return (rng.uniform(0.5, 2.0, shape) / 2**bits).astype(np.float16)


def bfloat16(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Truncated to bfloat16: its bits, and the values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16
    return bits.astype(np.uint16), (bits << 16).view(np.float32)


def gptq(
    rng: np.random.Generator, rows: int, columns: int, bits=4, group=32, order=False, version="gptq", symmetric=False
) -> Packed:
    """w[n, k] = scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n]); version "gptq" stores z - 1."""
    n_groups = columns // group
    codes = rng.integers(0, 2**bits, (columns, rows))
    zeros = rng.integers(1, 2**bits, (n_groups, rows))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = random_scales(rng, (n_groups, rows), bits)
    g_idx = np.arange(columns) // group
    if order:
        g_idx = rng.permutation(g_idx)
    values = np.empty((rows, columns), np.float32)
    for k in range(columns):
        values[:, k] = scales[g_idx[k]].astype(np.float32) * (codes[k] - zeros[g_idx[k]])
    stored_zeros = zeros - 1 if version == "gptq" else zeros
    return {
        "qweight": ("I32", bit_fields(codes, bits)),
        "qzeros": ("I32", bit_fields(stored_zeros.T, bits).T),
        "scales": ("F16", scales),
        "g_idx": ("I32", g_idx.astype(np.int32)),
    }, values


def awq(rng: np.random.Generator, rows: int, columns: int, group=32) -> Packed:
    """w[n, k] = scales[g, n] * (q[k, n] - z[g, n]); AutoAWQ's order of the eight outputs of a word."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes = rng.integers(0, 16, (columns, rows))
    zeros = rng.integers(0, 16, (columns // group, rows))
    scales = random_scales(rng, zeros.shape, 4)
    each = np.arange(columns) // group
    values = (scales[each].astype(np.float32) * (codes - zeros[each]).astype(np.float32)).T
    return {
        "qweight": ("I32", bit_fields(codes.T, 4, order).T),
        "qzeros": ("I32", bit_fields(zeros.T, 4, order).T),
        "scales": ("F16", scales),
    }, values


def pack_quantized(
    rng: np.random.Generator, rows: int, columns: int, bits=4, group: int | None = 32, symmetric=True, order=False
) -> Packed:
    """w[i, k] = scale[i, g] * (q[i, k] - z[i, g]) with q, z signed, stored plus 2^(bits - 1); group None: a row."""
    half = 2 ** (bits - 1)
    n_groups = columns // (group or columns)
    codes = rng.integers(-half, half, (rows, columns))
    zeros = np.zeros((rows, n_groups), int) if symmetric else rng.integers(-half, half, (rows, n_groups))
    scale_bits, scales = bfloat16(random_scales(rng, (rows, n_groups), bits).astype(np.float32))
    each = np.arange(columns) * n_groups // columns
    if order:
        each = rng.permutation(each)
    values = scales[:, each] * (codes - zeros[:, each]).astype(np.float32)
    tensors: dict[str, Stored] = {
        "weight_packed": ("I32", bit_fields((codes + half).T, bits).T),
        "weight_scale": ("BF16", scale_bits),
        "weight_shape": ("I64", np.array([rows, columns], np.int64)),
    }
    if not symmetric:
        tensors["weight_zero_point"] = ("I32", bit_fields(zeros + half, bits))
    if order:
        tensors["weight_g_idx"] = ("I32", each.astype(np.int32))
    return tensors, values


def int_quantized(rng: np.random.Generator, rows: int, columns: int, input_scale=False) -> Packed:
    """w[i, k] = scale[i] * q[i, k], q int8."""
    codes = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    scale_bits, scales = bfloat16(random_scales(rng, (rows, 1), 8).astype(np.float32))
    tensors: dict[str, Stored] = {"weight": ("I8", codes), "weight_scale": ("BF16", scale_bits)}
    if input_scale:
        tensors["input_scale"] = ("BF16", scale_bits[:1, 0])
    return tensors, scales * codes


def e4m3(codes: np.ndarray) -> np.ndarray:
    """float8_e4m3fn, a number at a time."""

    def value(code: int) -> float:
        exponent, mantissa = code >> 3 & 15, code & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        return -size if code & 128 else size

    return np.array([value(int(code)) for code in codes.ravel()], np.float32).reshape(codes.shape)


def random_e4m3(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 127) == 127] = 0  # NaN
    return codes


def float_quantized(rng: np.random.Generator, rows: int, columns: int, scales="row") -> Packed:
    """w = scale * e4m3; one scale, one a row, or one for each block of 32 rows and 48 columns."""
    codes = random_e4m3(rng, (rows, columns))
    shape = {"one": (1,), "row": (rows, 1), "block": (-(-rows // 32), -(-columns // 48))}[scales]
    factors = (rng.uniform(0.5, 2.0, shape) / 448).astype(np.float32)
    each = factors
    if scales == "block":
        each = factors[np.arange(rows) // 32][:, np.arange(columns) // 48]
    name = "weight_scale_inv" if scales == "block" else "weight_scale"
    return {"weight": ("F8_E4M3", codes), name: ("F32", factors)}, e4m3(codes) * each


def fp4(rng: np.random.Generator, rows: int, columns: int, kind="nvfp4") -> Packed:
    """w[i, k] = e2m1(q[i, k]) * scale[i, g]: groups of 16, e4m3 scales over one of all; or of 32, powers of two."""
    codes = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.where(codes & 8, -table[codes & 7], table[codes & 7]).astype(np.float32)
    tensors: dict[str, Stored] = {"weight_packed": ("U8", codes[:, 0::2] | codes[:, 1::2] << 4)}
    if kind == "nvfp4":
        scales = random_e4m3(rng, (rows, columns // 16)) & 127
        whole = np.array([64.0 * 448], np.float32)
        tensors |= {"weight_scale": ("F8_E4M3", scales), "weight_global_scale": ("F32", whole)}
        return tensors, values * np.repeat(e4m3(scales) / whole, 16, axis=1)
    exponents = rng.integers(115, 125, (rows, columns // 32)).astype(np.uint8)
    tensors["weight_scale"] = ("U8", exponents)
    return tensors, values * np.repeat(np.float32(2) ** (exponents - np.float32(127)), 32, axis=1)


def nf4(rng: np.random.Generator, rows: int, columns: int, nested=False, kind="nf4", storage="U8") -> Packed:
    """w.ravel()[i] = map[q[i]] * absmax[i // 64]; the high four bits come first. storage: the dtype of the bytes."""
    size, count = 64, rows * columns
    codes = rng.integers(0, 16, count).astype(np.uint8)
    table = np.array(NF4 if kind == "nf4" else FP4, np.float32)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": "float32", "shape": [rows, columns]}
    blocks = -(-count // size)
    tensors: dict[str, Stored] = {}
    if nested:
        index = rng.integers(0, 256, blocks).astype(np.uint8)
        own_map = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        own = rng.uniform(0.01, 0.02, -(-blocks // 256)).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0625}
        absmax = own_map[index] * own[np.arange(blocks) // 256] + np.float32(0.0625)
        tensors["weight.absmax"] = ("U8", index)
        tensors["weight.nested_absmax"] = ("F32", own)
        tensors["weight.nested_quant_map"] = ("F32", own_map)
    else:
        absmax = rng.uniform(0.05, 0.1, blocks).astype(np.float32)
        tensors["weight.absmax"] = ("F32", absmax)
    values = table[codes] * absmax[np.arange(count) // size]
    tensors |= {
        "weight": (storage, (codes[0::2] << 4 | codes[1::2]).view(STORAGE[storage])[:, None]),
        "weight.quant_map": ("F32", table),
        f"weight.quant_state.bitsandbytes__{kind}": ("U8", np.frombuffer(json.dumps(state).encode(), np.uint8)),
    }
    return tensors, values.reshape(rows, columns)


def llm_int8(rng: np.random.Generator, rows: int, columns: int) -> Packed:
    """w[i, k] = q[i, k] * SCB[i] / 127."""
    codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    largest = rng.uniform(0.1, 0.4, rows).astype(np.float32)
    tensors: dict[str, Stored] = {
        "weight": ("I8", codes),
        "SCB": ("F32", largest),
        "weight_format": ("U8", np.zeros((), np.uint8)),
    }
    return tensors, codes * (largest[:, None] / np.float32(127))


def projections(model: RandomModel) -> Iterator[str]:
    """The matrices that such libraries pack: all but the embedding and the head."""
    return (name for name in model.state_dict() if name.endswith("_proj.weight"))


def packed_folder(
    folder: Path, settings: dict[str, Any], pack: Callable[..., Packed], seed: int = 0, **arguments: Any
) -> tuple[Path, RandomModel]:
    """A folder whose projections `pack` packs, and the model of the same values."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    model, rng = RandomModel(seed, **sizes), np.random.default_rng(seed)
    save_folder(folder, model)
    state = model.state_dict()
    tensors: dict[str, Stored] = {name: ("F32", array) for name, array in state.items()}
    for name in projections(model):
        parts, values = pack(rng, *tensors.pop(name)[1].shape, **arguments)
        np.copyto(state[name], values)
        tensors |= {f"{name.removesuffix('.weight')}.{end}": stored for end, stored in parts.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder, model
