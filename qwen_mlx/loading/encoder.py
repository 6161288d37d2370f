"""load_encoder(): from a name to a model that makes vectors or scores of texts.

Pooling, normalisation, prompts and the longest input are what sentence-transformers' files in the folder say.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..backend import mx, nn
from ..encoding.encoder import Dense, Encode, Encoder, EncoderSettings
from ..errors import GGUFError, QwenMLXError, refuses_wrong_arguments, shortened
from ..gguf.reader import GGUFFile
from ..model.layers import Linear
from ..text.files import LARGEST_JSON, read_json, read_text
from ..text.limits import PIECE, is_panic, pieces_for
from ..text.tokenizer import Tokenizer
from . import hub
from .checkpoint import Checkpoint, open_checkpoint
from .folder import plain_parameters
from .hub.client import say
from .load import UNFORESEEN, fill, target_dtype
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
# llama.cpp's llama_pooling_type: none (its default), mean, cls, last, and rank, of rerankers.
_GGUF_POOLINGS = {0: "last", 1: "mean", 2: "first", 3: "last", 4: "last"}


@refuses_wrong_arguments
def load_encoder(
    model: str | os.PathLike[str], *, dtype: str | mx.Dtype | None = None, quantized: bool | None = None
) -> Encoder:
    """Loads an embedding model, a classifier, a reranker or a reward model of the Qwen2 architecture.

    model, dtype, quantized: as for load(). A language model is one too: its last token's hidden state, normalised.
    Raises QwenMLXError (GGUFError for a GGUF) naming the file, the field or tensor, its fault and what was expected.
    """
    path = hub.resolve(model)
    target = target_dtype(dtype)
    packed = mx.default_device() != mx.cpu if quantized is None else quantized
    try:
        return _load(path, target, packed)
    except QwenMLXError:
        raise
    except UNFORESEEN as error:
        raise QwenMLXError(
            f"{path}: cannot be loaded; a file of it is damaged or holds nonsense ({error!r})."
        ) from error


def _load(path: Path, dtype: mx.Dtype, packed: bool) -> Encoder:
    checkpoint = open_checkpoint(path)
    for note in checkpoint.notes:
        say(note)
    config = replace(checkpoint.config, tie_word_embeddings=True)  # the language head is left out
    if path.is_dir():
        settings, dense, arrays = _sentence_transformers(path)
        settings = _with_labels(settings, path)
    else:
        settings, dense, arrays = _gguf_settings(GGUFFile(path)), [], {}
    encode = _encode(path, checkpoint.tokenizer, settings.max_length, config.context_length)
    score = _score_layers(checkpoint, config.hidden_size)
    width = config.hidden_size
    for projection in dense:
        size, expected = projection.linear.weight.shape
        if expected != width:
            raise QwenMLXError(f"{path}: a projection has in_features {expected}, expected {width}; download it again.")
        width = size
    encoder = Encoder(config, settings, checkpoint.tokenizer, encode, score, dense)
    parameters = {n: p for n, p in checkpoint.parameters.items() if not n.startswith("lm_head.")}
    fill(encoder, parameters | checkpoint.score | arrays, dtype=dtype, packed=packed)
    for file in checkpoint.files:
        file.check_unchanged()
    encoder.eval()
    return encoder


def _score_layers(checkpoint: Checkpoint, hidden_size: int) -> list[nn.Module]:
    """The layers of a classification or reward head: one projection, or several with a ReLU between.

    Raises QwenMLXError for parameters that are not of such a head.
    """
    score = checkpoint.score
    names = {name.rpartition(".")[0] for name in score}
    expected = {"score"} if names == {"score"} else {f"score.{2 * i}" for i in range(len(names))}
    layers: list[nn.Module] = []
    width = hidden_size
    for name in sorted(expected if names else ()):
        weight, bias = score.get(f"{name}.weight"), score.get(f"{name}.bias")
        sizes = None if weight is None else weight.shape
        fits = sizes is not None and len(sizes) == 2 and sizes[1] == width
        if sizes is None or not fits or (bias is not None and bias.shape != sizes[:1]):
            raise QwenMLXError(
                f"{checkpoint.path}: the head's {name!r} has shape {sizes}, expected (outputs, {width}) and a bias of "
                "as many; download the folder again."
            )
        layers += [nn.ReLU()] if layers else []
        layers.append(Linear(width, sizes[0], bias=bias is not None))
        width = sizes[0]
    return layers


def _gguf_settings(file: GGUFFile) -> EncoderSettings:
    """The pooling and the names of the scores as a GGUF's metadata says; vectors are normalised, as llama.cpp's are.
    Raises GGUFError for another pooling."""
    kind = file.metadata.get("qwen2.pooling_type", 0)
    if type(kind) is not int or kind not in _GGUF_POOLINGS:
        expected = ", ".join(f"{number} ({name})" for number, name in _GGUF_POOLINGS.items())
        raise GGUFError(f"{file.path}: 'qwen2.pooling_type' is {kind!r}, expected {expected}; convert the model again.")
    labels = file.metadata.get("qwen2.classifier.output_labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise GGUFError(
            f"{file.path}: 'qwen2.classifier.output_labels' is {labels!r:.80}, expected a list of texts; convert the "
            "model again."
        )
    return EncoderSettings(pooling=_GGUF_POOLINGS[kind], labels=tuple(labels))


def _with_labels(settings: EncoderSettings, folder: Path) -> EncoderSettings:
    """The names of the scores, and the padding token, as config.json has them."""
    config = read_json(folder / "config.json")
    names, pad = config.get("id2label"), config.get("pad_token_id")
    labels = tuple(str(name) for name in names.values()) if isinstance(names, dict) else ()
    return replace(settings, labels=labels, pad_token_id=pad if isinstance(pad, int) else None)


def _encode(path: Path, tokenizer: Tokenizer, max_length: int | None, context_length: int) -> Encode:
    """Text to ids: control tokens by name, and what the file puts around a text. Of a folder as transformers does it,
    with what the tokenizer's post-processor adds, for which a text that is too long makes room."""
    most = max_length or context_length
    if not path.is_dir():
        return functools.partial(_encode_gguf, tokenizer)
    from tokenizers import Tokenizer as Library

    data = read_json(path / "tokenizer.json") | {"truncation": None, "padding": None}
    with _library_errors(f"{path / 'tokenizer.json'}: not a tokenizer"):
        library = Library.from_str(json.dumps(data))
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
    name = settings.get("eos_token")
    name = name.get("content") if isinstance(name, Mapping) else name
    end = tokenizer.special.get(name) if settings.get("add_eos_token") and isinstance(name, str) else None

    def beginning(text: str) -> str:
        """A long text's beginning that has more tokens than `most`: the library needs 500 bytes for a character."""
        count = end = 0
        for piece in pieces_for(library, text) if len(text) > PIECE else ():
            count, end = count + len(tokenizer.encode(piece)), end + len(piece)
            if count > most:
                return text[:end]
        return text

    if max_length is not None and max_length > (end is not None):
        library.enable_truncation(max_length - (end is not None))

    def encode(text: str, pair: str | None) -> list[int]:
        with _library_errors("The tokenizer cannot read the text"):
            ids: list[int] = library.encode(beginning(text), pair and beginning(pair)).ids
        return [*ids, end] if end is not None and ids[-1:] != [end] else ids

    return encode


@contextlib.contextmanager
def _library_errors(sentence: str) -> Iterator[None]:
    """Turns what the tokenizers library raises, bare Exceptions and panics, into a QwenMLXError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise QwenMLXError(f"{sentence} ({shortened(repr(error))}).") from None


def _encode_gguf(tokenizer: Tokenizer, text: str, pair: str | None) -> list[int]:
    """The ids of a text, or of two one after the other, with what the file puts around a text, once."""
    ids = tokenizer.with_prefix(tokenizer.encode(text + (pair or ""), allow_special=True))
    suffix = list(tokenizer.suffix_ids)
    return ids if ids[len(ids) - len(suffix) :] == suffix else ids + suffix


def _sentence_transformers(folder: Path) -> tuple[EncoderSettings, list[Dense], dict[str, Parameter]]:
    """The contents of modules.json and of the files it names: settings, projections, and their parameters."""
    settings = EncoderSettings(**_prompts(folder))
    settings = replace(settings, max_length=_max_length(folder))
    bert = folder / "sentence_bert_config.json"
    modalities = read_json(bert).get("modality_config") if bert.exists() else None
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
            settings = replace(settings, normalize=True)
        elif kind == "Dense":
            projection, own = _dense(where)
            arrays |= own(f"dense.{len(dense)}")
            dense.append(projection)
        elif kind != "Transformer":
            raise QwenMLXError(
                f"{folder / 'modules.json'}: module {module['type']!r} is not known, expected Transformer, Pooling, "
                "Dense or Normalize."
            )
    return settings, dense, arrays


def _max_length(folder: Path) -> int | None:
    """The longest input in tokens; transformers writes 1e30 where there is no limit."""
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        length = read_json(folder / name).get(key) if (folder / name).exists() else None
        if isinstance(length, int) and 0 < length < 10**9:
            return length
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
    own = read_json(path) if path.exists() else {}
    prompts = own.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise QwenMLXError(f"{path}: 'prompts' is {prompts!r:.80}, expected texts by name.")
    default = own.get("default_prompt_name")
    if default is not None and not isinstance(default, str):
        raise QwenMLXError(f"{path}: 'default_prompt_name' is {default!r:.80}, expected a name.")
    return {"prompts": prompts, "default_prompt": default}


def _pooling(path: Path) -> str:
    settings = read_json(path)
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
    settings = read_json(folder / "config.json")
    name = str(settings.get("activation_function", "torch.nn.modules.linear.Identity")).rpartition(".")[2]
    sizes = settings.get("in_features"), settings.get("out_features")
    if settings.get("use_residual"):
        raise QwenMLXError(f"{folder / 'config.json'}: use_residual is true, expected false; it is not known here.")
    if name not in _ACTIVATIONS or not all(isinstance(size, int) and 0 < size < 1 << 20 for size in sizes):
        raise QwenMLXError(
            f"{folder / 'config.json'}: the projection is {sizes} with {name!r}, expected sizes and Identity or Tanh."
        )
    width, size, bias = int(sizes[0] or 0), int(sizes[1] or 0), settings.get("bias", True) is True
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (size, width)} | ({"linear.bias": (size,)} if bias else {})
    tensors = read_tensors(open_files([folder / "model.safetensors"]))
    return Dense(width, size, bias, _ACTIVATIONS[name]), functools.partial(plain_parameters, folder, tensors, shapes)
