"""What the converter reads: a GGUF or a folder of safetensors, as one list of parameters with Hugging Face's names.

Opening reads and checks everything but the tensors' bytes; those are read when asked for, a few rows at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import GGUFError, QwenMLXError
from ..generation.sampling import SamplingSettings
from ..gguf import blocks
from ..gguf.names import ROPE_FACTORS, to_gguf, to_hf
from ..gguf.reader import GGUFFile, TensorInfo
from ..model.config import ModelConfig
from ..text.files import read_json
from ..text.tokenizer import Tokenizer
from .sampling_defaults import folder_defaults, gguf_defaults


@dataclass(frozen=True)
class SourceTensor:
    """One parameter. `name` is Hugging Face's, `source_name` the file's; `nbytes` are the file's.

    values(a, b): rows a to b as float32, of F64 as float64 (rows, columns); a vector is one row. packed(a, b): the same
    rows as MLX holds them exactly (codes, scales, biases; no biases in mode mxfp4), where `form` says how; scales are
    float32, or uint8 in mode mxfp4; they may be inf or NaN. done(): the bytes are no longer needed. scale_dtype(): the
    narrowest dtype in which packed's scales and biases are all exact, where `form` is affine.
    """

    name: str
    source_name: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int
    values: Callable[[int, int], np.ndarray]
    form: blocks.Packed | None = None
    packed: Callable[[int, int], tuple[np.ndarray, ...]] | None = None
    done: Callable[[], None] = lambda: None
    scale_dtype: Callable[[], str] = lambda: "float32"

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1


@dataclass(frozen=True)
class Source:
    """A model to convert. files: those whose digests the model card names; tokenizer_files: to copy as they are."""

    path: Path
    config: ModelConfig
    tensors: list[SourceTensor]
    tokenizer: Tokenizer
    defaults: SamplingSettings
    files: list[Path]
    tokenizer_files: list[Path]


def open_source(path: Path) -> Source:
    """Opens a GGUF file or a folder of dense safetensors.

    Raises GGUFError for a GGUF, QwenMLXError for a folder, naming the file, the field or tensor, found and expected.
    """
    return _open_folder(path) if path.is_dir() else _open_gguf(path)


def _open_gguf(path: Path) -> Source:
    file = GGUFFile(path)
    config = ModelConfig.from_gguf(file)
    found = model_tensors(file, config)
    if ROPE_FACTORS in file.tensors:
        raise GGUFError(
            f"{path}: tensor {ROPE_FACTORS!r} divides the rotary frequencies, for which an MLX model folder has no "
            "place; use the GGUF as it is."
        )
    try:
        tokenizer, defaults = Tokenizer.from_gguf(file.metadata), gguf_defaults(file)
    except QwenMLXError as error:
        message = str(error)
        raise GGUFError(message if str(path) in message else f"{path}: {message}") from None
    tokenizer.check_fits(config.vocab_size, path)
    tensors = [_gguf_tensor(file, name, info) for name, info in found.items()]
    return Source(path, config, tensors, tokenizer, defaults, file.paths, [])


def _gguf_tensor(file: GGUFFile, name: str, info: TensorInfo) -> SourceTensor:
    raw, kind = file.raw(info.name), info.type

    def packed(a: int, b: int) -> tuple[np.ndarray, ...]:
        if kind.affine:
            return blocks.affine(raw[a:b], kind, np.float32, finite=False)
        return blocks.mxfp4(raw[a:b], finite=False)

    def scale_dtype() -> str:
        dtype = blocks.exact_scales(raw, kind)
        file.release(info.name)
        return dtype

    return SourceTensor(
        name,
        info.name,
        info.shape,
        kind.name,
        info.nbytes,
        lambda a, b: raw[a:b].view("<f8") if kind.name == "F64" else blocks.dequantize(raw[a:b], kind),
        kind.packed if len(info.shape) == 2 else None,
        packed,
        lambda: file.release(info.name),
        scale_dtype,
    )


# A folder's tokenizer is copied as it is: what is not rewritten cannot change.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def _open_folder(folder: Path) -> Source:
    from .weights import safetensors_files

    if read_json(folder / "config.json").get("quantization"):
        raise QwenMLXError(f"{folder}: is quantized for MLX already; convert the original instead.")
    config = ModelConfig.from_folder(folder)
    files = safetensors_files(folder)
    tensors = _folder_tensors(folder, config)
    copies = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    for file in copies:
        if not file.is_file():
            raise QwenMLXError(f"{file}: is not a regular file; download the folder again.")
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_fits(config.vocab_size, folder)
    return Source(folder, config, tensors, tokenizer, folder_defaults(folder), files, copies)


def _folder_tensors(folder: Path, config: ModelConfig) -> list[SourceTensor]:
    from ..backend import mx
    from .weights import folder_tensors, load_safetensors

    found = folder_tensors(folder, packed=False)
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # some writers store the shared matrix twice
    shapes = config.parameter_shapes()
    for name in itertools.chain(shapes, found):
        shape = found[name][1].shape if name in found else None
        if shape != shapes.get(name):
            is_, expected = (f"has shape {shape}" if shape else "is missing"), shapes.get(name, "no such tensor")
            raise QwenMLXError(
                f"{folder}: tensor {name!r} {is_}, expected {expected}; this is not a dense qwen2 model."
            )

    def tensor(name: str) -> SourceTensor:
        file, lazy = found[name]
        loaded: list[mx.array] = []  # once evaluated, an MLX array stays: each is loaded anew and dropped when done

        def values(a: int, b: int) -> np.ndarray:
            if not loaded:
                array = load_safetensors(file)[name]
                loaded.append(array.reshape(-1, array.shape[-1]))
            return np.array(loaded[0][a:b].astype(mx.float32))

        kind = str(lazy.dtype).removeprefix("mlx.core.")
        return SourceTensor(name, name, shapes[name], kind, lazy.nbytes, values, done=loaded.clear)

    return [tensor(name) for name in shapes]


def model_tensors(file: GGUFFile, config: ModelConfig) -> dict[str, TensorInfo]:
    """The file's tensor for each of the model's parameters, by Hugging Face's names.

    Raises GGUFError for a tensor that is missing, is not part of the model, has another shape or holds integers.
    """
    shapes = config.parameter_shapes()
    found: dict[str, TensorInfo] = {}
    for name, info in file.tensors.items():
        hf_name = to_hf(name)
        if name == ROPE_FACTORS:
            continue
        if hf_name not in shapes:
            raise GGUFError(
                f"{file.path}: tensor {name!r} is not part of a qwen2 model of {config.num_hidden_layers} layers; "
                "convert the model again."
            )
        if info.type.name in ("I8", "I16", "I32", "I64"):
            raise GGUFError(f"{file.path}: tensor {name!r} has type {info.type.name}, which holds no weights.")
        if info.shape != shapes[hf_name]:
            raise GGUFError(
                f"{file.path}: tensor {name!r} has shape {info.shape}, expected {shapes[hf_name]} (rows, columns)."
            )
        found[hf_name] = info
    missing = [name for name in shapes if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GGUFError(f"{file.path}: tensor {to_gguf(missing[0])!r}{more} missing; convert the model again.")
    return {name: found[name] for name in shapes}
