"""convert() and check(): a GGUF or a folder of safetensors becomes an MLX model folder, complete or not at all.

What MLX can express exactly stays packed; the rest is made dense, or quantized on request, and the error of every
tensor is measured and written. The folder loads in qwen_mlx, in mlx-lm and in transformers' tokenizers.
The source is memory-mapped: if another program shortens it meanwhile, the system ends the process (a bus error), and
the next conversion removes what that left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import GGUFError, QwenMLXError
from ..gguf.blocks import threads
from ..loading import hub
from ..loading.sources import Source, SourceTensor, open_source
from .quantize import PIECE_WEIGHTS, Form, Options, Stored, choose_form, count_bad, in_order, store
from .write import ShardedWriter

SHARD_BYTES = 5 * 10**9
Progress = Callable[[int, int, int, int], None]  # called with tensors done and in all, bytes done and in all


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
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Stored]:
    """Converts a GGUF (or a folder of dense safetensors, or a hub id) to an MLX model folder; returns what each tensor
    became and what that cost, which the folder's conversion.json holds too.

    dtype: of dense tensors, "bfloat16", "float16" or "float32" (which is exact). scales: of packed tensors; "auto" is
    the narrowest that is exact: float16 for the legacy types, float32 for K-quants, where bfloat16 costs 6e-3 and
    float16 7e-4 in relative L2. requantize: bits for the quantized types that MLX cannot express (Q6_K, Q3_K, ...),
    which are dense otherwise. quantize: bits for every matrix. group_size: of both, 32, 64 or 128. force: replace an
    existing model folder. allow_nan: convert values and scales that are not finite. shard_bytes: of a safetensors file.
    The folder appears complete or not at all. Raises QwenMLXError (GGUFError for a GGUF) naming file, tensor, found and
    expected.
    """
    options = Options(dtype, scales, requantize, quantize, group_size, allow_nan)
    path = hub.resolve(source)
    target = _target(output, path, force)
    opened = open_source(path)
    if any(target in file.resolve().parents for file in opened.files):  # a part of a split file may be a link
        raise QwenMLXError(f"{target}: holds a part of the model to convert; give another folder for the output.")
    forms = [choose_form(tensor, options) for tensor in opened.tensors]
    specs = [spec for tensor, form in zip(opened.tensors, forms) for spec in form.specs(tensor)]
    _keep_freed_memory()
    with _sibling(target, sum(spec.nbytes for spec in specs), force) as folder, _digests(opened.files) as digests:
        report, done, total = [], 0, sum(tensor.nbytes for tensor in opened.tensors)
        with ShardedWriter(folder, specs, shard_bytes) as writer, ThreadPoolExecutor(threads()) as pool:
            for tensor, form in zip(opened.tensors, forms):
                with _naming(path):
                    report.append(store(tensor, form, writer, pool, allow_nan))
                done += tensor.nbytes
                if progress:
                    progress(len(report), len(forms), done, total)
        _write_metadata(folder, opened, forms, options)
        _write_json(folder / "conversion.json", [_json_row(row) for row in report])
        (folder / "README.md").write_text(_model_card(path, digests(), options, report), encoding="utf-8")
    return report


def check(source: str | os.PathLike[str], progress: Progress | None = None) -> list[tuple[SourceTensor, Form, int]]:
    """Validates a model without converting it: every tensor, how it would be stored, and how many of its values are not
    finite. Reads every value. Raises QwenMLXError (GGUFError for a GGUF) for a model that cannot be converted.
    """
    opened = open_source(hub.resolve(source))
    rows, done, total = [], 0, sum(tensor.nbytes for tensor in opened.tensors)
    with ThreadPoolExecutor(threads()) as pool:
        for tensor in opened.tensors:
            step = max(1, PIECE_WEIGHTS // tensor.shape[-1])
            form = choose_form(tensor, Options())
            jobs = (lambda a=a: count_bad(tensor, form, a, a + step) for a in range(0, tensor.rows, step))  # noqa: B023
            rows.append((tensor, form, sum(in_order(pool, jobs))))
            tensor.done()
            done += tensor.nbytes
            if progress:
                progress(len(rows), len(opened.tensors), done, total)
    return rows


def _keep_freed_memory() -> None:
    """Lets glibc serve arrays from memory freed before; it gives large blocks back at once and faults in zeroed pages
    for the next, a third of the processor time. Freeing one block of almost 32 MB raises its limits (mallopt(3),
    M_MMAP_THRESHOLD); it is never touched, and other allocators do not mind.
    """
    np.empty((32 << 20) - (1 << 16), np.uint8)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the source's name before an error about one of its tensors."""
    try:
        yield
    except QwenMLXError as error:
        kind = QwenMLXError if path.is_dir() else GGUFError
        raise kind(f"{path}: {error}") from None


@contextlib.contextmanager
def _digests(files: list[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Computes the files' SHA-256 meanwhile; the function waits for them. Leaving early stops the work."""
    stop = threading.Event()

    def digest(path: Path) -> str:
        sha = hashlib.sha256()
        with open(path, "rb") as file:
            while not stop.is_set() and (piece := file.read(1 << 20)):
                sha.update(piece)
        return sha.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        futures = {file.name: pool.submit(digest, file) for file in files}
        try:
            yield lambda: {name: future.result() for name, future in futures.items()}
        finally:
            stop.set()


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def _target(output: str | os.PathLike[str], source: Path, force: bool) -> Path:
    """The folder to write, its links followed; QwenMLXError if it may not be written there."""
    try:
        target = Path(output).expanduser().resolve()
        places = [source.resolve(), source.absolute().parent.resolve() / source.name]  # the file, and the link to it
        places += [file.resolve() for file in (source.iterdir() if source.is_dir() else ())]  # its files' links too
        if any(target == place or target in place.parents for place in places):
            raise QwenMLXError(f"{target}: holds the model to convert; give another folder for the output.")
        _check_replaceable(target, force)
    except QwenMLXError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a loop of links, a zero byte
        reason = getattr(error, "strerror", None) or error
        raise QwenMLXError(f"{os.fspath(output)}: cannot be written ({reason}); give another name.") from None
    return target


def _check_replaceable(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise QwenMLXError(f"{target}: is not a folder; give another name for the output.")
    if not force:
        raise QwenMLXError(f"{target}: exists already; give another name, or --force to replace it.")
    if any(target.iterdir()) and not (target / "config.json").exists():
        raise QwenMLXError(f"{target}: is not a model folder (no config.json), so --force does not replace it.")


def _host() -> str:
    return re.sub(r"\W", "_", platform.node()) or "host"


def _clear(target: Path, mark: str) -> None:
    """Removes temporary folders of processes of this machine that are no more; a model that one put aside returns."""
    for path in target.parent.glob(f"{glob.escape(mark)}*"):
        pid = path.name.removeprefix(mark).partition("-")[0]
        if not pid.isdigit() or _runs(int(pid)):
            continue
        if not target.exists() and (path / "model").is_dir():
            (path / "model").rename(target)
        shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


@contextlib.contextmanager
def _sibling(target: Path, nbytes: int, force: bool) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place at the end, or is removed, whatever ends the work. What a
    killed process left behind is removed by the next one."""
    folder = old = None
    mark = f".{target.name}.{_host()}-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target, mark)
        _check_replaceable(target, force)  # a model that a killed conversion had put aside may have returned
        free = shutil.disk_usage(target.parent).free
        if free < nbytes:
            raise QwenMLXError(f"{target}: needs {nbytes / 1e6:.1f} MB, but {free / 1e6:.1f} MB are free on its disk.")
        folder = Path(tempfile.mkdtemp(prefix=f"{mark}{os.getpid()}-", dir=target.parent))
        yield folder
        folder.chmod(0o777 & ~_umask())
        _check_replaceable(target, force)  # it may have appeared meanwhile
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f"{mark}{os.getpid()}-", dir=target.parent))
            target.rename(old / "model")
        folder.rename(target)
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else error.strerror
        raise QwenMLXError(f"{target}: cannot be written ({what}); nothing was left behind.") from None
    finally:
        if old is not None and not target.exists():
            (old / "model").rename(target)  # the new folder did not take its place
        for path in (folder, old):
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_metadata(folder: Path, source: Source, forms: list[Form], options: Options) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    eos = sorted(source.tokenizer.eos_token_ids, reverse=True)
    config = source.config.to_hf() | {"torch_dtype": options.dtype, "eos_token_id": eos}
    _write_json(folder / "config.json", config | _quantization(source.tensors, forms))
    defaults = source.defaults
    generation: dict[str, Any] = {"eos_token_id": eos, "pad_token_id": eos[-1], "do_sample": defaults.temperature > 0}
    names = ("temperature", "top_k", "top_p", "min_p") if defaults.temperature > 0 else ()
    generation |= {name: getattr(defaults, name) for name in (*names, "repetition_penalty")}
    _write_json(folder / "generation_config.json", generation)
    if source.tokenizer_files:
        for file in source.tokenizer_files:
            shutil.copyfile(file, folder / file.name)
    else:
        source.tokenizer.save(folder)


def _quantization(tensors: list[SourceTensor], forms: list[Form]) -> dict[str, Any]:
    """mlx-lm's `quantization`: a default, and what differs from it by layer."""
    layers = {
        tensor.name.removesuffix(".weight"): form.config()
        for tensor, form in zip(tensors, forms)
        if form.mode != "dense"
    }
    if not layers:
        return {}
    settings = list(layers.values())
    common = max(settings, key=settings.count)
    return {"quantization": {**common, **{name: own for name, own in layers.items() if own != common}}}


def _json_row(row: Stored) -> dict[str, Any]:
    return dataclasses.asdict(row) | {"exact": row.exact}


def _model_card(path: Path, digests: dict[str, str], options: Options, report: list[Stored]) -> str:
    changed = [row for row in report if not row.exact]
    verdict = "Every tensor stands for exactly the source's values"
    if changed:
        worst = max(changed, key=lambda row: row.relative_l2)
        verdict = (
            f"{len(report) - len(changed)} of {len(report)} tensors stand for exactly the source's values; the largest "
            f"relative L2 error is {worst.relative_l2:.2e}, in `{worst.name}` ({worst.source_type} as "
            f"{worst.stored_as})"
        )
    chosen = {key: value for key, value in dataclasses.asdict(options).items() if value not in (None, False)}
    sources = "\n".join(f"- `{_in_markdown(name)}`, sha256 `{digest}`" for name, digest in digests.items())
    return (
        f"---\nlibrary_name: mlx\npipeline_tag: text-generation\ntags:\n- mlx\n---\n\n# {_in_markdown(path.stem)}\n\n"
        f"An MLX model converted by qwen_mlx {__version__} from\n\n{sources}\n\n"
        f"with {', '.join(f'{key} {value}' for key, value in chosen.items())}.\n\n"
        f"{verdict}. `conversion.json` lists how each tensor is stored and its error.\n"
    )


def _in_markdown(name: str) -> str:
    """A file's name in one line of text that ends no code span, whatever bytes it has."""
    return re.sub(r"[^ -~\u00a1-\ud7ff\ue000-\U0010ffff]|`", "\ufffd", name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
