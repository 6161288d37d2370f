"""load_encoder(): from a name to a model that makes vectors or scores of texts.

Pooling, normalisation, prompts and the longest input are what sentence-transformers' files in the folder say.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ..backend import mx, nn
from ..encoding.encoder import Encode, Encoder, EncoderSettings
from ..errors import GGUFError, QwenMLXError, refuses_wrong_arguments, shortened
from ..gguf.reader import GGUFFile
from ..model.layers import Linear
from ..text.files import read_json
from ..text.limits import PIECE, is_panic, pieces_for
from ..text.tokenizer import Tokenizer
from ..text.vocabulary import tokenizer_json
from . import hub
from .checkpoint import Checkpoint, open_checkpoint
from .hub.client import say
from .load import UNFORESEEN, fill, target_dtype
from .sentence_transformers import sentence_transformers

_TOKEN_HEADS = ("ForTokenClassification", "ForProcessRewardModel")  # of architectures whose head is for each token
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
        settings, dense, arrays = sentence_transformers(path)
        settings = _with_labels(settings, path)
    else:
        settings, dense, arrays = _gguf_settings(GGUFFile(path)), [], {}
    encode = _encode(path, checkpoint.tokenizer, settings.max_length, config.context_length)
    score = _score_layers(checkpoint, config.hidden_size)
    outputs = score[-1].weight.shape[0] if score else 0
    if outputs != len(settings.labels):
        if outputs and settings.labels:
            say(f"{path}: has names for {len(settings.labels)} of the head's {outputs} labels; none is used")
        settings = replace(settings, labels=())
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
    """The names of the scores, what they are of, and the padding token, as config.json has them."""
    config = read_json(folder / "config.json")
    names, pad = config.get("id2label") or {}, config.get("pad_token_id")
    try:
        by_number = {int(key): str(name) for key, name in names.items()}
    except (AttributeError, TypeError, ValueError):
        by_number = None
    if by_number is None or sorted(by_number) != list(range(len(names))):
        raise QwenMLXError(
            f"{folder / 'config.json'}: id2label is {names!r:.80}, expected names by number, from 0 on; download the "
            "folder again."
        )
    labels = tuple(by_number[i] for i in range(len(names)))
    kinds = config.get("architectures")
    tokens = any(str(kind).endswith(_TOKEN_HEADS) for kind in kinds) if isinstance(kinds, list) else False
    if pad is not None and type(pad) is not int:
        raise QwenMLXError(f"{folder / 'config.json'}: pad_token_id is {pad!r:.80}, expected a token's id.")
    return replace(settings, labels=labels, pad_token_id=pad, scores_tokens=tokens)


def _encode(path: Path, tokenizer: Tokenizer, max_length: int | None, context_length: int) -> Encode:
    """Text to ids: control tokens by name, and what the file puts around a text. Of a folder as transformers does it,
    with what the tokenizer's post-processor adds, for which a text that is too long makes room."""
    most = max_length or context_length
    if not path.is_dir():
        return functools.partial(_encode_gguf, tokenizer, _gguf_separator(GGUFFile(path), tokenizer))
    from tokenizers import Tokenizer as Library

    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
    data = tokenizer_json(path)
    with _library_errors(f"{path / 'tokenizer.json'}: not a tokenizer"):
        library = Library.from_str(json.dumps(data | {"truncation": None, "padding": None}))
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


def _gguf_separator(file: GGUFFile, tokenizer: Tokenizer) -> list[int]:
    """The token that a GGUF puts between the texts of a pair, if it asks for one. Raises GGUFError for another value
    than a token's id."""
    if file.metadata.get("tokenizer.ggml.add_sep_token", False) is not True:
        return []
    token = file.metadata.get("tokenizer.ggml.seperator_token_id")  # as GGUF spells it
    if type(token) is not int or not 0 <= token < tokenizer.vocab_size:
        raise GGUFError(
            f"{file.path}: 'tokenizer.ggml.add_sep_token' is true, but 'tokenizer.ggml.seperator_token_id' is "
            f"{token!r:.80}, expected 0 to {tokenizer.vocab_size - 1}; convert the model again."
        )
    return [token]


def _encode_gguf(tokenizer: Tokenizer, separator: list[int], text: str, pair: str | None) -> list[int]:
    """The ids of a text with what the file puts around it, once. A pair is what llama.cpp's server makes of a query and
    a document: the file's template `rerank` with both put in, else one after the other, each with the end token that
    the file adds, and the separator between."""
    template = tokenizer.chat_templates.get("rerank")
    if pair is not None and template is not None:
        texts = {"{query}": text, "{document}": pair}
        filled = re.sub(r"\{query\}|\{document\}", lambda match: texts[match[0]], template)
        return tokenizer.encode(filled, allow_special=True)
    suffix = list(tokenizer.suffix_ids)

    def ended(ids: list[int]) -> list[int]:
        return ids if ids[len(ids) - len(suffix) :] == suffix else ids + suffix

    first = ended(tokenizer.with_prefix(tokenizer.encode(text, allow_special=True)))
    return first if pair is None else first + separator + ended(tokenizer.encode(pair, allow_special=True))
