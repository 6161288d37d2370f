"""sentence-transformers' files in a folder: pooling, projections, normalisation, prompts and the longest input.

Source: sentence_transformers' base/modules and sentence_transformer/modules (config_keys and forward of each).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..encoding.encoder import Dense, EncoderSettings
from ..errors import QwenMLXError, shortened
from ..text.files import LARGEST_JSON, read_json, read_text
from .folder import plain_parameters
from .hub.client import say
from .parameters import Parameter
from .safetensors_files import open_files, read_tensors

MOST_MODULES = 64  # of modules.json; sentence-transformers' models have 2 to 5
_ACTIVATIONS = {"Identity": "identity", "Tanh": "tanh"}
# sentence-transformers' names in 1_Pooling/config.json, before and since it names one of them.
_POOLINGS = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_max_tokens": "max",
    "lasttoken": "last",
    "mean": "mean",
    "cls": "first",
    "max": "max",
}
# The settings that each file may have, with the values that change nothing here; none: any value.
_Known = Mapping[str, tuple[Any, ...]]
_TRANSFORMER: _Known = {
    "max_seq_length": (),
    "modality_config": (),
    "do_lower_case": (False,),
    "transformer_task": ("feature-extraction", "sequence-classification"),
    "module_output_name": ("token_embeddings", "scores"),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "unpad_inputs": (),
}
_PROMPTS: _Known = dict.fromkeys(
    ("__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name"), ()
)
_POOLING: _Known = {
    **dict.fromkeys(("embedding_dimension", "word_embedding_dimension", "pooling_mode", "include_prompt"), ()),
    **dict.fromkeys((*_POOLINGS, "pooling_mode_weightedmean_tokens", "pooling_mode_mean_sqrt_len_tokens"), ()),
}
_VECTOR: _Known = dict.fromkeys(("module_input_name", "module_output_name"), ("sentence_embedding",))
_DENSE: _Known = {
    "in_features": (),
    "out_features": (),
    "activation_function": (),
    "bias": (True, False),
    "use_residual": (False,),
    **_VECTOR,
}
_KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
_ORDER = re.compile("(Transformer )?Pooling( Dense)*( Normalize)?")


def sentence_transformers(folder: Path) -> tuple[EncoderSettings, list[Dense], dict[str, Parameter]]:
    """The contents of modules.json and of the files it names: settings, projections, and their parameters."""
    settings = EncoderSettings(**_prompts(folder))
    settings = replace(settings, max_length=_max_length(folder))
    bert = folder / "sentence_bert_config.json"
    modalities = _read(bert, _TRANSFORMER).get("modality_config")
    if isinstance(modalities, dict) and "message" in modalities:
        raise QwenMLXError(
            f"{bert}: modality_config has 'message', expected 'text' alone: its texts go through a chat template, "
            "which is not done here; pin modality_config to text and save it again."
        )
    if not (folder / "modules.json").exists():
        return settings, [], {}
    dense: list[Dense] = []
    arrays: dict[str, Parameter] = {}
    settings = replace(settings, normalize=False)
    for module in _modules(folder):
        kind, where = module["type"].rpartition(".")[2], _within(folder, module["path"])
        if kind == "Pooling":
            settings = replace(settings, pooling=_pooling(where / "config.json"))
        elif kind == "Normalize":
            if module["path"]:
                _read(where / "config.json", _VECTOR)
            settings = replace(settings, normalize=True)
        elif kind == "Dense":
            projection, own = _dense(where)
            arrays |= own(f"dense.{len(dense)}")
            dense.append(projection)
    return settings, dense, arrays


def _read(path: Path, known: _Known) -> dict[str, Any]:
    """A file's settings, none where there is no file. Raises QwenMLXError for a known one whose value is not computed
    here, and says which are not known."""
    settings = read_json(path) if path.exists() else {}
    for key, values in known.items():
        if values and settings.get(key) is not None and settings[key] not in values:
            raise QwenMLXError(
                f"{path}: {key} is {shortened(repr(settings[key]), 80)}, expected {' or '.join(map(repr, values))}; "
                "what it asks for is not done here."
            )
    unknown = sorted(key for key, value in settings.items() if key not in known and value not in (None, False, {}))
    if unknown:
        say(f"{path}: left out, because it is not known here: {shortened(', '.join(unknown), 80)}")
    return settings


def _max_length(folder: Path) -> int | None:
    """The longest input in tokens; transformers writes 1e30 where there is no limit."""
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        length = read_json(folder / name).get(key) if (folder / name).exists() else None
        if type(length) is int and 0 < length < 10**9:
            return length
        if length is not None and not (isinstance(length, int | float) and length >= 10**9):
            raise QwenMLXError(f"{folder / name}: {key} is {shortened(repr(length), 80)}, expected a positive integer.")
    return None


def _modules(folder: Path) -> list[dict[str, str]]:
    path = folder / "modules.json"
    if path.exists() and not path.is_file():
        raise QwenMLXError(f"{path}: is not a regular file; download the folder again.")
    text = read_text(str(path), largest=LARGEST_JSON)
    try:
        modules = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QwenMLXError(f"{path}: not valid JSON ({error}); download it again.") from None
    if isinstance(modules, list) and len(modules) > MOST_MODULES:
        raise QwenMLXError(f"{path}: has {len(modules)} modules, expected at most {MOST_MODULES}.")
    fits = isinstance(modules, list) and all(
        isinstance(module, dict) and isinstance(module.get("type"), str) and isinstance(module.get("path"), str)
        for module in modules
    )
    if not fits:
        raise QwenMLXError(f"{path}: holds {modules!r:.80}, expected a list of modules with 'type' and 'path'.")
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    unknown = [module["type"] for module, kind in zip(modules, kinds) if kind not in _KINDS]
    if unknown:
        raise QwenMLXError(
            f"{path}: module {unknown[0]!r:.80} is not known, expected Transformer, Pooling, Dense or Normalize."
        )
    own = [module["type"] for module in modules if not module["type"].startswith("sentence_transformers.")]
    if own:
        raise QwenMLXError(
            f"{path}: module {own[0]!r:.80} is code of the folder's own, which is not run here; if it does the same as "
            "sentence_transformers' module of that kind, such as sentence_transformers.models.Transformer, write that."
        )
    if modules and kinds[0] == "Transformer" and modules[0]["path"]:
        raise QwenMLXError(
            f"{path}: the Transformer's path is {modules[0]['path']!r:.80}, expected '', the folder itself; move that "
            "folder's files beside modules.json."
        )
    others = sorted({key for module in modules for key in module.keys() - {"idx", "name", "path", "type"}})
    if others:
        say(f"{path}: left out, because it is not known here: {shortened(', '.join(others), 80)}")
    if not _ORDER.fullmatch(" ".join(kinds)):
        raise QwenMLXError(
            f"{path}: the modules are {shortened(' '.join(kinds), 80) or 'none'}, expected Transformer, Pooling, any "
            "number of Dense, and Normalize at the end or not at all; another order is not computed here."
        )
    return list(modules)


def _within(folder: Path, name: str) -> Path:
    """The folder of a module. Raises QwenMLXError for a name that leads out of the model's."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        raise QwenMLXError(
            f"{folder / 'modules.json'}: a module's path is {shortened(repr(name), 80)}, expected a folder within the "
            "model's; do not use this model."
        )
    return folder / name


def _prompts(folder: Path) -> dict[str, Any]:
    path = folder / "config_sentence_transformers.json"
    own = _read(path, _PROMPTS)
    prompts = own.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise QwenMLXError(f"{path}: 'prompts' is {prompts!r:.80}, expected texts by name.")
    default = own.get("default_prompt_name")
    if default is not None and not isinstance(default, str):
        raise QwenMLXError(f"{path}: 'default_prompt_name' is {default!r:.80}, expected a name.")
    if default is not None and default not in prompts:
        known = ", ".join(map(repr, prompts)) or "none"
        raise QwenMLXError(
            f"{path}: 'default_prompt_name' is {default!r:.80}, expected one of the prompts ({known:.200}); "
            "download it again."
        )
    return {"prompts": prompts, "default_prompt": default}


def _pooling(path: Path) -> str:
    settings = _read(path, _POOLING)
    said = settings.get("pooling_mode")
    modes = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on is True]
    if said is not None:
        modes = list(map(str, said)) if isinstance(said, list) else [str(said)]
    known = [_POOLINGS[mode] for mode in modes if mode in _POOLINGS]
    if len(modes) != 1 or not known:
        raise QwenMLXError(f"{path}: pooling is {modes}, expected one of {', '.join(_POOLINGS)}.")
    if settings.get("include_prompt") is False and known[0] != "last":
        raise QwenMLXError(f"{path}: include_prompt is false, expected true; prompts are always part of the text here.")
    return known[0]


def _dense(folder: Path) -> tuple[Dense, Any]:
    """A projection, and the function that gives its parameters under a prefix."""
    settings = _read(folder / "config.json", _DENSE)
    package, _, name = str(settings.get("activation_function", "torch.nn.modules.linear.Identity")).rpartition(".")
    sizes = settings.get("in_features"), settings.get("out_features")
    known = name in _ACTIVATIONS and package.startswith("torch.nn")
    if not known or not all(isinstance(size, int) and 0 < size < 1 << 20 for size in sizes):
        raise QwenMLXError(
            f"{folder / 'config.json'}: the projection is {sizes} with {shortened(f'{package}.{name}', 80)}, expected "
            "sizes and torch.nn's Identity or Tanh."
        )
    width, size, bias = int(sizes[0] or 0), int(sizes[1] or 0), settings.get("bias", True) is True
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (size, width)} | ({"linear.bias": (size,)} if bias else {})
    weights = folder / "model.safetensors"
    if not weights.exists():
        other = " (pytorch_model.bin, a pickle, is not read)" if (folder / "pytorch_model.bin").exists() else ""
        raise QwenMLXError(f"{weights}: the projection's file is missing{other}; save the model again as safetensors.")
    tensors = read_tensors(open_files([weights]))
    return Dense(width, size, bias, _ACTIVATIONS[name]), functools.partial(plain_parameters, folder, tensors, shapes)
