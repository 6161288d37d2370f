"""Keys and values of a prompt, reused in the next generation or the next process.

Two prompts' longest common prefix of token ids is computed once. On disk a cache is a safetensors file with the token
ids and the fingerprint of the model that computed them.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, cast

from ..backend import check_process, mx, named_arrays
from ..errors import QwenMLXError, refuses_wrong_arguments
from ..gguf import safetensors_header
from ..gguf.stored import StoredFile
from ..model.cache import KVCache
from ..model.config import ModelConfig
from ..model.qwen2 import Qwen2
from ..text.files import atomic_write, clear_leftovers

FORMAT, VERSION = "qwen_mlx prompt cache", "1"
SAMPLES = 64  # elements of each parameter that the fingerprint sees
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class PromptCache:
    """A model's caches together with their token ids: `layers` hold the keys and values of the tokens `ids`.

    Give it to `stream_generate(..., prompt_cache=...)`: tokens that it shares with the prompt are not computed again,
    and afterwards it holds the prompt and the answer. It belongs to one model and to one generation at a time: another
    that begins meanwhile computes everything, and afterwards the cache holds the tokens of the newest.
    """

    @refuses_wrong_arguments
    def __init__(self, model: Qwen2, make: Callable[[], Sequence[KVCache]] | None = None):
        """make: makes an empty cache; `model.make_cache` by default."""
        self.model = model
        self._make = make or model.make_cache
        self.layers: Sequence[KVCache] = self._make()
        self.ids: list[int] = []
        self._in_use = False

    @refuses_wrong_arguments
    def keep(self, prompt: Sequence[int]) -> int:
        """Forgets what differs from `prompt` and returns the number of its tokens that are left: all but one at most,
        because the model must compute something to go on from. `layers` are then the caller's until it calls
        `record`."""
        if self._in_use:  # what an older generation is still writing to stays its own
            self.layers, self.ids = self._make(), []
        self._in_use = True
        self._cut(min(common_prefix(self.ids, prompt), len(prompt) - 1))
        return len(self.ids)

    def record(self, ids: Sequence[int], layers: Sequence[KVCache]) -> None:
        """Notes that `ids` were computed into `layers`, which `keep` gave. They may hold fewer (without the last token
        of an answer, or after an interrupt), and layers that got further than others are cut back. Does nothing if a
        newer generation has begun."""
        if layers is not self.layers:
            return
        self._in_use = False
        self.ids = list(ids)
        self._cut(min(len(ids), *(layer.offset for layer in self.layers)))

    def _cut(self, count: int) -> None:
        if all(layer.can_trim(layer.offset - count) for layer in self.layers):
            for layer in self.layers:
                layer.trim(layer.offset - count)
            self.ids = self.ids[:count]
        else:  # a rotating cache has let go of old tokens and cannot go back
            self.layers, self.ids = self._make(), []

    def __repr__(self) -> str:
        mb = sum(layer.nbytes for layer in self.layers) / 1e6
        return f"PromptCache({len(self.ids)} tokens held, {mb:.1f} MB)"

    @refuses_wrong_arguments
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache as safetensors: `ids` (tokens,) int32 and for each layer `layers.N` (1, 2 n_kv_heads,
        tokens, head_dim), keys before values, in the cache's dtype.

        An interrupted write leaves no file. Raises QwenMLXError if there is nothing to save, if the caches are not
        plain ones, or if the file cannot be written.
        """
        check_process()
        where, model, layers = Path(path), self.model, self.layers
        other = next((type(layer).__name__ for layer in layers if type(layer) is not KVCache), None)
        if model.ranks is not None:
            raise QwenMLXError(f"{where}: the cache of a model on several ranks cannot be saved; each holds a part.")
        if other:
            raise QwenMLXError(f"{where}: a {other} cannot be saved; only the plain cache, without size or bits, can.")
        if not self.ids or any(layer.offset != len(self.ids) for layer in layers):
            raise QwenMLXError(f"{where}: nothing to save; it holds {layers[0].offset} tokens, {len(self.ids)} ids.")
        arrays = {"ids": mx.array(self.ids, mx.int32)}
        for i, layer in enumerate(layers):
            arrays[f"layers.{i}"] = mx.concatenate(list(layer.state), axis=1)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "model": fingerprint(model),
            "shape": _describe(model.config),
            "dtype": _dtype(model),
            "crc32": _checksum(arrays),
        }
        with atomic_write(path, ".safetensors") as file:
            mx.save_safetensors(str(file), arrays, metadata)

    @classmethod
    @refuses_wrong_arguments
    def load(cls, path: str | os.PathLike[str], model: Qwen2) -> PromptCache:
        """Reads what `save` wrote.

        Raises QwenMLXError for a file that is damaged or of another format, version, model or dtype, naming which.
        """
        check_process()
        where = Path(path)
        with _opened(where) as file:  # once: another process may replace the file meanwhile
            return cls._load(where, file, model)

    @classmethod
    def _load(cls, where: Path, file: BinaryIO, model: Qwen2) -> PromptCache:
        config, dtype = model.config, _dtype(model)
        tensors, metadata = _header(where, file)
        if metadata["dtype"] != dtype:
            raise QwenMLXError(
                f"{where}: a prompt cache in {_short(metadata['dtype'])}, expected {dtype}; load the model in that "
                "dtype, or delete the file."
            )
        digest = fingerprint(model)
        if metadata["shape"] != _describe(config) or metadata["model"] != digest:
            raise QwenMLXError(
                f"{where}: a prompt cache of another model ({_short(metadata['shape'])}, "
                f"{_short(metadata['model'][:12])}), expected {_describe(config)}, {digest[:12]}; use that model, or "
                "delete the file."
            )
        count = tensors["ids"][1][0]
        expected = DTYPES[dtype], [1, 2 * config.num_key_value_heads, count, config.head_dim]
        names = [f"layers.{i}" for i in range(config.num_hidden_layers)]
        bad = next((name for name in names if tensors.get(name) != expected), None)
        if bad:
            raise QwenMLXError(f"{where}: damaged; {bad!r} is {_short(tensors.get(bad))}, expected {expected}.")
        file.seek(0)
        try:
            arrays = cast("dict[str, mx.array]", mx.load(file, format="safetensors"))
            mx.eval(arrays)
        except Exception as error:  # what MLX's own reader refuses, and a file that was cut meanwhile
            raise QwenMLXError(_not_a_cache(where, error)) from None
        if _checksum(arrays) != metadata["crc32"]:
            raise QwenMLXError(f"{where}: damaged; its bytes are not those that were written; delete the file.")
        cache = cls(model)
        cache.ids = cast("list[int]", arrays["ids"].tolist())
        if count >= config.context_length or not all(0 <= i < config.vocab_size for i in cache.ids):
            raise QwenMLXError(f"{where}: its token ids, or their number, are beyond the model's.")
        for name, layer in zip(names, cache.layers):
            layer.fill(arrays[name])
        mx.eval([layer.state for layer in cache.layers])
        return cache


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, tuple[str, list[int]]], dict[str, str]]:
    """Dtype and shape of each tensor of a prompt cache, and its metadata. Raises QwenMLXError for a file that cannot be
    one."""
    where = Path(path)
    clear_leftovers(where.parent)
    with _opened(where) as file:
        return _header(where, file)


def _opened(where: Path) -> BinaryIO:
    if where.exists() and not where.is_file():  # a pipe would be waited for
        raise QwenMLXError(f"{where}: cannot be read (it is not a regular file).")
    try:
        return open(where, "rb")
    except (OSError, ValueError) as error:  # a zero byte in its name
        raise QwenMLXError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None


def _header(where: Path, opened: BinaryIO) -> tuple[dict[str, tuple[str, list[int]]], dict[str, str]]:
    """read_header of a file that is open."""
    try:
        header, _ = safetensors_header.read_header(StoredFile(where, os.dup(opened.fileno())))
    except (OSError, safetensors_header.SafetensorError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise QwenMLXError(f"{where}: cannot be read ({error.strerror}).") from None
        raise QwenMLXError(_not_a_cache(where, error)) from None
    metadata: dict[str, str] = header.pop("__metadata__", None) or {}
    tensors = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    if metadata.get("format") != FORMAT:
        raise QwenMLXError(f"{where}: not a prompt cache of qwen_mlx; give a file that --prompt-cache wrote.")
    if metadata.get("version") != VERSION:
        found = _short(metadata.get("version"))
        raise QwenMLXError(f"{where}: a prompt cache of version {found}, expected {VERSION!r}; delete the file.")
    dtype, shape = tensors.get("ids", ("", []))
    if dtype != "I32" or len(shape) != 1 or not shape[0] or not {"model", "shape", "dtype", "crc32"} <= metadata.keys():
        raise QwenMLXError(f"{where}: damaged; its ids or its metadata are incomplete; delete the file.")
    return tensors, metadata


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two lists of ids share."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def fingerprint(model: Qwen2) -> str:
    """A digest of what a model computes, without reading all of it: its configuration, its rotary frequencies, and of
    every parameter the name, the dtype, the shape and 64 elements spread over it, and its adapters' files. 64
    hexadecimal digits, SHA-256.

    Two models that agree in all of these, though they differ elsewhere, have the same fingerprint.
    """
    rotary = model.model.rotary
    digest = hashlib.sha256(json.dumps([asdict(model.config), asdict(rotary)], sort_keys=True).encode())
    digest.update(model.adapter_digest.encode())
    names: list[str] = []
    samples: list[mx.array] = []
    for name, array in sorted(named_arrays(model)):
        names.append(f"{name} {array.dtype} {array.shape}")
        flat = array.reshape(-1)
        indices = [i * (flat.size - 1) // (SAMPLES - 1) for i in range(SAMPLES)]
        bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.itemsize]
        samples.append(flat[mx.array(indices)].view(bits).astype(mx.uint32))
    digest.update("\n".join(names).encode())
    digest.update(memoryview(mx.concatenate(samples)))  # type: ignore[arg-type]  # the stub omits buffers
    return digest.hexdigest()


def _checksum(arrays: dict[str, mx.array]) -> str:
    total = 0
    for _, array in sorted(arrays.items()):
        total = zlib.crc32(memoryview(array.reshape(-1).view(mx.uint8)), total)  # type: ignore[arg-type]  # same
    return f"{total:08x}"


def _dtype(model: Qwen2) -> str:
    return str(model.model.norm.weight.dtype).removeprefix("mlx.core.")


def _not_a_cache(where: object, error: Exception) -> str:
    return f"{where}: damaged or not a prompt cache ({_short(error)}); give another name, or delete the file."


def _short(value: object) -> str:
    """A file's own words, for a sentence: they can be anything, and of any length."""
    return repr(str(value)[:80])


def _describe(config: ModelConfig) -> str:
    size = f"{config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size}"
    return f"{size}, context {config.context_length}"  # which --yarn changes, and with it all keys
