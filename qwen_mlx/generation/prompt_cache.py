"""Keys and values of a prompt, kept from one generation to the next and from one process to the next.

What two prompts have in common is computed once: the longest common prefix of their token ids stays in the cache.
On disk it is a safetensors file with the token ids and the fingerprint of the model that computed them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from ..backend import mx, named_arrays
from ..errors import QwenMLXError
from ..model.cache import KVCache
from ..model.qwen2 import Qwen2
from ..text.files import atomic_write

FORMAT, VERSION = "qwen_mlx prompt cache", "1"
SAMPLES = 64  # elements of each parameter that the fingerprint sees
MAX_HEADER = 1 << 20  # bytes; a real one has some 100 a layer
DTYPES = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}


class PromptCache:
    """A model's caches together with the ids they hold: `ids` are the tokens whose keys and values are in `layers`.

    Give it to `stream_generate(..., prompt_cache=...)`: tokens that it shares with the prompt are not computed again,
    and afterwards it holds the prompt and the answer. It belongs to one model, and serves one generation at a time:
    another that begins meanwhile computes everything, and it is the newest whose tokens are held afterwards.
    """

    def __init__(self, model: Qwen2, make: Callable[[], Sequence[KVCache]] | None = None):
        """make: what makes an empty cache, `model.make_cache` by default."""
        self.model = model
        self._make = make or model.make_cache
        self.layers: Sequence[KVCache] = self._make()
        self.ids: list[int] = []
        self._in_use = False

    def keep(self, prompt: Sequence[int]) -> int:
        """Forgets what differs from `prompt` and returns how many of its tokens are held: all but one at most, because
        the model must compute something to go on from. `layers` are then the caller's until it calls `record`."""
        if self._in_use:  # what an older generation is still writing to stays its own
            self.layers, self.ids = self._make(), []
        self._in_use = True
        self._cut(min(common_prefix(self.ids, prompt), len(prompt) - 1))
        return len(self.ids)

    def record(self, ids: Sequence[int], layers: Sequence[KVCache]) -> None:
        """Says what was computed into `layers`, which `keep` gave: `ids` from the first position on. They may hold
        fewer (the last token of an answer, or what an interrupt left out), and layers that got further than others are
        cut back. Nothing is recorded if a newer generation has begun."""
        if layers is not self.layers:
            return
        self._in_use = False
        self.ids = list(ids)
        self._cut(min(len(ids), *(layer.offset for layer in self.layers)))

    def _cut(self, held: int) -> None:
        if all(layer.can_trim(layer.offset - held) for layer in self.layers):
            for layer in self.layers:
                layer.trim(layer.offset - held)
            self.ids = self.ids[:held]
        else:  # a rotating cache has let go of old tokens and cannot go back
            self.layers, self.ids = self._make(), []

    def __repr__(self) -> str:
        mb = sum(layer.nbytes for layer in self.layers) / 1e6
        return f"PromptCache({len(self.ids)} tokens held, {mb:.1f} MB)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache; see `save`."""
        save(path, self.layers, self.ids, self.model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Qwen2) -> PromptCache:
        """Reads a cache; see `load`."""
        found = cls(model)
        found.layers, found.ids = load(path, model)
        return found


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two lists of ids share."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def fingerprint(model: Qwen2) -> str:
    """A digest of what a model computes, without reading all of it: its configuration, its rotary frequencies, and of
    every parameter the name, the dtype, the shape and 64 elements spread over it. 64 hexadecimal digits, SHA-256.

    Two models that agree in all of these, though they differ elsewhere, have the same fingerprint.
    """
    rotary = model.model.rotary
    digest = hashlib.sha256(json.dumps([asdict(model.config), asdict(rotary)], sort_keys=True).encode())
    names: list[str] = []
    samples: list[mx.array] = []
    for name, array in sorted(named_arrays(model)):
        names.append(f"{name} {array.dtype} {array.shape}")
        flat = array.reshape(-1)
        at = [i * (flat.size - 1) // (SAMPLES - 1) for i in range(SAMPLES)]
        bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.itemsize]
        samples.append(flat[mx.array(at)].view(bits).astype(mx.uint32))
    digest.update("\n".join(names).encode())
    digest.update(memoryview(mx.concatenate(samples)))  # type: ignore[arg-type]  # the stub omits buffers
    return digest.hexdigest()


def save(path: str | os.PathLike[str], cache: Sequence[KVCache], ids: Sequence[int], model: Qwen2) -> None:
    """Writes `cache`, which holds `ids`, as safetensors: `ids` (tokens,) int32 and for each layer `layers.N`
    (1, 2 n_kv_heads, tokens, head_dim), keys before values, in the cache's dtype.

    The file appears whole or not at all. Raises QwenMLXError if there is nothing to save, if the caches are not plain
    ones, or if the file cannot be written.
    """
    where, config = Path(path), model.config
    other = next((type(layer).__name__ for layer in cache if type(layer) is not KVCache), None)
    if model.ranks is not None:
        raise QwenMLXError(f"{where}: the cache of a model on several ranks cannot be saved; each holds a part of it.")
    if other:
        raise QwenMLXError(f"{where}: a {other} cannot be saved; only the plain cache, without size or bits, can.")
    if not ids or any(layer.offset != len(ids) for layer in cache):
        raise QwenMLXError(f"{where}: nothing to save; the cache holds {cache[0].offset} tokens for {len(ids)} ids.")
    arrays = {"ids": mx.array(list(ids), mx.int32)}
    for i, layer in enumerate(cache):
        arrays[f"layers.{i}"] = mx.concatenate(list(layer.state), axis=1)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": fingerprint(model),
        "shape": _describe(config),
        "dtype": str(model.model.norm.weight.dtype).removeprefix("mlx.core."),
        "crc32": _checksum(arrays),
    }
    with atomic_write(path, ".safetensors") as file:
        mx.save_safetensors(str(file), arrays, metadata)


def load(path: str | os.PathLike[str], model: Qwen2) -> tuple[list[KVCache], list[int]]:
    """Reads what `save` wrote: a cache for every layer, and the ids that they hold.

    Raises QwenMLXError for a file that is damaged or of another format, version, model or dtype, naming which.
    """
    where, config = Path(path), model.config
    header, metadata = check(where)
    dtype = str(model.model.norm.weight.dtype).removeprefix("mlx.core.")
    if metadata["dtype"] != dtype:
        raise QwenMLXError(
            f"{where}: a prompt cache in {_short(metadata['dtype'])}, expected {dtype}; load the model in that "
            "dtype, or delete the file."
        )
    digest = fingerprint(model)
    found = f"{_short(metadata['shape'])}, {_short(metadata['model'][:12])}"
    if metadata["shape"] != _describe(config) or metadata["model"] != digest:
        raise QwenMLXError(
            f"{where}: a prompt cache of another model ({found}), "
            f"expected {_describe(config)}, {digest[:12]}; use that model, or delete the file."
        )
    count = header["ids"]["shape"][0]
    shape = [1, 2 * config.num_key_value_heads, count, config.head_dim]
    for name in (f"layers.{i}" for i in range(config.num_hidden_layers)):
        entry = header.get(name, {})
        if entry.get("shape") != shape or DTYPES.get(entry.get("dtype")) != model.model.norm.weight.dtype:
            raise QwenMLXError(f"{where}: damaged; {name!r} is {_short(entry)}, expected {shape} in {dtype}.")
    arrays = cast("dict[str, mx.array]", mx.load(str(where), format="safetensors"))
    ids = cast("list[int]", arrays["ids"].tolist())
    if _checksum(arrays) != metadata["crc32"]:
        raise QwenMLXError(f"{where}: damaged; its bytes are not those that were written; delete the file.")
    if count >= config.context_length or not all(0 <= i < config.vocab_size for i in ids):
        raise QwenMLXError(f"{where}: its token ids, or their number, are beyond the model's.")
    cache = model.make_cache()
    for i, layer in enumerate(cache):
        layer.fill(arrays[f"layers.{i}"])
    mx.eval([layer.state for layer in cache])
    return cache, ids


def check(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The header and the metadata of a prompt cache, without its tensors or a model. Raises QwenMLXError for a file
    that cannot be one."""
    where = Path(path)
    try:
        with open(where, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ValueError("not a safetensors file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise QwenMLXError(f"{where}: not a prompt cache of qwen_mlx; give a file that --prompt-cache wrote.")
        if metadata.get("version") != VERSION:
            raise QwenMLXError(
                f"{where}: a prompt cache of version {_short(metadata.get('version'))}, expected {VERSION!r}; delete "
                "the file."
            )
        if not all(isinstance(metadata[key], str) for key in ("model", "shape", "dtype", "crc32")):
            raise ValueError("its metadata is not text")
        at = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            items = functools.reduce(lambda a, b: a * b, entry["shape"], 1)
            width = 4 if entry["dtype"] == "I32" else DTYPES[entry["dtype"]].size
            if any(not isinstance(n, int) or n < 1 for n in entry["shape"]):
                raise ValueError(f"{name!r} has shape {entry['shape']}")
            if entry["data_offsets"] != [at, at + items * width]:
                raise ValueError(f"{name!r} does not lie where it should")
            at += items * width
        if at != size - 8 - length:
            raise ValueError(f"it has {size} bytes, expected {8 + length + at}")
        if len(header["ids"]["shape"]) != 1 or header["ids"]["dtype"] != "I32":
            raise ValueError("its ids are not a list of int32")
    except QwenMLXError:
        raise
    except OSError as error:
        raise QwenMLXError(f"{where}: cannot be read ({error.strerror}).") from None
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise QwenMLXError(f"{where}: damaged or not a prompt cache ({_short(error)}); delete the file.") from None
    return header, metadata


def _checksum(arrays: dict[str, mx.array]) -> str:
    total = 0
    for _, array in sorted(arrays.items()):
        total = zlib.crc32(memoryview(array.reshape(-1).view(mx.uint8)), total)  # type: ignore[arg-type]  # same
    return f"{total:08x}"


def _short(value: object) -> str:
    """What a file says, for a sentence: it can be anything, and of any length."""
    return repr(str(value)[:80])


def _describe(config: Any) -> str:
    size = f"{config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size}"
    return f"{size}, context {config.context_length}"  # which --yarn changes, and with it all keys
