"""convert() and check(): a GGUF or a folder of safetensors becomes an MLX model folder, complete or not at all.

What MLX can express exactly stays packed; the rest is made dense, or quantized on request, and the error of every
tensor is measured and written. The folder loads in qwen_mlx, in mlx-lm and in transformers' tokenizers.
A source that another program writes to meanwhile is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import GGUFError, QwenMLXError, refuses_wrong_arguments
from ..gguf.blocks import threads
from ..gguf.names import ROPE_FACTORS
from ..gguf.packing import DENSE
from ..gguf.stored import StoredFile
from ..loading import hub
from ..loading.adapters.apply import adapted, merged
from ..loading.adapters.read import Names, parse
from ..loading.checkpoint import Checkpoint, open_checkpoint
from ..loading.hub.client import say
from ..loading.parameters import PackedParameter, Parameter
from .folder import replaced_folder, target_folder
from .quantize import Form, Options, Stored, choose_form, count_bad, in_order, pieces, store
from .write import ShardedWriter

SHARD_BYTES = 5 * 10**9
Progress = Callable[[int, int, int, int], None]  # called with tensors done and in all, bytes done and in all


@refuses_wrong_arguments
def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    scales: str = "auto",
    requantize: int | None = None,
    quantize: int | None = None,
    group_size: int = 64,
    dense: bool = False,
    adapter: Names = None,
    force: bool = False,
    allow_nan: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Stored]:
    """Converts a GGUF (or a folder of safetensors, dense or packed by another library, or a hub id) to an MLX model
    folder; returns how each tensor is stored and its error, which the folder's conversion.json lists too.

        convert("model.gguf", "folder/")

    dtype: of dense tensors, "bfloat16", "float16" or "float32" (which is exact).
    scales: of packed tensors; "auto" is the narrowest that is exact: float16 for the legacy types, float32 for
        K-quants.
    requantize: bits for the quantized types that MLX cannot express (Q6_K, Q3_K, ...), which are dense otherwise.
    quantize: bits for every matrix.
    group_size: of both, 32, 64 or 128.
    dense: unpack every matrix, as transformers needs.
    adapter: as load()'s, merged into the model in float32; the errors are those of storing the merged values.
    force: replace an existing model folder.
    allow_nan: convert values and scales that are not finite.
    shard_bytes: of a safetensors file.

    The folder appears complete or not at all. Raises QwenMLXError (GGUFError for a GGUF) naming the file, the tensor,
    its fault and what was expected.
    """
    options = Options(dtype, scales, requantize, quantize, group_size, allow_nan, dense)
    path = hub.resolve(source)
    target = target_folder(output, path, force)
    checkpoint = _open(path, adapter)
    if any(target in file.path.resolve().parents for file in checkpoint.files):  # a part of a split file may be a link
        raise QwenMLXError(f"{target}: holds a part of the model to convert; give another folder for the output.")
    for note in checkpoint.notes:
        say(note)
    forms = {tensor: choose_form(tensor, options) for tensor in checkpoint.parameters.values()}
    specs = [spec for tensor, form in forms.items() for spec in form.specs(tensor)]
    _keep_freed_memory()
    report, done, total = [], 0, sum(tensor.nbytes for tensor in forms)
    with (
        replaced_folder(target, sum(spec.nbytes for spec in specs), force) as folder,
        _digests(checkpoint.files) as digests,
    ):
        with ShardedWriter(folder, specs, shard_bytes) as writer, ThreadPoolExecutor(threads()) as pool:
            for tensor, form in forms.items():
                with naming(path):
                    report.append(store(tensor, form, writer, pool, allow_nan))
                done += tensor.nbytes
                if progress:
                    progress(len(report), len(forms), done, total)
        _write_metadata(folder, checkpoint, forms, options)
        _write_json(folder / "conversion.json", [dataclasses.asdict(row) | {"exact": row.exact} for row in report])
        adapters = [(Path(name).name if Path(name).exists() else name, scale) for name, scale in parse(adapter)]
        card = _model_card(path, digests(), options, report, [f"{name}:{scale:g}" for name, scale in adapters])
        (folder / "README.md").write_text(card, encoding="utf-8")
        for file in checkpoint.files:
            file.check_unchanged()
    return report


def check(source: str | os.PathLike[str], progress: Progress | None = None) -> list[tuple[Parameter, Form, int]]:
    """Validates a model without converting it: every tensor, how it would be stored, and how many of its values are not
    finite. Reads every value. Raises QwenMLXError (GGUFError for a GGUF) for a model that cannot be converted.
    """
    tensors = _open(hub.resolve(source)).parameters.values()
    rows, done, total = [], 0, sum(tensor.nbytes for tensor in tensors)
    with ThreadPoolExecutor(threads()) as pool:
        for tensor in tensors:
            form = choose_form(tensor, Options())
            jobs = (lambda a=a, b=b: count_bad(tensor, form, a, b) for a, b in pieces(tensor))  # noqa: B023
            rows.append((tensor, form, sum(in_order(pool, jobs))))
            tensor.release()
            done += tensor.nbytes
            if progress:
                progress(len(rows), len(tensors), done, total)
    return rows


def merged_checkpoint(path: Path, adapter: Names = None) -> Checkpoint:
    """A checkpoint of a model that generates text, merged with adapters."""
    checkpoint = adapted(open_checkpoint(path), adapter)
    checkpoint.require_language_head()
    parameters = {
        name: merged(parameter, checkpoint.deltas[name]) if name in checkpoint.deltas else parameter
        for name, parameter in checkpoint.parameters.items()
    }
    return dataclasses.replace(checkpoint, parameters=parameters)


def _open(path: Path, adapter: Names = None) -> Checkpoint:
    """A checkpoint that an MLX model folder can express, and that is not one already, merged with adapters."""
    checkpoint = merged_checkpoint(path, adapter)
    if not checkpoint.adapter_digest and any(
        isinstance(tensor, PackedParameter) for tensor in checkpoint.parameters.values()
    ):
        raise QwenMLXError(f"{path}: is quantized for MLX already; convert the original instead.")
    if checkpoint.rope_factors is not None:
        raise GGUFError(
            f"{path}: tensor {ROPE_FACTORS!r} divides the rotary frequencies, which an MLX model folder cannot "
            "express; use the GGUF as it is."
        )
    return checkpoint


def _keep_freed_memory() -> None:
    """Lets glibc reuse the memory of freed arrays; it returns large blocks to the system at once, and zeroing the pages
    of the next takes a third of the processor time. Freeing one block of almost 32 MB raises its limits (mallopt(3),
    M_MMAP_THRESHOLD); it is never touched, and other allocators do not mind.
    """
    np.empty((32 << 20) - (1 << 16), np.uint8)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the source's name before an error about one of its tensors."""
    try:
        yield
    except QwenMLXError as error:
        kind = QwenMLXError if path.is_dir() else GGUFError
        message = str(error)
        raise kind(message if message.startswith(str(path)) else f"{path}: {message}") from None


@contextlib.contextmanager
def _digests(files: list[StoredFile]) -> Iterator[Callable[[], dict[str, str]]]:
    """Computes the files' SHA-256 meanwhile; the function waits for them. Leaving early stops the work."""
    stop = threading.Event()

    def digest(file: StoredFile) -> str:
        sha = hashlib.sha256()
        for start in range(0, file.size, 1 << 20):
            if stop.is_set():
                break
            sha.update(file.read(start, min(1 << 20, file.size - start)).data)
        return sha.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        futures = {file.path.name: pool.submit(digest, file) for file in files}
        try:
            yield lambda: {name: future.result() for name, future in futures.items()}
        finally:
            stop.set()


def _write_metadata(folder: Path, source: Checkpoint, forms: dict[Parameter, Form], options: Options) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    eos = sorted(source.tokenizer.eos_token_ids, reverse=True)
    config = source.config.to_hf() | {"torch_dtype": options.dtype, "eos_token_id": eos}
    _write_json(folder / "config.json", config | _quantization(forms))
    defaults = source.defaults
    generation: dict[str, Any] = {"eos_token_id": eos, "pad_token_id": eos[-1], "do_sample": defaults.temperature > 0}
    names = ("temperature", "top_k", "top_p", "min_p") if defaults.temperature > 0 else ()
    generation |= {name: getattr(defaults, name) for name in (*names, "repetition_penalty")}
    _write_json(folder / "generation_config.json", generation)
    if source.tokenizer_files:
        for file in source.tokenizer_files:
            shutil.copyfile(file, folder / file.name)
        if len(source.tokenizer.chat_templates) > 1:
            source.tokenizer.save_chat_templates(folder)
    else:
        source.tokenizer.save(folder)


def _quantization(forms: dict[Parameter, Form]) -> dict[str, Any]:
    """mlx-lm's `quantization`: a default, and what differs from it by layer."""
    layers = {
        tensor.name.removesuffix(".weight"): form.config() for tensor, form in forms.items() if form.packing != DENSE
    }
    if not layers:
        return {}
    settings = list(layers.values())
    common = max(settings, key=settings.count)
    return {"quantization": {**common, **{name: own for name, own in layers.items() if own != common}}}


def _model_card(
    path: Path, digests: dict[str, str], options: Options, report: list[Stored], adapters: list[str]
) -> str:
    changed = [row for row in report if not row.exact]
    verdict = "Every tensor stands for exactly the source's values"
    if changed:
        worst = max(changed, key=lambda row: row.relative_l2)
        verdict = (
            f"{len(report) - len(changed)} of {len(report)} tensors stand for exactly the source's values; the largest "
            f"relative L2 error is {worst.relative_l2:.2e}, in `{worst.name}` ({worst.source_type} as "
            f"{worst.stored_as})"
        )
    settings = {key: value for key, value in dataclasses.asdict(options).items() if value not in (None, False)}
    sources = "\n".join(f"- `{_in_markdown(name)}`, sha256 `{digest}`" for name, digest in digests.items())
    sources += "".join(f"\n- the adapter `{_in_markdown(name)}`, merged" for name in adapters)
    return (
        f"---\nlibrary_name: mlx\npipeline_tag: text-generation\ntags:\n- mlx\n---\n\n# {_in_markdown(path.stem)}\n\n"
        f"An MLX model converted by qwen_mlx {__version__} from\n\n{sources}\n\n"
        f"with {', '.join(f'{key} {value}' for key, value in settings.items())}.\n\n"
        f"{verdict}. `conversion.json` lists how each tensor is stored and its error.\n"
    )


def _in_markdown(name: str) -> str:
    """A file's name in one line of text that ends no code span, whatever bytes it has."""
    return re.sub(r"[^ -~\u00a1-\ud7ff\ue000-\U0010ffff]|`", "\ufffd", name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
