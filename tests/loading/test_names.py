"""Names of models as people copy them, and files that belong to a model but are none."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_mlx import GGUFError, QwenMLXError
from qwen_mlx.gguf.reader import GGUFFile
from qwen_mlx.loading.checkpoint import open_checkpoint
from qwen_mlx.loading.hub.names import _choose, _gguf_models, hub_id
from tests.helpers.cases import each
from tests.helpers.gguf_bytes import build, field, tensor, text

REPO = "Qwen/Qwen2.5-7B-Instruct-GGUF"
FILE = "qwen2.5-7b-instruct-q4_k_m.gguf"


@each(
    ("name", "meant"),
    [
        (REPO, (REPO, None)),
        (f"{REPO}:Q4_K_M", (REPO, "Q4_K_M")),
        (f"{REPO}:{FILE}", (REPO, FILE)),
        (f"{REPO}/{FILE}", None),
        (f"hf.co/{REPO}/sub/{FILE}", (REPO, f"sub/{FILE}")),
        (f"hf.co/{REPO}:Q4_K_M", (REPO, "Q4_K_M")),
        (f"hf.co/{REPO}", (REPO, None)),
        (f"huggingface.co/{REPO}", (REPO, None)),
        (f"hf://{REPO}/{FILE}", (REPO, FILE)),
        (f"https://huggingface.co/{REPO}", (REPO, None)),
        (f"https://huggingface.co/{REPO}/", (REPO, None)),
        (f"http://www.huggingface.co/{REPO}?show_file_info={FILE}", (REPO, None)),
        (f"https://hf.co/{REPO}:q8_0", (REPO, "q8_0")),
        (f"https://huggingface.co/{REPO}/tree/main", (REPO, None)),
        (f"https://huggingface.co/{REPO}/tree/main/sub", (REPO, None)),
        (f"https://huggingface.co/{REPO}/blob/main/{FILE}", (REPO, FILE)),
        (f"https://huggingface.co/{REPO}/resolve/main/{FILE}?download=true", (REPO, FILE)),
        (f"https://huggingface.co/{REPO}/resolve/main/model-00001-of-00002.safetensors", (REPO, None)),
        (f"HTTPS://HuggingFace.co/{REPO}", (REPO, None)),
        (f"https://huggingface.co/{REPO}.git", (REPO, None)),
        (f"hf://{REPO}@main/{FILE}", (REPO, FILE)),
        (f"{REPO}@main:q8_0", (REPO, "q8_0")),
        (f"https://huggingface.co/{REPO}/resolve/main/{FILE.replace('-', '%2D')}", (REPO, FILE)),
        ("model.gguf", None),
        ("folder", None),
        ("folder/model.gguf", None),
        ("./folder/model", None),
        ("/absolute/path", None),
        ("~/models/x", None),
        ("a/b/c", None),
        ("", None),
    ],
)
def test_a_name_of_the_hub(name: str, meant):
    assert hub_id(name) == meant


@each(
    ("name", "words"),
    [
        ("https://ollama.com/library/qwen2.5", "huggingface.co"),
        ("ftp://huggingface.co/a/b", "huggingface.co"),
        ("s3://bucket/a", "only models of huggingface.co"),
        ("a/b@v2", "revision v2; only main is fetched: give a/b"),
        ("hf.co/a/b:", "no model's address"),
        (f"https://huggingface.co/{REPO}/tree/v2", "revision v2"),
        (f"https://huggingface.co/{REPO}/discussions/3", "no model's address"),
        ("https://huggingface.co/datasets/a/b", "no model's address"),
    ],
)
def test_an_address_that_is_no_model_says_so(name: str, words: str):
    with pytest.raises(QwenMLXError, match=words):
        hub_id(name)


@given(st.text(st.sampled_from("ab/:.?#-_~\\ hfco") | st.characters(), max_size=30))
def test_any_text_is_a_name_or_a_sentence(name: str):
    try:
        meant = hub_id(name)
    except QwenMLXError:
        return
    assert meant is None or meant[0].count("/") == 1


def test_files_beside_a_model_are_not_chosen():
    files = [
        FILE,
        "mmproj-F16.gguf",
        "Qwen2.5-7B-Instruct-imatrix.gguf",
        "imatrix.gguf",
        "Qwen2.5-7B-Instruct-mmproj-f16.gguf",
    ]
    assert list(_gguf_models(REPO, files)) == ["q4_k_m"]


@each("choice", ["q4_k_m", "Q4_K", "q8_0", "k_m", "a-q4_k_m"])
def test_a_choice_is_a_name_or_the_end_of_one_name_alone(choice: str):
    """Of any of these names."""
    every, lower = ["q4_k_m", "a-q4_k_m", "b-q4_k_m", "q4_k", "b.Q8_0", "im-q4_k", "Q8_0"], choice.lower()
    for names in itertools.chain.from_iterable(itertools.combinations(every, n) for n in range(len(every) + 1)):
        exact = [name for name in names if name.lower() == lower]
        ends = [name for name in names if name.lower().endswith((f"-{lower}", f".{lower}"))]
        for loose in (False, True):
            expected = exact or (ends if loose and len(ends) == 1 else [])
            groups = {name: [f"{name}.gguf"] for name in names}
            assert _choose(groups, choice, loose=loose) == ([f"{expected[0]}.gguf"] if expected else None), names


def write(path: Path, fields: dict[str, str], tensors: dict[str, int] | None = None) -> Path:
    """A GGUF of text fields, and of tensors of 32 x 32 with type ids."""
    entries = [tensor(name, [32, 32], kind, 4096 * i) for i, (name, kind) in enumerate((tensors or {}).items())]
    values = [field(name, 8, text(value)) for name, value in fields.items()]
    path.write_bytes(build(values, entries, bytes(4096 * len(entries))))
    return path


@each(
    ("fields", "tensors", "words"),
    [
        ({"general.type": "adapter", "general.architecture": "qwen2"}, {}, "LoRA adapter.*merge"),
        ({"general.architecture": "qwen2"}, {"blk.0.attn_q.weight.lora_a": 0}, "LoRA adapter"),
        ({"general.type": "imatrix"}, {}, "importance matrix"),
        ({"general.architecture": "x"}, {"blk.0.attn_q.weight.in_sum2": 0}, "importance matrix"),
        ({"general.type": "mmproj", "general.architecture": "clip"}, {}, "image encoder"),
        ({"general.architecture": "clip"}, {}, "image encoder"),
        ({"general.architecture": "controlvector"}, {"direction.1": 0}, "control vector.*made for"),
        ({"general.type": "vocab", "general.architecture": "qwen2"}, {}, "vocabulary without weights"),
        ({"general.type": "model", "general.architecture": "llama"}, {}, "'llama'"),
        ({"general.architecture": "qwen2"}, {"blk.0.attn_q.weight": 31}, "Q4_0_4_4.*no longer"),
        ({"general.architecture": "qwen2"}, {"blk.0.attn_q.weight": 38}, "IQ4_NL_8_8"),
        (
            {"general.architecture": "qwen2"},
            {"blk.0.attn_q.weight": 139},
            "id 139, .*ik_llama.cpp",
        ),
    ],
)
def test_a_gguf_of_another_kind_says_what_it_is(tmp_path: Path, fields, tensors, words: str):
    with pytest.raises(GGUFError, match=words):
        open_checkpoint(write(tmp_path / "m.gguf", fields, tensors))


def test_the_vocabulary_of_llama_cpp_is_known_by_having_no_tensors(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "qwen2")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match="vocabulary without weights"):
        open_checkpoint(tmp_path / "v.gguf")


@each(
    ("name", "words"),
    [
        ("m.gguf.part1of2", r"piece of m\.gguf.*cat"),
        ("m.gguf-split-a", r"piece of m\.gguf"),
        ("m.gguf.001", r"piece of m\.gguf"),
        ("pytorch_model.bin", "PyTorch"),
        ("model.safetensors", "give the folder"),
        ("model.safetensors.index.json", "give the folder"),
        ("config.json", "give the folder"),
        ("model.onnx", "the format of ONNX"),
    ],
)
def test_a_file_that_is_no_model_says_what_it_is(tmp_path: Path, name: str, words: str):
    (tmp_path / name).write_bytes(b"GGUF" + struct.pack("<I", 3))
    with pytest.raises(QwenMLXError, match=words):
        open_checkpoint(tmp_path / name)


@each(
    ("files", "words"),
    [
        (
            {"adapter_config.json": {"base_model_name_or_path": "Qwen/Qwen2.5-7B"}},
            r"LoRA adapter of Qwen/Qwen2\.5-7B.*merge",
        ),
        ({"adapter_config.json": {}}, "LoRA adapter, which"),
        ({"config.json": {}, "pytorch_model.bin": {}}, r"pytorch_model\.bin and no safetensors"),
        ({"config.json": {}, "model.onnx": {}}, r"model\.onnx and no safetensors"),
        ({"q4.gguf": {}}, r"q4\.gguf"),
        ({"adapters.safetensors": {}}, "LoRA adapter, which"),
        ({"snapshots/1a/config.json": {}}, r"give the folder in it that has one: .*snapshots.1a\."),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_is(tmp_path: Path, files, words: str):
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(QwenMLXError, match=words):
        open_checkpoint(tmp_path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11\n"


@each(
    ("name", "data", "words"),
    [
        ("m.gguf", LFS, "git lfs pull"),
        ("m.gguf", b"<!DOCTYPE html>\n<html>", "a web page: download"),
        ("m.gguf", b"<html lang=en>", "a web page: download"),
        ("m.gguf", b"tjgg\3\0\0\0", "GGML file, from before GGUF"),
        ("m.ggml", b"algg\1\0\0\0", "LoRA adapter from before GGUF"),
        ("m.zip", b"PK\3\4", "archive or a pickle"),
        ("m.gguf.gz", b"\x1f\x8b\x08", "gzip: unpack"),
        ("m.gguf", b"\x28\xb5\x2f\xfd\x04", "zstd: unpack"),
        ("m.gguf", b"\xfd7zXZ\0\0", "xz: unpack"),
        ("m.gguf", b"BZh91AY", "bzip2: unpack"),
        ("m.gguf", b"a" * 257 + b"ustar\0", "tar: unpack"),
        ("m.gguf", b"\x80\x02}q\x00", "a pickle of PyTorch's"),
        ("m.gguf", b"\x89HDF\r\n", "HDF5"),
        ("Modelfile", b"FROM ./x.gguf", "a Modelfile of Ollama's"),
        ("m.gguf", b"\xef\xbb\xbf\n <!doctype html>", "a web page: download"),
        ("m.gguf", b"Invalid username or password.", "a server's refusal: log in"),
        ("m.gguf", b"Entry not found", "a server's refusal: log in"),
        ("m.gguf", b'{"error": "Repository not found"}', "is JSON text and not a model's weights"),
        ("m.gguf", (60).to_bytes(8, "little") + b'{"__metadata__"', "is a file of safetensors; name it"),
        ("model.safetensors", LFS, "git lfs pull"),
        ("Qwen2.5-7B.imatrix.dat", b"\xe1\0\0\0", "importance matrix"),
    ],
)
def test_a_file_in_a_model_s_place_says_what_it_is(tmp_path: Path, name: str, data: bytes, words: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(QwenMLXError, match=words) as error:
        open_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@each("name", ["model-00002-of-00002.safetensors", "tokenizer.json", "config.json"])
def test_a_clone_without_git_lfs_says_so(tmp_path: Path, name: str):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(QwenMLXError, match=rf"{name}: is a pointer .*git lfs pull"):
        open_checkpoint(tmp_path)


def test_a_gguf_is_still_read(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GGUFFile(tmp_path / "m.gguf").tensors["blk.0.attn_q.weight"].shape == (4, 32)
