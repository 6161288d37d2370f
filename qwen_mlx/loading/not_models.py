"""Files and folders that belong to a model but are none: what each is, and what to do with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import GGUFError, QwenMLXError
from ..gguf.reader import GGUFFile
from ..text.files import read_json
from .safetensors_files import StoredTensor

PIECE = re.compile(r"(.*\.gguf)[.-](part-?\d+(of\d+)?|part-?[a-z]+|split-?[a-z]+|\d+|[a-z]{2})", re.IGNORECASE)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_FORMATS = {".onnx": "ONNX", ".mlmodel": "Core ML", ".tflite": "TensorFlow Lite", ".h5": "Keras"}
OTHER_FORMATS |= {".msgpack": "Flax", ".llamafile": "llamafile"}
_WEB_PAGE = "a web page: download the file itself, whose address has /resolve/ in it"
_REFUSAL = "a server's refusal: log in (hf auth login) or correct the name, and download the file again"
_PICKLE = "a pickle of PyTorch's, which can hold programs: give safetensors or a .gguf file"
# Beginnings of files in the place of a model's, after blanks: what such a file is, and what to do.
BEGINNINGS = {
    b"version https://git-lfs": "a pointer that Git LFS leaves in a file's place: run `git lfs pull` in its folder",
    b"<!doctype": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"FROM ": "a Modelfile of Ollama's: give the .gguf file or the model that it names",
    b"<?xml": _REFUSAL,
    b"Entry not found": _REFUSAL,
    b"Invalid username": _REFUSAL,
    b"Access to model": _REFUSAL,
    b"Repository not found": _REFUSAL,
    b"PK\x03\x04": "an archive or a pickle of PyTorch's: give safetensors or a .gguf file",
    **{bytes([0x80, version]): _PICKLE for version in (2, 3, 4, 5)},
    b"\x1f\x8b": "packed by gzip: unpack it and give what it holds",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it and give what it holds",
    b"\xfd7zXZ\0": "packed by xz: unpack it and give what it holds",
    b"BZh": "packed by bzip2: unpack it and give what it holds",
    b"7z\xbc\xaf\x27\x1c": "packed by 7-Zip: unpack it and give what it holds",
    b"Rar!": "packed by RAR: unpack it and give what it holds",
    b"\x89HDF": "a model of Keras's (HDF5): give safetensors or a .gguf file",
    b"lmgg": "a GGML file, from before GGUF: take the model as GGUF",
    b"fmgg": "a GGML file, from before GGUF: take the model as GGUF",
    b"tjgg": "a GGML file, from before GGUF: take the model as GGUF",
    b"algg": "a LoRA adapter from before GGUF: merge it into its base with the llama.cpp of its time",
}
_ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors"}
IMATRIX = re.compile(r".*imatrix.*\.dat|.*\.imatrix", re.IGNORECASE)
# GGUF's general.type: what such a file holds, and what to do.
KINDS = {
    "adapter": "a LoRA adapter, which changes another model: give its base as the model and this file as --adapter, or "
    "merge them (qwen-mlx fuse)",
    "imatrix": "an importance matrix, which guides a quantization: give the model that was quantized with it",
    "mmproj": "the image encoder of a model that sees: give the language model's own file",
    "controlvector": "a control vector, which steers another model: give the model that it was made for",
    "vocab": "a vocabulary without weights: give a file of the whole model",
}


def refuse_path(path: Path) -> None:
    """Raises QwenMLXError for a file that is a piece of a model or another program's, or a folder that holds an adapter
    or other formats alone."""
    if path.is_dir():
        _refuse_folder(path)
        return
    _refuse_beginning(path)
    piece = PIECE.fullmatch(path.name)
    if piece:
        raise QwenMLXError(
            f"{path}: is a piece of {piece[1]}; join all pieces in the order of their names (cat PIECE1 PIECE2 ... > "
            f"{piece[1]}) and give that file."
        )
    if path.suffix.lower() in PICKLES:
        raise QwenMLXError(
            f"{path}: is a pickle of PyTorch's, which can hold programs; give safetensors or a .gguf file."
        )
    if IMATRIX.fullmatch(path.name):
        raise QwenMLXError(f"{path}: holds {KINDS['imatrix']}.")
    if path.suffix.lower() in OTHER_FORMATS:
        of = OTHER_FORMATS[path.suffix.lower()]
        raise QwenMLXError(f"{path}: is a model in the format of {of}; give safetensors or a .gguf file.")
    if path.suffix.lower() in (".safetensors", ".json", ".jinja"):
        raise QwenMLXError(f"{path}: is a part of a folder's model; give the folder, {path.absolute().parent}.")


def _refuse_beginning(path: Path) -> None:
    """Raises QwenMLXError for a file that begins as one that only stands in a model's place."""
    if not path.is_file():
        return
    try:
        with open(path, "rb") as file:
            beginning = file.read(512)
    except OSError:
        return  # what reads the file says so
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, what in BEGINNINGS.items():
        if text.startswith(start.lower()):
            raise QwenMLXError(f"{path}: is {what}.")
    if path.suffix == ".gguf":
        _refuse_other_format(path, beginning, text)


def _refuse_other_format(path: Path, beginning: bytes, text: bytes) -> None:
    """Raises QwenMLXError for a file of a known format that is named .gguf."""
    if beginning[8:9] == b"{" and beginning[5:8] == b"\0\0\0":  # after the header's length, below 1 TB
        raise QwenMLXError(
            f"{path}: is a file of safetensors; name it .safetensors, and give the folder with it and its config.json."
        )
    if beginning[257:262] == b"ustar":
        raise QwenMLXError(f"{path}: is packed by tar: unpack it and give what it holds.")
    if text.startswith(b"{"):
        raise QwenMLXError(f"{path}: is JSON text and not a model's weights; download the file again.")


def _refuse_folder(folder: Path) -> None:
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if names & _ADAPTER_FILES and "config.json" not in names:
        has_settings = "adapter_config.json" in names
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") if has_settings else None
        of = f" of {base}" if isinstance(base, str) and base else ""
        raise QwenMLXError(
            f"{folder}: holds a LoRA adapter{of}, which changes another model; give that model as the model and this "
            "folder as --adapter, or merge them (qwen-mlx fuse)."
        )
    for name in sorted(names):
        if name.endswith((".safetensors", ".json")):
            _refuse_beginning(folder / name)
    if "config.json" in names or "model_index.json" in names:
        weights = [name for name in names if name.endswith(".safetensors")]
        others = sorted(name for name in names if Path(name).suffix.lower() in (*PICKLES, *OTHER_FORMATS))
        if others and not weights:
            raise QwenMLXError(f"{folder}: holds {others[0]} and no safetensors; download the model's safetensors.")
        return
    files = sorted(name for name in names if name.lower().endswith(".gguf"))
    if files:
        raise QwenMLXError(f"{folder}: has no config.json; give one of its files, such as {folder / files[0]}.")
    inner = sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")])
    if inner:
        raise QwenMLXError(f"{folder}: has no config.json; give the folder in it that has one: {inner[0].parent}.")


def refuse_adapter(tensors: Mapping[str, StoredTensor]) -> None:
    """Raises QwenMLXError for a folder's tensors of which some are a LoRA adapter's, not merged into the model's."""
    wrapped = re.compile(r"\.lora_[abAB]\b|\.(base_layer|original_module|modules_to_save)\.")
    name = next((name for name in tensors if wrapped.search(name)), None)
    if name is not None:
        raise QwenMLXError(
            f"{tensors[name].file}: tensor {name!r} is of a LoRA adapter; merge it into its base (peft's "
            "merge_and_unload, mlx_lm.fuse) and give the merged folder."
        )


def refuse_gguf(file: GGUFFile) -> None:
    """Raises GGUFError for a GGUF of another kind than a model's, by its metadata, or by its tensors in old files."""
    metadata = file.metadata
    kind: Any = metadata.get("general.type")
    architecture = metadata.get("general.architecture")
    if architecture in ("clip", "controlvector"):
        kind = {"clip": "mmproj"}.get(architecture, architecture)
    elif any(name.endswith((".lora_a", ".lora_b")) for name in file.tensors):
        kind = "adapter"
    elif any(name.endswith((".in_sum2", ".counts")) for name in file.tensors):
        kind = "imatrix"
    elif not file.tensors and "tokenizer.ggml.tokens" in metadata:
        kind = "vocab"
    if isinstance(kind, str) and kind in KINDS:
        raise GGUFError(f"{file.path}: holds {KINDS[kind]}.")
