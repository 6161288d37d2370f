"""LoRA and DoRA adapters in peft's form: adapter_config.json and adapter_model.safetensors.

The equations and the meaning of names and patterns are those of peft's tuners/lora/layer.py, dora.py and
tuners_utils.check_target_module_exists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import QwenMLXError
from ..parameters import Parameter
from ..safetensors_files import StoredTensor, open_files, read_tensors
from .change import EMBEDDING, Change, Factors, array_of, parameter_of, require_factors
from .patterns import full_matches

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# A LoRA of peft's may have these too, each of which computes something else.
_UNSUPPORTED = (
    *("trainable_token_indices", "target_parameters", "layer_replication", "lora_bias", "use_qalora", "use_bdlora"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
# They leave the base as it is; others, such as pissa, take a part of it away when training begins.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


def read_peft(folder: Path, config: dict[str, Any], digest: str, shapes: Mapping[str, tuple[int, ...]]) -> Change:
    """The change that a folder of peft's makes to a model with parameters of these shapes, the head among them.

    Raises QwenMLXError naming the file, the field or tensor, what it is and what was expected.
    """
    where = folder / "adapter_config.json"
    _require_lora(where, config)
    factors: dict[str, dict[str, StoredTensor]] = {}
    values: dict[str, Parameter] = {}
    for name, tensor in read_tensors(open_files([folder / WEIGHTS])).items():
        module, part = _split(name.removeprefix(_PREFIX))
        if part in _PARTS:
            if len(shapes.get(f"{module}.weight", ())) != 2:
                raise QwenMLXError(
                    f"{tensor.file}: tensor {name!r} is of no matrix of this model; the adapter belongs to another."
                )
            factors.setdefault(module, {})[_PARTS[part]] = tensor
            continue
        own = f"{module}.{part}"
        if own not in shapes or own in values:
            raise QwenMLXError(f"{tensor.file}: tensor {name!r} is no parameter of this model, nor of a LoRA's.")
        values[own] = parameter_of(tensor, own)
        if values[own].shape != shapes[own]:
            raise QwenMLXError(
                f"{tensor.file}: tensor {name!r} has shape {tensor.shape}, but this model's is {shapes[own]}; the "
                "adapter belongs to another base, or its vocabulary was resized."
            )
    _require_saved(where, config, values)
    _require_targets(where, config, set(factors), shapes)
    scales = _scales(where, config, {module: _rank(parts) for module, parts in factors.items()})
    low_rank = {
        f"{module}.weight": _factors(folder, module, parts, scales[module], shapes)
        for module, parts in sorted(factors.items())
    }
    dora = config.get("use_dora") is True
    for name, own_factors in low_rank.items():
        if dora != (own_factors.magnitude is not None):
            raise QwenMLXError(f"{where}: use_dora is {dora}, but {name!r} {'lacks' if dora else 'has'} a magnitude.")
    return Change(folder, digest, low_rank, values, ties=config.get("ensure_weight_tying") is True)


def _require_lora(where: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise QwenMLXError(f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA', which alone is known.")
    for name in _UNSUPPORTED:
        if config.get(name) not in (None, False, [], {}):
            raise QwenMLXError(f"{where}: uses {name}, which is not supported; merge it into its base with peft.")
    init = config.get("init_lora_weights")
    if not isinstance(init, str | bool | None) or init not in _PLAIN_INITS:
        raise QwenMLXError(
            f"{where}: init_lora_weights is {init!r}, which changes the base, too; save the adapter as a plain LoRA "
            "(peft's path_initial_model_for_weight_conversion)."
        )


def _split(name: str) -> tuple[str, str]:
    """A tensor's module and its part of it."""
    for part in _PARTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    module, _, part = name.rpartition(".")
    return module.removesuffix(".base_layer").removesuffix(".modules_to_save"), part


def _rank(parts: Mapping[str, StoredTensor]) -> int:
    first = parts.get("a") or parts.get("embedding_a")
    return first.shape[0] if first is not None and first.shape else 0


def _factors(
    folder: Path, module: str, parts: Mapping[str, StoredTensor], scale: float, shapes: Mapping[str, tuple[int, ...]]
) -> Factors:
    where = f"{folder}: {module!r}"
    names = {"embedding_a", "embedding_b"} if f"{module}.weight" == EMBEDDING else {"a", "b"}
    if set(parts) - {"magnitude"} != names:
        found = ", ".join(sorted(tensor.name.rpartition(".lora_")[2] for tensor in parts.values()))
        raise QwenMLXError(f"{where} needs two factors, and has {found}; save the adapter again.")
    if "embedding_a" in parts:
        if "magnitude" in parts:
            raise QwenMLXError(f"{where} is an embedding with DoRA, which is not supported; merge it with peft.")
        # peft's product is for an embedding that lies on its side.
        a, b = array_of(parts["embedding_b"]).T, array_of(parts["embedding_a"]).T
    else:
        a, b = array_of(parts["a"]), array_of(parts["b"])
    require_factors(where, a, b, shapes.get(f"{module}.weight"))
    magnitude = array_of(parts["magnitude"]).reshape(-1) if "magnitude" in parts else None
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise QwenMLXError(f"{where} has a magnitude of {magnitude.shape}, expected {b.shape[:1]}.")
    return Factors(np.ascontiguousarray(a), b * np.float32(scale), magnitude)


def _scales(where: Path, config: dict[str, Any], ranks: dict[str, int]) -> dict[str, float]:
    """The scale of each module's product: alpha / r, with rsLoRA alpha / sqrt(r)."""
    own_ranks = _of_patterns(where, "rank_pattern", config, list(ranks), "r", 8)
    alphas = _of_patterns(where, "alpha_pattern", config, list(ranks), "lora_alpha", 8)
    for module, rank in ranks.items():
        if rank != own_ranks[module]:
            raise QwenMLXError(
                f"{where}: gives {module!r} the rank {own_ranks[module]:g}, but its tensors have {rank}; the "
                "configuration is another adapter's."
            )
    root = config.get("use_rslora") is True
    return {module: alphas[module] / (math.sqrt(rank) if root else rank or 1) for module, rank in ranks.items()}


def _of_patterns(
    where: Path, name: str, config: dict[str, Any], modules: list[str], default: str, fallback: int
) -> dict[str, float]:
    """Each module's number: the first pattern's that its name, or an end of it, matches, else the default."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise QwenMLXError(f"{where}: {name} is {patterns!r}, expected an object.")
    usual = _number(where, default, config.get(default, fallback))
    numbers = [_number(where, f"{name}[{key!r}]", value) for key, value in patterns.items()]
    ends = [end for module in modules for end in _ends(module)]
    plain = [key.removeprefix("^") if re.fullmatch(r"\^?[\w.]*", key) else f"({key})" for key in patterns]
    matches = full_matches(plain, ends, str(where)) if patterns else []
    result = dict.fromkeys(modules, usual)
    for key, row, number in reversed(list(zip(patterns, matches, numbers))):
        hits = {end for end, hit in zip(ends, row) if hit}
        for module in modules:
            if hits & ({module} if key.startswith("^") else set(_ends(module))):
                result[module] = number
    return result


def _ends(module: str) -> list[str]:
    """A module's name, and what is left of it after each dot."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _number(where: Path, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or abs(value) > 1e9:
        raise QwenMLXError(f"{where}: {name} is {value!r}, expected a number.")
    return float(value)


def _require_targets(
    where: Path, config: dict[str, Any], present: set[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises QwenMLXError unless the tensors are those of the modules that the configuration names."""
    modules = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    targets = config.get("target_modules")
    if targets is None:
        return
    named = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not isinstance(targets, str) and not named:
        raise QwenMLXError(f"{where}: target_modules is {targets!r}, expected names or a pattern.")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        expected = {module for module in modules if module.startswith("model.layers.")}
    elif isinstance(targets, str):
        expected = {module for module, hit in zip(modules, full_matches([targets], modules, str(where))[0]) if hit}
    else:
        expected = {module for module in modules if set(_ends(module)) & set(targets)}
        expected = _in_layers(where, config, expected)
    expected -= _excluded(where, config, modules)
    for module in sorted(expected - present):
        raise QwenMLXError(
            f"{where.parent}: has no tensors for {module!r}, which {where.name} names, as {len(expected - present)} in "
            "all; the adapter belongs to another model, or a file of it is damaged."
        )
    for module in sorted(present - expected):
        raise QwenMLXError(f"{where.parent}: has tensors for {module!r}, which {where.name} does not name.")


def _require_saved(where: Path, config: dict[str, Any], values: Mapping[str, Parameter]) -> None:
    """Raises QwenMLXError where modules_to_save names something of which there is no tensor."""
    saved = config.get("modules_to_save") or []
    for name in saved if isinstance(saved, list) else []:
        if not any(f".{name}." in f".{own}" for own in values):
            raise QwenMLXError(f"{where}: modules_to_save names {name!r}, of which there is no tensor.")


def _in_layers(where: Path, config: dict[str, Any], modules: set[str]) -> set[str]:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return modules
    layers = [layers] if isinstance(layers, int) else layers
    pattern = config.get("layers_pattern") or ["layers"]
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if not isinstance(layers, list) or patterns != ["layers"]:
        raise QwenMLXError(
            f"{where}: layers_to_transform is {layers!r} of {pattern!r}, expected numbers of 'layers', as Qwen2's are."
        )
    found = {module: re.match(r"model\.layers\.(\d+)\.", module) for module in modules}
    return {module for module, match in found.items() if match and int(match[1]) in layers}


def _excluded(where: Path, config: dict[str, Any], modules: list[str]) -> set[str]:
    """The modules that exclude_modules names, and those that are saved as they are."""
    exclude, saved = config.get("exclude_modules") or [], config.get("modules_to_save") or []
    for name, value in (("exclude_modules", exclude), ("modules_to_save", saved)):
        listed = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not listed and not (name == "exclude_modules" and isinstance(value, str)):
            raise QwenMLXError(f"{where}: {name} is {value!r}, expected a list of names.")
    if isinstance(exclude, str):
        hits = full_matches([exclude], modules, str(where))[0]
        excluded = {module for module, hit in zip(modules, hits) if hit}
    else:
        excluded = {module for module in modules if set(_ends(module)) & set(exclude)}
    return excluded | {module for module in modules if any(f".{name}." in f".{module}." for name in saved)}
