"""`python -m qwen_mlx.convert`: a GGUF, or a folder of safetensors, becomes an MLX model folder.

What is stored exactly stays packed; what MLX cannot express is made dense, or quantized again on request, and the
error of every tensor is measured, printed and written. The folder loads in qwen_mlx, in mlx-lm and in transformers'
tokenizers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, cli, hub
from .config import ModelConfig, read_json
from .errors import GGUFError, QwenMLXError
from .gguf import blocks
from .gguf.names import ROPE_FACTORS, model_tensors
from .gguf.reader import GGUFFile, TensorInfo
from .safetensors_writer import ShardedWriter, TensorSpec

SHARD_BYTES = 5 * 10**9
CHUNK_WEIGHTS = 1 << 23  # rows are worked on in pieces of about this many weights: 32 MB in float32
DENSE_TYPES = ("F32", "F16", "BF16", "F64")
SCALES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
REQUANTIZE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Stored:
    """How one tensor was stored, and what that cost against the source's values in float64 sums.

    relative_l2 is ||stored - source|| / ||source||, max_abs the largest difference; both 0.0 when nothing changed.
    """

    name: str
    source_type: str
    stored_as: str
    nbytes: int
    relative_l2: float
    max_abs: float


class _Error:
    """Sums up the difference between stored and source values, chunk by chunk."""

    def __init__(self) -> None:
        self.squares, self.reference, self.max_abs = 0.0, 0.0, 0.0

    def add(self, source: np.ndarray, stored: np.ndarray) -> None:
        difference = (stored - source).ravel()
        flat = source.ravel()
        self.squares += float(np.dot(difference, difference))
        self.reference += float(np.dot(flat, flat))
        self.max_abs = max(self.max_abs, float(np.abs(difference).max(initial=0)))

    @property
    def relative_l2(self) -> float:
        return math.sqrt(self.squares / self.reference) if self.reference else math.sqrt(self.squares)


def encode(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(bytes to store, the float32 values they stand for) of float32 `values` as "float32", "float16" or "bfloat16",
    rounded to nearest even; bfloat16 is returned as uint16.
    """
    if dtype == "float32":
        return values, values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        return half, half.astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    stored = np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
    return stored, (stored.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Options:
    """What the user chose; see convert()."""

    dtype: str
    scales: str
    requantize: int | None
    quantize: int | None
    group_size: int
    allow_nan: bool

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", tuple(SCALES)),
            ("scales", ("auto", *SCALES)),
            ("requantize", (None, *REQUANTIZE_BITS)),
            ("quantize", (None, *REQUANTIZE_BITS)),
            ("group_size", GROUP_SIZES),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(str(value) for value in allowed if value is not None)
                raise QwenMLXError(f"{name} is {getattr(self, name)!r}, expected one of {choices}.")


@dataclass(frozen=True)
class SourceTensor:
    """One parameter of the source. `values(a, b)`: rows a to b as float32. `affine`, `packed(a, b)`: its exact form in
    MLX's packing (codes, scales, biases), where it has one. `done()` is called when its bytes are no longer needed.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int
    values: Callable[[int, int], np.ndarray]
    affine: blocks.Packed | None = None
    packed: Callable[[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
    done: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Form:
    """How a tensor is stored: "dense" in `dtype`, or "exact" or "quantize" as codes with scales in `dtype`."""

    kind: str
    dtype: str
    bits: int = 0
    group_size: int = 0

    def specs(self, tensor: SourceTensor) -> list[TensorSpec]:
        if self.kind == "dense":
            return [TensorSpec(tensor.name, SCALES[self.dtype], tensor.shape)]
        rows, columns = tensor.shape
        module = tensor.name.removesuffix(".weight")
        groups = (rows, columns // self.group_size)
        return [
            TensorSpec(f"{module}.weight", "U32", (rows, columns * self.bits // 32)),
            TensorSpec(f"{module}.scales", SCALES[self.dtype], groups),
            TensorSpec(f"{module}.biases", SCALES[self.dtype], groups),
        ]

    def __str__(self) -> str:
        if self.kind == "dense":
            return self.dtype
        return f"{self.bits} bits, group {self.group_size}, {self.dtype} scales"


def choose_form(tensor: SourceTensor, options: Options) -> Form:
    """Exact packing first, then what the user asked for, else dense."""
    matrix = len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    divisible = matrix and tensor.shape[1] % options.group_size == 0
    if options.quantize and divisible:
        return Form("quantize", _scale_dtype(options, options.dtype), options.quantize, options.group_size)
    if matrix and tensor.affine is not None and not options.quantize:
        dtype = _scale_dtype(options, tensor.affine.scale_dtype)
        return Form("exact", dtype, tensor.affine.bits, tensor.affine.group_size)
    if options.requantize and divisible and tensor.type_name not in SCALES and tensor.type_name not in DENSE_TYPES:
        return Form("quantize", _scale_dtype(options, options.dtype), options.requantize, options.group_size)
    return Form("dense", options.dtype)


def _scale_dtype(options: Options, automatic: str) -> str:
    return automatic if options.scales == "auto" else options.scales


def gguf_tensors(file: GGUFFile, config: ModelConfig) -> list[SourceTensor]:
    """The parameters of a GGUF, read from its memory map. Raises GGUFError if they are not those of the model."""

    def tensor(name: str, info: TensorInfo) -> SourceTensor:
        raw = file.raw(info.name)
        return SourceTensor(
            name,
            info.shape,
            info.type.name,
            info.nbytes,
            lambda a, b: blocks.dequantize(raw[a:b], info.type),
            info.type.affine,
            lambda a, b: blocks.affine(raw[a:b], info.type, np.float32),
            lambda: file.release(info.name),
        )

    return [tensor(name, info) for name, info in model_tensors(file, config).items()]


def folder_tensors(folder: Path, config: ModelConfig) -> list[SourceTensor]:
    """The parameters of a folder of dense safetensors. Raises QwenMLXError if they are not those of the model."""
    from .backend import mx
    from .loading import read_safetensors

    weights = read_safetensors(folder)
    if "quantization" in read_json(folder / "config.json"):
        raise QwenMLXError(f"{folder}: already quantized for MLX; convert the original instead.")
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    tensors = []
    for name, shape in config.parameter_shapes().items():
        if name not in weights or weights[name].shape != shape:
            found = weights[name].shape if name in weights else "nothing"
            raise QwenMLXError(f"{folder}: tensor {name!r} is {found}, expected shape {shape}.")
        array = weights.pop(name)
        type_name = str(array.dtype).removeprefix("mlx.core.")

        def values(a: int, b: int, array: mx.array = array) -> np.ndarray:
            rows = array.reshape(-1, array.shape[-1])[a:b]
            return np.array(rows.astype(mx.float32))

        tensors.append(SourceTensor(name, shape, type_name, array.nbytes, values))
    if weights:
        raise QwenMLXError(f"{folder}: tensor {min(weights)!r} is not part of this qwen2 model.")
    return tensors


def store(tensor: SourceTensor, form: Form, writer: ShardedWriter, allow_nan: bool) -> Stored:
    """Writes one tensor in pieces of whole rows and measures what its form costs."""
    from .backend import mx

    columns = tensor.shape[-1]
    rows = math.prod(tensor.shape) // columns
    step = max(1, CHUNK_WEIGHTS // columns)
    names = [spec.name for spec in form.specs(tensor)]
    error = _Error()
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if form.kind == "dense":
            values = tensor.values(start, stop)
            _refuse_nan(tensor, values, allow_nan)
            stored, read_back = encode(values, form.dtype)
            pieces = [stored]
            if form.dtype != tensor.type_name:
                error.add(values, read_back)
        else:
            if form.kind == "exact":
                codes, scales, biases = tensor.packed(start, stop)
            else:
                values = tensor.values(start, stop)
                _refuse_nan(tensor, values, allow_nan)
                quantized = mx.quantize(mx.array(values), group_size=form.group_size, bits=form.bits)
                codes, scales, biases = (np.array(array) for array in quantized)
            wide = [np.asarray(array, np.float32) for array in (scales, biases)]
            for array in wide:
                _refuse_nan(tensor, array, allow_nan)
            (stored_scales, scales), (stored_biases, biases) = (encode(array, form.dtype) for array in wide)
            pieces = [codes, stored_scales, stored_biases]
            same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(wide, (scales, biases)))
            if form.kind == "quantize" or not same:
                values = tensor.values(start, stop)
                read_back = mx.dequantize(
                    mx.array(codes), mx.array(scales), mx.array(biases), group_size=form.group_size, bits=form.bits
                )
                error.add(values, np.array(read_back))
        for name, piece in zip(names, pieces):
            writer.write(name, piece)
    tensor.done()
    size = sum(spec.nbytes for spec in form.specs(tensor))
    return Stored(tensor.name, tensor.type_name, str(form), size, error.relative_l2, error.max_abs)


def _refuse_nan(tensor: SourceTensor, values: np.ndarray, allow_nan: bool) -> None:
    if not allow_nan and not np.isfinite(values).all():
        raise QwenMLXError(
            f"tensor {tensor.name!r} holds {int((~np.isfinite(values)).sum())} values or scales that are not finite; "
            "the file is damaged (--allow-nan converts it all the same)."
        )


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    scales: str = "auto",
    requantize: int | None = None,
    quantize: int | None = None,
    group_size: int = 64,
    force: bool = False,
    allow_nan: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Stored]:
    """Converts a GGUF (or a folder of safetensors, or a hub id) to an MLX model folder; returns each tensor's cost.

    dtype: of dense tensors, "bfloat16", "float16" or "float32". scales: of packed tensors; "auto" is the narrowest that
    is exact (float16 for the legacy types, float32 for K-quants, where bfloat16 costs 6e-3 and float16 7e-4 in relative
    L2). requantize: bits for the types that MLX cannot express (Q6_K, Q3_K, ...), which are dense otherwise. quantize:
    bits for every matrix. group_size: of both, 32, 64 or 128. force: replace an existing folder. allow_nan: convert
    values and scales that are not finite. progress: called with source bytes (done, in all).
    The folder appears complete or not at all. Raises QwenMLXError (GGUFError) naming file, tensor, found, expected.
    """
    options = Options(dtype, scales, requantize, quantize, group_size, allow_nan)
    path, target = hub.resolve(source), Path(output)
    if target.exists() and not force:
        raise QwenMLXError(f"{target}: exists already; give another name, or --force to replace it.")
    if target.exists() and not target.is_dir():
        raise QwenMLXError(f"{target}: is not a folder.")
    from .defaults import folder_defaults, gguf_defaults
    from .tokenizer import Tokenizer

    if path.is_dir():
        config = ModelConfig.from_folder(path)
        tensors = folder_tensors(path, config)
        tokenizer, defaults = Tokenizer.from_folder(path), folder_defaults(path)
        files = sorted(path.glob("*.safetensors"))
    else:
        file = GGUFFile(path)
        config = ModelConfig.from_gguf(file)
        if ROPE_FACTORS in file.tensors:
            raise GGUFError(f"{path}: holds {ROPE_FACTORS!r}, for which MLX model folders have no place.")
        tensors = gguf_tensors(file, config)
        tokenizer, defaults = Tokenizer.from_gguf(file.metadata), gguf_defaults(file)
        files = file.paths
    forms = [choose_form(tensor, options) for tensor in tensors]
    specs = [spec for tensor, form in zip(tensors, forms) for spec in form.specs(tensor)]
    total = sum(tensor.nbytes for tensor in tensors)
    with _sibling(target, sum(spec.nbytes for spec in specs)) as folder, ThreadPoolExecutor(1) as pool:
        digests = pool.submit(lambda: {file.name: _sha256(file) for file in files})
        report, done = [], 0
        with ShardedWriter(folder, specs, SHARD_BYTES) as writer:
            for tensor, form in zip(tensors, forms):
                try:
                    report.append(store(tensor, form, writer, allow_nan))
                except QwenMLXError as error:
                    raise GGUFError(f"{path}: {error}") from None
                done += tensor.nbytes
                if progress:
                    progress(done, total)
        hf_config = config.to_hf() | {"torch_dtype": dtype} | _quantization(tensors, forms)
        eos = sorted(tokenizer.eos_ids, reverse=True)
        hf_config |= {"eos_token_id": eos}
        _write_json(folder / "config.json", hf_config)
        _write_json(folder / "generation_config.json", _generation_config(defaults, eos))
        tokenizer.save(folder)
        _write_json(folder / "conversion.json", [dataclasses.asdict(row) for row in report])
        (folder / "README.md").write_text(_model_card(path, digests.result(), options, report), encoding="utf-8")
    return report


def _quantization(tensors: list[SourceTensor], forms: list[Form]) -> dict[str, Any]:
    """mlx-lm's `quantization`: a default, and one entry for each packed layer."""
    layers = {
        tensor.name.removesuffix(".weight"): {"group_size": form.group_size, "bits": form.bits}
        for tensor, form in zip(tensors, forms)
        if form.kind != "dense"
    }
    if not layers:
        return {}
    common = max(layers.values(), key=list(layers.values()).count)
    return {"quantization": {**common, **layers}}


def _generation_config(defaults: Any, eos: list[int]) -> dict[str, Any]:
    values: dict[str, Any] = {"eos_token_id": eos, "do_sample": defaults.temperature > 0}
    if defaults.temperature > 0:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            values[name] = getattr(defaults, name)
    values["repetition_penalty"] = defaults.repetition_penalty
    return values


def _model_card(path: Path, digests: dict[str, str], options: Options, report: list[Stored]) -> str:
    worst = max(report, key=lambda row: row.relative_l2)
    loss = f"the largest relative L2 error is {worst.relative_l2:.2e}, in `{worst.name}` ({worst.source_type})"
    sources = "\n".join(f"- `{name}`, sha256 `{digest}`" for name, digest in digests.items())
    return (
        f"---\nlibrary_name: mlx\npipeline_tag: text-generation\n---\n\n# {path.stem}\n\n"
        f"An MLX model made by qwen_mlx {__version__} from\n\n{sources}\n\n"
        f"with dtype {options.dtype}, scales {options.scales}, requantize {options.requantize}, "
        f"quantize {options.quantize}.\n"
        f"Against the source's values {loss if worst.relative_l2 else 'every tensor is exact'}; "
        "`conversion.json` lists each tensor.\n"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _sibling(target: Path, nbytes: int) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place at the end, or is removed, whatever ends the work."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < nbytes:
            raise QwenMLXError(f"{target}: needs {nbytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free on its disk.")
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise QwenMLXError(f"{target}: cannot be written ({error.strerror}).") from None
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(old / "folder")
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise QwenMLXError(f"{target}: cannot be written ({what}); nothing was left behind.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check(source: str | os.PathLike[str]) -> list[tuple[str, str, tuple[int, ...], int, str]]:
    """Validates a GGUF without converting it: (name, type, shape, bytes, verdict) of each tensor.

    Reads every value, so that scales that are not finite are found. Raises GGUFError for a file that cannot be read.
    """
    path = hub.resolve(source)
    if path.is_dir():
        raise QwenMLXError(f"{path}: is a folder; --check takes a GGUF file.")
    file = GGUFFile(path)
    config = ModelConfig.from_gguf(file)
    rows = []
    for tensor, info in zip(gguf_tensors(file, config), model_tensors(file, config).values()):
        step = max(1, CHUNK_WEIGHTS // tensor.shape[-1])
        bad = 0
        for start in range(0, math.prod(tensor.shape[:-1]), step):
            bad += int((~np.isfinite(tensor.values(start, start + step))).sum())
        tensor.done()
        rows.append((info.name, info.type.name, info.shape, info.nbytes, f"{bad} values not finite" if bad else "ok"))
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = cli.Parser(
        prog="python -m qwen_mlx.convert",
        description="Convert a GGUF (or a folder of safetensors, or a hub id) to an MLX model folder.",
    )
    p.add_argument("source", help=".gguf file (the first part, if split), folder, or hub id")
    p.add_argument("output", nargs="?", help="folder to write")
    p.add_argument("--check", action="store_true", help="validate the file and list its tensors; write nothing")
    p.add_argument("--dtype", choices=tuple(SCALES), default="bfloat16", help="of dense tensors (default bfloat16)")
    p.add_argument(
        "--scales",
        choices=("auto", *SCALES),
        default="auto",
        help="of packed tensors; auto is exact. On K-quants float16 costs 7e-4 and bfloat16 6e-3 relative L2, and both "
        "save a quarter of the scales' bytes",
    )
    bits = {"type": int, "choices": REQUANTIZE_BITS, "metavar": "BITS"}
    p.add_argument("--requantize", **bits, help="pack again the types that MLX cannot express; dense without it")
    p.add_argument("--quantize", **bits, help="pack every matrix, whatever its type")
    p.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=64, help="of both (default 64)")
    p.add_argument("--force", action="store_true", help="replace an existing folder")
    p.add_argument("--allow-nan", action="store_true", help="convert values that are not finite")
    return p


def _print_report(report: list[Stored]) -> None:
    """The tensors that changed, and a line for each way of storing."""
    changed = [row for row in report if row.relative_l2]
    if changed:
        width = max(len(row.name) for row in changed)
        print(f"{'tensor':{width}}  type   stored as                              relative L2   max abs")
        for row in changed:
            cost = f"{row.relative_l2:.2e}   {row.max_abs:.2e}"
            print(f"{row.name:{width}}  {row.source_type:5}  {row.stored_as:37}  {cost}")
    for form in dict.fromkeys(row.stored_as for row in report):
        rows = [row for row in report if row.stored_as == form]
        exact = sum(not row.relative_l2 for row in rows)
        print(f"{form}: {len(rows)} tensors, {sum(row.nbytes for row in rows) / 1e6:.1f} MB, {exact} exact")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes raise QwenMLXError."""
    arguments = parser().parse_args(argv)
    if arguments.check:
        rows = check(arguments.source)
        width = max(len(row[0]) for row in rows)
        for name, kind, shape, nbytes, verdict in rows:
            print(f"{name:{width}}  {kind:6}  {' x '.join(map(str, shape)):15}  {nbytes:>11}  {verdict}")
        bad = sum(row[4] != "ok" for row in rows)
        print(f"{len(rows)} tensors, {sum(row[3] for row in rows) / 1e6:.1f} MB, {bad} with values that are not finite")
        return 1 if bad else 0
    if arguments.output is None:
        raise QwenMLXError("no output folder: give SOURCE and OUTPUT, or --check SOURCE.")
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc="Converting", disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = convert(
            arguments.source,
            arguments.output,
            dtype=arguments.dtype,
            scales=arguments.scales,
            requantize=arguments.requantize,
            quantize=arguments.quantize,
            group_size=arguments.group_size,
            force=arguments.force,
            allow_nan=arguments.allow_nan,
            progress=progress,
        )
    _print_report(report)
    return 0


if __name__ == "__main__":
    cli.run(main)
