"""Taps on Hugging Face's Qwen2ForCausalLM, unmodified: forward hooks, and its eager attention function watched."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qwen_mlx.errors import QwenMLXError

from .taps import Run

try:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, DynamicCache, Qwen2ForCausalLM
    from transformers.models.qwen2 import modeling_qwen2
except ImportError as error:
    raise QwenMLXError(
        f"The reference needs PyTorch and transformers ({error}); in this repository: pip install -e '.[reference]'."
    ) from None

Trace = dict[str, np.ndarray]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The reference's own table, so that a tap of ours at the wrong place shows.
LAYER_MODULES = {
    "input_layernorm": (None, "input_norm"),
    "self_attn.q_proj": (None, "q"),
    "self_attn.k_proj": (None, "k"),
    "self_attn.v_proj": (None, "v"),
    "self_attn.o_proj": ("attn", "o"),
    "post_attention_layernorm": ("attn_residual", "post_norm"),
    "mlp.gate_proj": (None, "gate"),
    "mlp.up_proj": (None, "up"),
    "mlp.down_proj": ("act", "down"),
    "": (None, "residual"),
}
MODEL_MODULES = {"model.embed_tokens": "embeddings", "model.norm": "norm"}


def load(path: Path, dtype: str = "float32") -> Qwen2ForCausalLM:
    """The model that transformers reads from a .gguf file or a folder. Raises QwenMLXError if it cannot."""
    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True, **where
        )
    except Exception as error:
        raise QwenMLXError(
            f"{path}: transformers {transformers.__version__} cannot load it ({_first_line(error)}); give a model that "
            "it reads with --reference."
        ) from None
    if not isinstance(model, Qwen2ForCausalLM):
        raise QwenMLXError(f"{path}: holds a {type(model).__name__}, expected a Qwen2ForCausalLM.")
    # transformers fills these with random numbers and goes on: it reads only the first part of a split GGUF
    if absent := sorted(info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}):
        raise QwenMLXError(
            f"{path}: transformers {transformers.__version__} finds no {absent[0]} in it ({len(absent)} tensors are "
            "missing or of another shape); give a model that it reads whole with --reference."
        )
    biases = _mlp_biases(path)
    if unread := sorted(key for key in info["unexpected_keys"] - biases.keys() if not key.endswith("inv_freq")):
        raise QwenMLXError(
            f"{path}: transformers {transformers.__version__} leaves out {unread[0]} ({len(unread)} such tensors), so "
            "what it computes is not this model; give one that it reads whole with --reference."
        )
    add_mlp_biases(model, biases)
    return in_dtype(model.eval(), dtype)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _mlp_biases(path: Path) -> dict[str, np.ndarray]:
    """Biases of the MLP in a file, by Hugging Face's names: transformers' own Qwen2 drops them."""
    if path.is_file():
        from gguf import GGUFReader, dequantize

        names = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
        found = {}
        for tensor in GGUFReader(path).tensors:
            block, _, rest = tensor.name.removeprefix("blk.").partition(".")
            module = names.get(rest.removesuffix(".bias"))
            if module and rest.endswith(".bias"):
                found[f"model.layers.{block}.mlp.{module}.bias"] = dequantize(tensor.data, tensor.tensor_type)
        return found
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            wanted = [key for key in tensors.keys() if ".mlp." in key and key.endswith(".bias")]  # noqa: SIM118
            found |= {key: tensors.get_tensor(key).float().numpy() for key in wanted}
    return found


def add_mlp_biases(model: Qwen2ForCausalLM, biases: dict[str, np.ndarray]) -> None:
    """Gives the MLP's projections the biases named."""
    for name, bias in biases.items():
        module = model.get_submodule(name.removesuffix(".bias"))
        module.bias = torch.nn.Parameter(torch.tensor(np.array(bias, np.float32)))


def in_dtype(model: Qwen2ForCausalLM, dtype: str) -> Qwen2ForCausalLM:
    """A float32 model in another dtype: the same one for float32, else a copy. In float64 the rotary frequencies and
    angles and the norms are too, and `taps` sees to the softmax; transformers forms those in float32 always.
    """
    if dtype == "float32":
        return model
    other = copy.deepcopy(model).to(DTYPES[dtype])
    rotary, old = other.model.rotary_emb, model.model.rotary_emb
    rotary.inv_freq = old.inv_freq.clone()  # float32 in every dtype, as from_pretrained leaves it
    if dtype == "float64":
        inv_freq = rotary.inv_freq.double()
        if rotary.rope_type == "default":  # YaRN's stay as transformers rounds them
            half = len(inv_freq)
            theta = model.config.rope_parameters["rope_theta"]
            inv_freq = theta ** -(torch.arange(half, dtype=torch.float64) / half)

        def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angles = position_ids[..., None].double() * inv_freq
            angles = torch.cat((angles, angles), dim=-1)
            return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

        rotary.forward = forward
        for module in other.modules():
            if isinstance(module, modeling_qwen2.Qwen2RMSNorm):
                module.forward = functools.partial(_norm, module)
    return other


def _norm(module: modeling_qwen2.Qwen2RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Qwen2RMSNorm without its detour through float32."""
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """eager_attention_forward with its softmax in the dtype of the scores."""
    key, value = (modeling_qwen2.repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    probs = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    return (probs @ value).transpose(1, 2).contiguous(), probs


def record(model: Qwen2ForCausalLM, run: Run) -> Trace:
    """Every tap of a run, positions on axis 1: float64 arrays of a float64 model, else float32."""
    model.set_attn_implementation("eager")  # the only one that has probabilities
    trace: Trace = {}
    cache = DynamicCache()  # whole even where the model slides a window: every key is compared
    seen, batch = 0, {}
    for call, ids in enumerate(run.calls()):
        seen += len(ids[0])
        if (
            run.padding is not None
        ):  # as transformers' own generate() does; positions within the padding are seen by none
            mask = torch.tensor([[int(i >= columns) for i in range(seen)] for columns in run.padding])
            batch = {"attention_mask": mask, "position_ids": torch.tensor(run.positions(call))}

        def report(name: str, tensor: torch.Tensor, call: int = call) -> None:
            trace[f"{call}.{name}"] = _numpy(tensor)

        with torch.no_grad(), taps(model, report):
            logits = model(torch.tensor(ids), past_key_values=cache, use_cache=True, **batch).logits
        report("logits", logits)
        for i, layer in enumerate(cache.layers):
            report(f"layers.{i}.cache_k", layer.keys.transpose(1, 2))
            report(f"layers.{i}.cache_v", layer.values.transpose(1, 2))
    return trace


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return np.ascontiguousarray(wide.detach().numpy()).copy()


@contextlib.contextmanager
def taps(model: Qwen2ForCausalLM, report: Any) -> Iterator[None]:
    """While open, `model` reports every tap but logits and cache as it computes them."""
    handles = []

    def tap(module: torch.nn.Module, before: str | None, after: str | None) -> None:
        if before:
            handles.append(module.register_forward_pre_hook(lambda _, args: report(before, args[0])))
        handles.append(module.register_forward_hook(lambda _, args, out: report(after, out)))

    for path, name in MODEL_MODULES.items():
        tap(model.get_submodule(path), None, name)
    for i, layer in enumerate(model.model.layers):
        for path, (before, after) in LAYER_MODULES.items():
            prefix = f"layers.{i}."
            tap(layer.get_submodule(path), prefix + before if before else None, prefix + after)

    eager = modeling_qwen2.eager_attention_forward

    def watched(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        prefix, length = f"layers.{module.layer_idx}.", query.shape[2]
        report(prefix + "q_rope", query.transpose(1, 2))
        report(prefix + "k_rope", key[:, :, -length:].transpose(1, 2))
        attend = _attention if query.dtype == torch.float64 else eager
        out, probs = attend(module, query, key, *args, **kwargs)
        report(prefix + "probs", probs.transpose(1, 2))
        return out, probs

    modeling_qwen2.eager_attention_forward = watched
    try:
        yield
    finally:
        modeling_qwen2.eager_attention_forward = eager
        for handle in handles:
            handle.remove()


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder's configuration, index and safetensors."""
    names = ("config.json", "model.safetensors.index.json")
    files = [path] if path.is_file() else [path / name for name in names if (path / name).exists()]
    files += sorted(path.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as source:
            while part := source.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def cached_trace(
    path: Path, run: Run, folder: Path, model: Callable[[], Any] | None = None, digest: str | None = None
) -> tuple[Trace, bool]:
    """The float32 trace of a run, from `folder` if it is there, else made and kept there. Returns (trace, was there).

    The name of the file is a hash of the model's bytes and the run, and one of what made it (torch, transformers, these
    hooks), so that a trace is never taken for another's; one that another version made goes. model: a function that
    returns the loaded model, to load it once for many runs; digest: its content_hash, if known.
    """
    wanted = _name([digest or content_hash(path), run.ids, run.chunks, run.padding])
    hooks = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("torch_side.py", "taps.py")]
    file = folder / f"{wanted}-{_name([*hooks, torch.__version__, transformers.__version__])[:8]}.safetensors"
    if (trace := _read_trace(file)) is not None:
        return trace, True
    trace = record(model() if model else load(path), run)
    try:
        _keep_trace(trace, file)
        for old in set(folder.glob(f"{wanted}-*.safetensors")) - {file}:
            old.unlink(missing_ok=True)
    except (SafetensorError, OSError) as error:
        print(
            f"warning: {folder}: the reference's activations cannot be kept there ({_first_line(error)}); the next run "
            "makes them again. --cache names another folder.",
            file=sys.stderr,
        )
    return trace, False


def _name(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _checksum(trace: Trace) -> str:
    crc = 0
    for key in sorted(trace):
        crc = zlib.crc32(trace[key], zlib.crc32(key.encode(), crc))
    return f"{crc:08x}"


def _keep_trace(trace: Trace, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")  # two runs at once write two files; the last one stays
    try:
        save_file(trace, partial, {"crc32": _checksum(trace)})
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _read_trace(file: Path) -> Trace | None:
    """The trace in a file; None if there is none, or if it is not whole: it is made again and replaced."""
    try:
        with safe_open(file, "np") as tensors:
            trace = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
            metadata = tensors.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return trace if metadata.get("crc32") == _checksum(trace) else None
