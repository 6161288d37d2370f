"""Checkpoints that hold more than a plain Qwen2, or less: fused projections, biases, heads, prefixes, rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QwenMLXError, shortened
from ..gguf.blocks import BLOCK_TYPES
from ..gguf.stored import StoredRows
from ..model.config import ModelConfig
from ..parallel.shards import ALL
from ..text.files import read_json
from .packings import Tensors
from .parameters import BlockParameter, Parameter
from .safetensors_files import StoredTensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_EMBEDDING, _SCORE = "model.embed_tokens.", "score."
_SCORING = ("Classification", "RewardModel")  # ends of architectures whose head is `score`
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Qwen2.5-1M's context, and the chunk of its dual chunk attention: up to there that is plain attention, as each query's
# distance from each key is the true one (vLLM's DualChunkRotaryEmbedding).
ONE_MILLION, CHUNK = 1_010_000, 262_144
# Heads of trainers (TRL's AutoModelForCausalLMWithValueHead, OpenRLHF, verl), which generation does not use.
_VALUE_HEADS = ("v_head.", "value_head.", "critic_head.")

# Code in folders that is known: gte-Qwen2's, which model.config reads, and the reward models', which are read as heads.
_KNOWN_CODE = (
    "modeling_qwen.Qwen2Model",
    "modeling_qwen.Qwen2ForCausalLM",
    "modeling_qwen.Qwen2ForSequenceClassification",
    ".Qwen2ForRewardModel",
    ".Qwen2ForProcessRewardModel",
)


def fused_part(name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], slice] | None:
    """The fused parameter that holds the projection's `name` in some files, its shape, and the projection's rows."""
    parent, module, kind = (".." + name).rsplit(".", 2)
    for fused, modules in FUSED.items():
        if module in modules:
            names = [f"{parent[2:]}.{each}.{kind}" for each in modules]
            if any(each not in shapes for each in names):
                return None
            rows = [shapes[each][0] for each in names]
            start = sum(rows[: modules.index(module)])
            own = slice(start, start + rows[modules.index(module)])
            return f"{parent[2:]}.{fused}.{kind}", (sum(rows), *shapes[name][1:]), own
    return None


def part_of_fused(parameter: Parameter, name: str, rows: slice) -> Parameter:
    """A projection's rows of a fused parameter."""
    return replace(parameter.part(rows, ALL), name=name)


def zeros(name: str, shape: tuple[int, ...]) -> Parameter:
    """A bias that the file lacks."""
    raw = StoredRows(None, 0, np.dtype(np.uint8), 1, 4 * shape[0], ALL)
    return BlockParameter(name, name, shape, "float32", (), (raw,), shape[0], 1, ALL, BLOCK_TYPES[0])


def with_plain_names(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors under the names of a Qwen2ForCausalLM: without the prefix of a wrapper ("language_model.",
    "base_model.model."), and with "model." where the file is of the bare Qwen2Model."""
    candidates = [EMBEDDING] if EMBEDDING in tensors else sorted(tensors)  # others beside it are copies
    embedding = next((name for name in candidates if name.endswith("embed_tokens.weight")), None)
    if embedding is None:  # as in a tied model that stores only its head
        head = next((name for name in candidates if name.endswith(HEAD)), HEAD)
        embedding = head.removesuffix(HEAD) + EMBEDDING
    if embedding.endswith(EMBEDDING):
        prefix = embedding.removesuffix(EMBEDDING)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    bare = embedding.removesuffix("embed_tokens.weight")
    parts = tuple(f"{bare}{part}" for part in ("embed_tokens.", "layers.", "norm."))
    return {
        f"model.{name.removeprefix(bare)}" if name.startswith(parts) else name: tensor
        for name, tensor in tensors.items()
    }


def is_bare(folder: Path, tensors: dict[str, StoredTensor]) -> bool:
    """True for the files of a Qwen2Model, or of one with another head than a language model's. config.json says which;
    where it does not, the tensors do."""
    architectures = _architectures(folder)
    if "embed_tokens.weight" in tensors and HEAD not in tensors:
        return True
    if architectures:
        return "Qwen2ForCausalLM" not in str(architectures)
    return HEAD not in tensors and any(name.startswith(_SCORE) for name in tensors)


def fit(folder: Path, config: ModelConfig, tensors: Tensors, bare: bool) -> tuple[ModelConfig, list[str], bool]:
    """The configuration of the model that the tensors are, sentences about what differs from config.json, and True for
    a model without a language head, which a `bare` one may lack.

    Takes what no parameter stands for: a second copy of a shared matrix, value heads, biases that are zero.
    Raises QwenMLXError for a bias of a head that is the embedding.
    """
    notes: list[str] = _own_code(folder)
    _move_lone_head(folder, config, tensors, notes)
    config = _with_rows(folder, config, tensors, notes)
    scores = [name for name in tensors if name.startswith(_SCORE)]
    if scores:
        config = _choose_head(folder, config, tensors, bare, scores, notes)
    elif bare and str(_architectures(folder)).rstrip("']").endswith(_SCORING):
        notes.append(f"{folder}: config.json names a model with scores, but the checkpoint has no {_SCORE}weight")
    if config.tie_word_embeddings and _has_own_head(tensors):
        config = replace(config, tie_word_embeddings=False)
        notes.append(
            f"{folder}: config.json says tie_word_embeddings, but the checkpoint has an lm_head of its own; it is used"
        )
    headless = not config.tie_word_embeddings and bare and not any(name.startswith("lm_head.") for name in tensors)
    if headless:
        config = replace(config, tie_word_embeddings=True)  # no parameter of its own
    heads = [name for name in tensors if name.startswith(_VALUE_HEADS)]
    if heads:
        tensors.drop(*heads)
        notes.append(f"{folder}: the value head ({heads[0]}) is left out; it is of a trainer and not of the model")
    present = [name for name in list(tensors) if name.endswith(".bias") and _is_used(name, tensors)]
    head_bias = "lm_head.bias" in present
    if head_bias and (headless or config.tie_word_embeddings):
        raise QwenMLXError(
            f"{folder}: tensor 'lm_head.bias' is not zero, and a head that shares the embedding's matrix has no bias; "
            "take another checkpoint."
        )
    modules = {name.split(".")[-2]: name for name in present}
    mlp = modules.keys() & {"gate_proj", "up_proj", "down_proj", "gate_up_proj"}
    added = [modules[name] for name in sorted(mlp) if not config.mlp_bias]
    added += [modules["o_proj"]] if "o_proj" in modules and not config.o_proj_bias else []
    added += ["lm_head.bias"] if head_bias and not config.lm_head_bias else []
    if added:
        config = replace(
            config,
            mlp_bias=config.mlp_bias or bool(mlp),
            o_proj_bias=config.o_proj_bias or "o_proj" in modules,
            lm_head_bias=config.lm_head_bias or head_bias,
        )
        notes.append(f"{folder}: the checkpoint has biases that a Qwen2 lacks, such as {added[0]!r}; they are added")
    missing = missing_biases(config, tensors)
    if missing:
        notes.append(f"{folder}: {len(missing)} biases are missing, such as {missing[0]!r}; they are taken as zero")
    return config, notes, headless


def within_a_chunk(where: Path, config: ModelConfig, dual: Any = None) -> tuple[ModelConfig, tuple[str, ...]]:
    """The configuration with the context that needs no dual chunk attention, or that rope scaling gives it, and a
    sentence where the file says another. dual: config.json's dual_chunk_attention_config; a GGUF has none, and is known
    by its context, unless it has rope scaling.

    Raises QwenMLXError for a dual chunk attention without its sizes.
    """
    if dual is None and (config.max_position_embeddings != ONE_MILLION or config.rope_scaling is not None):
        return config, ()
    chunk = CHUNK if dual is None else dual.get("chunk_size") if isinstance(dual, dict) else None
    if type(chunk) is not int or chunk < 1:
        raise QwenMLXError(
            f"{where}: dual_chunk_attention_config is {dual!r:.80}, expected an object with a 'chunk_size'; download "
            "the folder again."
        )
    if config.context_length <= chunk:
        return config, ()
    cut = replace(config, max_position_embeddings=min(chunk, config.max_position_embeddings))
    if config.rope_scaling is None:
        said = (
            f"the context is {chunk} tokens and not {config.max_position_embeddings}: beyond that the model needs dual "
            "chunk attention, which is not done here"
        )
    else:
        said = (
            f"the context is {cut.context_length} tokens, by {config.rope_scaling.type} rope scaling alone, as in "
            f"transformers: dual chunk attention, which the model has beyond {chunk}, is not done here"
        )
    return cut, (f"{where}: {said}",)


def missing_biases(config: ModelConfig, names: Tensors | Iterable[str]) -> list[str]:
    """The biases of the model that are not among `names`, alone or in a fused parameter. Those of q, k and v count
    where all are missing: a file that has some of them is damaged."""
    shapes, have = config.parameter_shapes(), set(names)

    def is_there(name: str) -> bool:
        fused = fused_part(name, shapes)
        return name in have or (fused is not None and fused[0] in have)

    biases = [name for name in shapes if name.endswith(("_proj.bias", "lm_head.bias"))]
    own = [name for name in biases if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    some = any(map(is_there, own))
    return [name for name in biases if not is_there(name) and not (some and name in own)]


def _own_code(folder: Path) -> list[str]:
    """A sentence where config.json names code in the folder that may compute something else than a Qwen2; the classes
    that are known here do not."""
    classes = read_json(folder / "config.json").get("auto_map")
    names = [str(name) for key, name in classes.items() if "Model" in key] if isinstance(classes, dict) else []
    other = sorted(name for name in names if not name.endswith(_KNOWN_CODE))
    if not other:
        return []
    return [
        f"{folder}: config.json names code of its own ({other[0]:.80}), which is not run: the model is read as a Qwen2"
    ]


def _with_rows(folder: Path, config: ModelConfig, tensors: Tensors, notes: list[str]) -> ModelConfig:
    """The configuration with as many tokens as the embedding has rows, where these are more."""
    embedding = tensors.get(EMBEDDING)
    rows = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else 0
    if rows <= config.vocab_size:
        return config
    notes.append(f"{folder}: config.json says vocab_size {config.vocab_size}, but the embedding has {rows} rows")
    return replace(config, vocab_size=rows)


def _move_lone_head(folder: Path, config: ModelConfig, tensors: Tensors, notes: list[str]) -> None:
    """Takes the head of a tied model for its embedding where the file has no other, as transformers does."""
    if config.tie_word_embeddings and HEAD in tensors and not any(name.startswith(_EMBEDDING) for name in tensors):
        for name in [name for name in tensors if name.startswith("lm_head.") and name != "lm_head.bias"]:
            tensors.rename(name, _EMBEDDING + name.removeprefix("lm_head."))
        notes.append(f"{folder}: the checkpoint has no embedding; its lm_head, which is tied to it, stands for both")


def _choose_head(
    folder: Path, config: ModelConfig, tensors: Tensors, bare: bool, scores: list[str], notes: list[str]
) -> ModelConfig:
    """The configuration without the head that is left out, with a word: the language head of a model with scores, or
    the classification head of one for text. config.json's architectures say which it is.

    Raises QwenMLXError for a model for text that only has a classification head.
    """
    said = f"config.json's architectures are {shortened(repr(_architectures(folder)), 80)}"
    language = [name for name in tensors if name.startswith("lm_head.")]
    if bare:
        if language:
            tensors.drop(*language)
            notes.append(f"{folder}: the language head ({language[0]}) is left out, because {said}")
        return replace(config, tie_word_embeddings=True)  # no parameter of its own
    if not language and not config.tie_word_embeddings:
        raise QwenMLXError(
            f"{folder}: has a classification head ({scores[0]}) and no lm_head, but {said}; write "
            "Qwen2ForSequenceClassification there."
        )
    tensors.drop(*scores)
    notes.append(
        f"{folder}: the classification head ({scores[0]}) is left out, because {said}; for its scores write "
        "Qwen2ForSequenceClassification there"
    )
    return config


def _architectures(folder: Path) -> Any:
    return read_json(folder / "config.json").get("architectures")


def _has_own_head(tensors: Tensors) -> bool:
    """True if the head differs from the embedding. A second copy of that matrix is taken: some writers store it."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None:
        return any(f"lm_head.{end}" in tensors for end in ("qweight", "weight_packed"))
    ends = [name.removeprefix("lm_head.") for name in tensors if name.startswith("lm_head.")]
    pairs = [(tensors.get(f"lm_head.{end}"), tensors.get(f"model.embed_tokens.{end}")) for end in ends if end != "bias"]
    if embedding is None or not all(_are_equal(*pair) for pair in pairs):
        return True
    tensors.drop(*(f"lm_head.{end}" for end in ends if end != "bias"))
    return False


def _are_equal(one: StoredTensor | None, other: StoredTensor | None) -> bool:
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = 1 << 24
    starts = range(0, one.nbytes, step)
    return all(np.array_equal(one.read(i, i + step), other.read(i, i + step)) for i in starts)


def _is_used(name: str, tensors: Tensors) -> bool:
    """True for a bias that is not zero; one that is zero and that no Qwen2 has is taken (GPTQ's tools write such)."""
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype not in ("F16", "BF16", "F32", "F64"):
        return True
    bits = tensor.read().view({"F32": np.uint32, "F64": np.uint64}.get(tensor.dtype, np.uint16))
    if (bits << bits.dtype.type(1)).any():
        return True
    if name.split(".")[-2] in ("o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "lm_head"):
        tensors.drop(name)
    return False
