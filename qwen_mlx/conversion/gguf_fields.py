"""The metadata of a GGUF that export() writes: a GGUF's own, or a folder's in llama.cpp's names."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GGUFError, QwenMLXError
from ..gguf.reader import GGUFFile
from ..loading.checkpoint import Checkpoint
from ..loading.sampling_defaults import GGUF_NAMES, GGUF_PREFIX
from ..text.files import read_text
from ..text.to_gguf import tokenizer_metadata

LARGEST_CARD = 1 << 20  # bytes of README.md
# Fields of a model card that gguf-py knows and that name a model's origin.
CARD_FIELDS = ("license", "license_name", "license_link", "base_model", "tags", "language", "datasets")
# A file says by these how it was quantized, which a file of another type must not repeat.
OF_ONE_TYPE = ("general.file_type", "general.quantization_version", "general.quantized_by", "quantize.imatrix.")
INT32, ARRAY = 5, 9


@dataclass(frozen=True)
class Fields:
    """Metadata by name, in the order of the file. types: GGUF's numbers for a value's type and for its items', of
    fields for which Python's type does not tell."""

    values: dict[str, Any]
    types: Mapping[str, tuple[int, int | None]]


def own_fields(file: GGUFFile, keep: bool) -> Fields:
    """The metadata of a GGUF for a file of one part: all of it with `keep`, else without what its types were."""
    left_out = ("split.",) if keep else ("split.", *OF_ONE_TYPE)
    values = {name: value for name, value in file.metadata.items() if not name.startswith(left_out)}
    for name in values:
        if file.value_types[name] == (ARRAY, ARRAY):
            raise GGUFError(f"{file.path}: metadata field {name!r} is an array of arrays, which cannot be written.")
    return Fields({name: value for name, value in values.items() if value != []}, file.value_types)


def folder_fields(checkpoint: Checkpoint, source: str | os.PathLike[str]) -> Fields:
    """The metadata for a folder of safetensors: its origin as far as its name and model card tell it, its shape, its
    sampling settings where generation_config.json has them, its tokenizer and its chat templates."""
    try:
        tokenizer = tokenizer_metadata(checkpoint.tokenizer, checkpoint.config.vocab_size)
        shape = checkpoint.config.to_gguf()
    except QwenMLXError as error:
        raise QwenMLXError(f"{checkpoint.path}: {error}") from None
    size = sum(math.prod(parameter.shape) for parameter in checkpoint.parameters.values())
    values = {"general.architecture": "qwen2", "general.type": "model"}
    values |= _origin(checkpoint.path, _model_name(checkpoint.path, source), size)
    return Fields(values | _sampling(checkpoint) | shape | tokenizer, {f"{GGUF_PREFIX}top_k": (INT32, None)})


def add_fields(writer: Any, fields: Fields) -> None:
    """Gives the metadata to a gguf.GGUFWriter."""
    from gguf import GGUFValueType

    by_type = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32", list: "ARRAY"}
    for name, value in fields.values.items():
        if name == "general.alignment":
            writer.add_custom_alignment(value)
            continue
        kind, items = fields.types.get(name, (GGUFValueType[by_type[type(value)]].value, None))
        writer.kv_data[0].pop(name, None)  # the architecture, which every writer has
        writer.add_key_value(name, value, GGUFValueType(kind), None if items is None else GGUFValueType(items))


def _model_name(path: Path, source: str | os.PathLike[str]) -> str:
    """A folder's name, or the repository's of what came from the Hub, in characters that UTF-8 has."""
    local = os.path.exists(os.path.expanduser(source))
    name = Path(os.path.abspath(path)).name if local else Path(re.split("[:?#]", str(source))[0]).name
    return name.encode("utf-8", "replace").decode() or "model"


def _origin(folder: Path, name: str, size: int) -> dict[str, Any]:
    """general.name, .basename, .size_label, .license, .base_model and so on, as gguf-py tells them from a name and a
    model card."""
    from gguf import GGUFWriter
    from gguf.metadata import Metadata
    from gguf.utility import size_label

    for card in (_card(folder), {}):  # a card that gguf-py cannot read says nothing
        writer = GGUFWriter(None, "qwen2")
        try:
            metadata = Metadata.apply_metadata_heuristic(Metadata(), card, {}, Path(name), size)
            metadata.name = metadata.name or name
            metadata.size_label = metadata.size_label or size_label(size, size, 0, 0)
            metadata.set_gguf_meta_model(writer)
            break
        except (AttributeError, LookupError, TypeError, ValueError):
            continue
    return {key: field.value for key, field in writer.kv_data[0].items() if key != "general.architecture"}


def _card(folder: Path) -> dict[str, Any]:
    """The fields of a model card's front matter that are texts or lists of them."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    import yaml  # comes with gguf-py and huggingface_hub

    try:
        match = re.match(r"---\n(.*?)\n---\n", read_text(str(path), largest=LARGEST_CARD), re.DOTALL)
        card = yaml.safe_load(match[1]) if match else {}
    except (QwenMLXError, RecursionError, ValueError, yaml.YAMLError):
        return {}
    values = {name: card[name] for name in CARD_FIELDS if name in card} if isinstance(card, dict) else {}
    return {name: value for name, value in values.items() if all(isinstance(item, str) for item in _as_list(value))}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _sampling(checkpoint: Checkpoint) -> dict[str, Any]:
    """general.sampling.* of a generation_config.json that samples; a model that does not is greedy by no one's word."""
    defaults = checkpoint.defaults
    if defaults.source != "generation_config.json" or defaults.temperature == 0:
        return {}
    values = {key: float(getattr(defaults, name)) for key, name in GGUF_NAMES.items() if "xtc" not in key}
    return {f"{GGUF_PREFIX}{key}": value for key, value in (values | {"top_k": defaults.top_k}).items()}
