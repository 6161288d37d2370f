"""A checkpoint: a GGUF file or a folder of safetensors, as parameters under Hugging Face's names.

load() and convert() read models through it. Opening checks everything but the tensors' bytes, which stay in the files'
files until they are asked for. Nothing here needs MLX.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import GGUFError, QwenMLXError, shortened
from ..generation.sampling import SamplingSettings
from ..gguf import blocks
from ..gguf.names import ROPE_FACTORS, SCORE_HEAD, to_gguf, to_hf
from ..gguf.reader import GGUFFile, TensorInfo
from ..gguf.stored import StoredFile
from ..model.config import ModelConfig
from ..parallel.shards import ALL, Cut
from ..text.files import read_json
from ..text.tokenizer import Tokenizer
from . import variants
from .folder import folder_contents
from .not_models import refuse_adapter, refuse_gguf, refuse_path
from .parameters import BlockParameter, Delta, Parameter, ScaledParameter
from .safetensors_files import open_files, read_tensors, safetensors_files
from .sampling_defaults import folder_defaults, gguf_defaults

# A folder's tokenizer is copied as it is: what is not rewritten cannot change.
_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
_TOKENIZER_FILES += ["added_tokens.json", "vocab.json", "merges.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, opened. files: those that hold its weights; tokenizer_files: a folder's, to copy as they are;
    rope_factors: a GGUF's divisors of the rotary frequencies, float32 (head_dim / 2,), or None; notes: sentences about
    what the files hold beyond a plain Qwen2, and what becomes of it; has_language_head: False for embedding models and
    those with a classification or reward head, whose parameters `score` are; deltas: what adapters make of matrices, by
    the parameter's name (adapters/apply.py); adapter_digest: of all that adapters change, "" without them."""

    path: Path
    config: ModelConfig
    parameters: dict[str, Parameter]
    tokenizer: Tokenizer
    defaults: SamplingSettings
    files: list[StoredFile]
    tokenizer_files: list[Path]
    rope_factors: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    has_language_head: bool = True
    score: dict[str, Parameter] = field(default_factory=dict)
    deltas: dict[str, Delta] = field(default_factory=dict)
    adapter_digest: str = ""

    def require_language_head(self) -> None:
        """Raises QwenMLXError for a model that generates no text."""
        if not self.has_language_head or not self.config.is_causal:
            lacks = "has no language head" if self.config.is_causal else "reads each token with those after it"
            command = "score" if self.score else "embed"
            raise QwenMLXError(
                f"{self.path}: {lacks}, so it generates no text; give it to `qwen-mlx {command}`, in "
                f"Python to load_encoder() and {command}()."
            )

    def parts(self, cut: Cut) -> dict[str, Parameter]:
        """The parts of the parameters that one of several ranks loads."""
        return {name: parameter.part(*cut(name)) for name, parameter in self.parameters.items()}


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a GGUF file or a folder of safetensors, dense or packed by mlx-lm or a method of `packings`.

    Raises GGUFError for a GGUF, QwenMLXError for a folder, naming the file, the field or tensor, what it is and what
    was expected.
    """
    try:
        refuse_path(path)
        with _without_garbage_collection():
            checkpoint = _open_folder(path) if path.is_dir() else _open_gguf(path)
        _require_finite_vectors(checkpoint)
        return checkpoint
    except QwenMLXError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        # Anyone may have written the files, and no check foresaw this fault.
        kind = QwenMLXError if path.is_dir() else GGUFError
        raise kind(
            f"{path}: cannot be read; a file of it is damaged or holds nonsense ({shortened(repr(error))})."
        ) from error


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A tokenizer is half a million objects, none of them garbage: looking for some takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _require_finite_vectors(checkpoint: Checkpoint) -> None:
    """Raises QwenMLXError for a norm or a bias with inf or NaN, which would make all logits NaN. Matrices, which take
    as long to read as the model to load, are not looked at."""
    for parameter in (*checkpoint.parameters.values(), *checkpoint.score.values()):
        if len(parameter.shape) != 1:
            continue
        with np.errstate(over="ignore"):
            values = parameter.values().astype(np.float32)
        if not np.isfinite(values).all():
            kind = QwenMLXError if checkpoint.path.is_dir() else GGUFError
            raise kind(
                f"{checkpoint.path}: tensor {parameter.source_name!r} has inf or NaN among its values, expected finite "
                "numbers; the file is damaged, download it again."
            )


# ---------------------------------------------------------------------------------------------------------------------
# GGUF

RANK = 4  # llama.cpp's pooling_type of rerankers


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    refuse_gguf(file)
    config, cut = variants.within_a_chunk(path, ModelConfig.from_gguf(file))
    tensors, notes = _gguf_tensors(file, config)
    factors = _rope_factors(file, config)
    try:
        tokenizer, defaults = Tokenizer.from_gguf(file.metadata), gguf_defaults(file)
    except QwenMLXError as error:
        message = str(error)
        raise GGUFError(message if str(path) in message else f"{path}: {message}") from None
    tokenizer.check_fits(config.vocab_size, path)
    shapes = config.parameter_shapes()
    parameters: dict[str, Parameter] = {}
    for name, shape in shapes.items():
        fused = variants.fused_part(name, shapes)
        if name in tensors:
            parameters[name] = _gguf_parameter(file, name, tensors[name])
        elif fused and fused[0] in tensors:
            whole = _gguf_parameter(file, fused[0], tensors[fused[0]])
            parameters[name] = variants.part_of_fused(whole, name, fused[2])
        else:
            parameters[name] = variants.zeros(name, shape)
    heads = {SCORE_HEAD[name]: info for name, info in file.tensors.items() if name in SCORE_HEAD}
    score: dict[str, Parameter] = {name: _gguf_parameter(file, name, info) for name, info in heads.items()}
    # llama.cpp names the pooling of a model that sentence-transformers pools; most have no language head.
    pooling = file.metadata.get("qwen2.pooling_type", 0)
    headless = (bool(score) or pooling != 0) if config.tie_word_embeddings else bool(score) and pooling == RANK
    if score and not config.tie_word_embeddings:
        notes += (f"{path}: has two heads: texts come from 'output.weight', scores from 'cls.output.weight'",)
    return Checkpoint(
        path,
        config,
        parameters,
        tokenizer,
        defaults,
        file.parts,
        [],
        factors,
        cut + notes,
        has_language_head=not headless,
        score=score,
    )


def _gguf_parameter(file: GGUFFile, name: str, info: TensorInfo) -> BlockParameter:
    packings = info.type.packings if len(info.shape) == 2 else ()
    stored = (file.stored(info.name),)
    layout = (info.shape[-1], info.type.block_size, ALL)
    scale = f"{info.name.removesuffix('.weight')}.scale"
    if scale in file.tensors:
        factor = file.raw(scale).view("<f4")[0, 0]
        fields = (name, info.name, info.shape, info.type.name, (), stored, *layout, info.type)
        return ScaledParameter(*fields, factor)
    return BlockParameter(name, info.name, info.shape, info.type.name, packings, stored, *layout, info.type)


def _check_scale(file: GGUFFile, name: str) -> None:
    """Raises GGUFError unless a tensor can be the factor of a matrix."""
    info, matrix = file.tensors[name], f"{name.removesuffix('.scale')}.weight"
    if matrix not in file.tensors:
        raise GGUFError(f"{file.path}: tensor {name!r} has no {matrix!r} to scale; convert the model again.")
    if (info.type.name, info.shape) != ("F32", (1,)):
        raise GGUFError(
            f"{file.path}: tensor {name!r} is {info.type.name} of shape {info.shape}, expected one F32; convert the "
            "model again."
        )
    if not np.isfinite(file.raw(name).view("<f4")).all():
        raise GGUFError(f"{file.path}: tensor {name!r} is inf or NaN; the file is damaged, download it again.")


def _gguf_tensors(file: GGUFFile, config: ModelConfig) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """The file's tensors for the model's parameters, by Hugging Face's names, and sentences about what they lack.

    Raises GGUFError for a tensor that is missing, is not part of the model, has another shape or holds integers.
    """
    own = config.parameter_shapes()
    parts = [part for name in own if (part := variants.fused_part(name, own)) and "qkv_proj" in part[0]]
    fused = [part for part in parts if to_gguf(part[0]) in file.tensors]
    shapes = own | {name: shape for name, shape, _ in fused}
    tensors: dict[str, TensorInfo] = {}
    activations = 0
    for name, info in file.tensors.items():
        hf_name = to_hf(name)
        if name == ROPE_FACTORS:
            continue
        if info.type.name in ("I8", "I16", "I32", "I64"):
            raise GGUFError(f"{file.path}: tensor {name!r} has type {info.type.name}, which holds no weights.")
        if name.endswith(".scale"):
            _check_scale(file, name)
            continue
        if name.endswith(".input_scale"):
            activations += 1
            continue
        if name in SCORE_HEAD:
            continue  # of as many rows as there are labels, which no field need say
        if name.startswith("cls."):
            raise GGUFError(
                f"{file.path}: tensor {name!r} is of a classification head of several layers, which no Qwen2 has; only "
                "'cls.output.weight' is read: convert the model again."
            )
        if hf_name not in shapes:
            raise GGUFError(
                f"{file.path}: tensor {name!r} is not part of a qwen2 model of {config.num_hidden_layers} layers; "
                "convert the model again."
            )
        if info.shape != shapes[hf_name]:
            raise GGUFError(
                f"{file.path}: tensor {name!r} has shape {info.shape}, expected {shapes[hf_name]} (rows, columns)."
            )
        tensors[hf_name] = info
    if config.lm_head_bias:  # of a head whose matrix may be the embedding's
        tensors.setdefault(variants.HEAD, file.tensors["token_embd.weight"])
    zero = variants.missing_biases(config, tensors)
    have = {*tensors, *zero, *(name for name in own if (part := variants.fused_part(name, own)) and part[0] in tensors)}
    missing = [name for name in own if name not in have]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GGUFError(f"{file.path}: tensor {to_gguf(missing[0])!r}{more} missing; convert the model again.")
    notes = []
    if zero:
        notes.append(f"{len(zero)} biases are missing, such as {to_gguf(zero[0])!r}; they are taken as zero")
    if activations:
        notes.append("the model was made for quantized activations; here only its weights are quantized")
    return tensors, tuple(f"{file.path}: {note}" for note in notes)


def _rope_factors(file: GGUFFile, config: ModelConfig) -> np.ndarray | None:
    info = file.tensors.get(ROPE_FACTORS)
    if info is None:
        return None
    if info.shape != (config.head_dim // 2,):
        raise GGUFError(
            f"{file.path}: tensor {info.name!r} has shape {info.shape}, expected {(config.head_dim // 2,)}."
        )
    factors: np.ndarray = blocks.dequantize(file.raw(info.name), info.type)[0]
    return factors


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors


def _open_folder(folder: Path) -> Checkpoint:
    config = ModelConfig.from_folder(folder)
    dual = read_json(folder / "config.json").get("dual_chunk_attention_config")
    config, cut = variants.within_a_chunk(folder, config, dual)
    files = open_files(safetensors_files(folder))
    tensors = read_tensors(files)
    refuse_adapter(tensors)
    contents = folder_contents(folder, config, tensors)
    copies = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    for file in copies:
        if not file.is_file():
            raise QwenMLXError(f"{file}: is not a regular file; download the folder again.")
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_fits(contents.config.vocab_size, folder)
    return Checkpoint(
        folder,
        contents.config,
        contents.parameters,
        tokenizer,
        folder_defaults(folder),
        files,
        copies,
        notes=(*cut, *contents.notes),
        has_language_head=contents.has_language_head,
        score=contents.score,
    )
