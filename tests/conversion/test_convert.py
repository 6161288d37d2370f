"""The converter: exact by value, loaded by the real mlx-lm and transformers, complete or not at all."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from qwen_mlx import load
from qwen_mlx.backend import mx
from qwen_mlx.cli.convert import main
from qwen_mlx.conversion import convert as conversion
from qwen_mlx.conversion.convert import convert
from qwen_mlx.conversion.folder import temporary_prefix
from qwen_mlx.conversion.quantize import affine_codes, affine_range, encode
from qwen_mlx.errors import GGUFError, QwenMLXError
from qwen_mlx.gguf import blocks
from qwen_mlx.gguf.blocks import BLOCK_TYPES
from qwen_mlx.gguf.names import to_hf
from qwen_mlx.gguf.reader import GGUFFile
from qwen_mlx.gguf.unpack import unpack
from qwen_mlx.text.tokenizer import Tokenizer
from reference.lazy import mlx_lm, safetensors_torch, torch, transformers
from reference.small_models import CHATML, END_OF_TEXT, IM_END, TOKENS, RandomModel, hf_model, save_folder, write_gguf
from tests.helpers.blocks import SCALES, assert_same_numbers, gguf_py, random_rows
from tests.helpers.cases import each
from tests.helpers.gguf_bytes import text as gguf_text
from tests.helpers.peers import IDS, distance, tolerance, torch_logits
from tests.helpers.small_gguf import layout, small_fields, small_tensors

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}


def stored_values(folder: Path) -> dict[str, np.ndarray]:
    """Every parameter of a converted folder in float32, by MLX's own reading and dequantization."""
    files = sorted(folder.glob("*.safetensors"))
    weights = {name: array for file in files for name, array in mx.load(str(file)).items()}
    settings = json.loads((folder / "config.json").read_text()).get("quantization", {})
    values = {}
    for name, array in weights.items():
        module = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        if f"{module}.scales" not in weights:
            values[name] = np.array(array.astype(mx.float32))
            continue
        own = settings.get(module, settings)
        scales, biases = weights[f"{module}.scales"], weights.get(f"{module}.biases")
        if own.get("mode", "affine") == "affine":
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        how = {"group_size": own["group_size"], "bits": own["bits"], "mode": own.get("mode", "affine")}
        values[name] = np.array(mx.dequantize(array, scales, biases, **how).astype(mx.float32))
    return values


def finite_rows(kind: blocks.BlockType, rows: int, columns: int, halves: list[int] | None, seed: int) -> np.ndarray:
    raw = random_rows(kind, rows, columns // kind.block_size, halves, seed)
    if kind.name == "MXFP4":
        raw.reshape(-1, kind.type_size)[:, 0] %= 250  # E8M0: 255 is NaN, and 2^127 overflows a sum of squares nowhere
    raw[~np.isfinite(gguf_py(raw, kind)).all(1)] = 0
    return raw


def file_of_type(path: Path, kind: blocks.BlockType, halves: list[int] | None = None) -> dict[str, np.ndarray]:
    """Writes a model of one layer whose matrices are random blocks of `kind`; returns gguf-py's values by HF's name."""
    expected = {}

    def fill(writer, tensors) -> None:
        for seed, (name, (array, _)) in enumerate(tensors.items()):
            expected[to_hf(name)] = array
            if array.ndim == 2:
                raw = finite_rows(kind, *array.shape, halves, seed)
                tensors[name] = (raw, T(kind.type_id))
                expected[to_hf(name)] = gguf_py(raw, kind)

    write_gguf(path, RandomModel(**WIDE), edit=fill)
    return expected


@each("kind", list(BLOCK_TYPES.values()), ids=lambda kind: kind.name)
def test_every_type_is_stored_as_the_table_says_and_exactly(kind: blocks.BlockType, tmp_path: Path):
    extremes = [bits for name, list_ in SCALES.items() if name not in ("infinite", "nan") for bits in list_]
    for halves in (None, extremes):
        expected = file_of_type(tmp_path / "m.gguf", kind, halves)
        if kind.name in ("I8", "I16", "I32", "I64"):
            with pytest.raises(GGUFError, match=f"has type {kind.name}, which holds no weights"):
                convert(tmp_path / "m.gguf", tmp_path / "out")
            continue
        report = convert(tmp_path / "m.gguf", tmp_path / "out", dtype="float32", scales="float32", force=True)
        found = stored_values(tmp_path / "out")
        assert found.keys() == expected.keys()
        for row in report:
            assert_same_numbers(found[row.name], expected[row.name])
            assert row.exact
            if len(row.shape) == 2:
                assert row.source_type == kind.name
                dense = kind.packing.kind == "dense"
                assert row.stored_as.startswith("float32" if dense else str(kind.packing))
                assert dense or kind.packing.group_size == 32


@each("kind", [kind for kind in BLOCK_TYPES.values() if kind.packing.kind == "affine"], ids=lambda kind: kind.name)
def test_auto_takes_the_narrowest_scales_that_are_exact(kind: blocks.BlockType, tmp_path: Path):
    moderate = np.float16(np.random.default_rng(3).standard_normal(512)).view(np.uint16)
    expected = file_of_type(tmp_path / "m.gguf", kind, list(moderate))
    for scales, dtype in (("auto", kind.scale_dtype), ("bfloat16", "bfloat16"), ("float16", "float16")):
        report = convert(tmp_path / "m.gguf", tmp_path / scales, scales=scales, dtype="float32")
        found = stored_values(tmp_path / scales)
        for row in (row for row in report if len(row.shape) == 2):
            difference = found[row.name].astype(np.float64) - expected[row.name]
            relative = np.linalg.norm(difference) / np.linalg.norm(expected[row.name].astype(np.float64))
            assert row.relative_l2 == pytest.approx(relative, rel=1e-3)
            assert row.max_abs == pytest.approx(np.abs(difference).max(), rel=1e-3)
            assert row.stored_as.endswith(f"{dtype} scales")
            assert row.exact == (dtype == "float32" or dtype == kind.scale_dtype)
            assert row.exact or relative < {"float16": 2e-3, "bfloat16": 1.5e-2}[dtype]


@each("name", ["Q4_0", "Q5_0", "Q8_0", "IQ4_NL"])
def test_auto_widens_a_tensor_whose_biases_float16_cannot_hold(name: str, tmp_path: Path):
    kind = next(kind for kind in BLOCK_TYPES.values() if kind.name == name)
    offset = blocks.FORMATS[name].offset
    for largest, dtype in ((65504 / offset, "float16"), (65536 / offset, "float32")):
        for sign in (1, -1):
            expected = file_of_type(tmp_path / "m.gguf", kind, [np.float16(sign * largest).view(np.uint16)])
            report = convert(tmp_path / "m.gguf", tmp_path / "out", dtype="float32", force=True)
            assert {row.stored_as.split()[-2] for row in report if len(row.shape) == 2} == {dtype}
            assert all(row.exact for row in report)
            for found_name, found in stored_values(tmp_path / "out").items():
                assert_same_numbers(found, expected[found_name])


def test_a_scale_that_the_dtype_cannot_hold_is_refused(tmp_path: Path):
    file_of_type(tmp_path / "m.gguf", BLOCK_TYPES[8], SCALES["largest"])
    with pytest.raises(GGUFError, match=r"tensor 'token_embd\.weight' \(Q8_0\) holds .* for float16; give --scales"):
        convert(tmp_path / "m.gguf", tmp_path / "out", scales="float16")
    spoilt = hf_model(**WIDE)
    with torch.no_grad():
        spoilt.model.norm.weight[3] = 1e6
    write_gguf(tmp_path / "m.gguf", spoilt)
    with pytest.raises(
        GGUFError, match=r"'output_norm\.weight' \(F32\) holds 1e\+06, too much for float16; give --dtype"
    ):
        convert(tmp_path / "m.gguf", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_encode_rounds_as_torch_does(dtype: str):
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 20).astype(np.uint32)
    special = np.uint32(
        [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 1, 0x7F800001]
    )
    values = np.concatenate((special, bits)).view(np.float32)
    theirs = torch.from_numpy(values).to(getattr(torch, dtype))
    stored, rounded = encode(values, dtype)
    np.testing.assert_array_equal(rounded, theirs.float().numpy())
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(stored.view(np.uint16)[finite], theirs.view(torch.uint16).numpy()[finite])


@each("bits", [2, 3, 4, 5, 6, 8])
def test_quantizing_again_is_no_worse_than_mlx_and_better_with_narrow_scales(bits: int):
    values = np.random.default_rng(bits).standard_normal((64, 512)).astype(np.float32)
    values[0] = 0
    scales, biases = affine_range(values, bits, 64)
    theirs = mx.quantize(mx.array(values), group_size=64, bits=bits)

    def error(codes: mx.array, scales: mx.array, biases: mx.array) -> float:
        back = mx.dequantize(codes, scales, biases, group_size=64, bits=bits)
        return float(np.linalg.norm(np.array(back) - values))

    for dtype in ("float32", "bfloat16"):
        ours = [encode(array, dtype)[1] for array in (scales, biases)]
        codes = mx.array(blocks.pack(affine_codes(values, *ours, bits), bits))
        rounded = [array.astype(getattr(mx, dtype)).astype(mx.float32) for array in theirs[1:]]
        limit = 1.001 if dtype == "float32" or bits < 8 else 0.8
        assert error(codes, *map(mx.array, ours)) <= limit * error(theirs[0], *rounded)
        np.testing.assert_array_equal(unpack(np.array(codes), bits), affine_codes(values, *ours, bits))


# ---------------------------------------------------------------------------------------------------------------------
# Whole models, by value


MIXED = {
    "model.embed_tokens.weight": T.Q8_0,
    "model.layers.0.self_attn.q_proj.weight": T.Q4_0,
    "model.layers.0.self_attn.k_proj.weight": T.Q5_1,
    "model.layers.0.self_attn.v_proj.weight": T.Q6_K,
    "model.layers.0.self_attn.o_proj.weight": T.Q4_K,
    "model.layers.0.mlp.gate_proj.weight": T.Q5_K,
    "model.layers.0.mlp.up_proj.weight": T.BF16,
    "model.layers.0.mlp.down_proj.weight": T.Q5_0,
}


def mlx_lm_logits(folder: Path) -> mx.array:
    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    return model(mx.array(IDS))


@each("tied", [False, True], ids=["untied", "tied"])
@each("shards", [1, "several"])
def test_mixed_types_load_in_qwen_mlx_and_mlx_lm_with_transformers_logits(tied: bool, shards: int, tmp_path: Path):
    theirs = hf_model(**WIDE, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "m.gguf", theirs, MIXED)
    report = convert(path, tmp_path / "out", dtype="float32", shard_bytes=10**9 if shards == 1 else 300_000)
    assert all(row.exact for row in report)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files == ["model.safetensors"] if shards == 1 else len(files) > 2
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shards != 1)
    limit = tolerance(theirs)
    for packed in (False, True):
        model, tokenizer = load(tmp_path / "out", dtype="float32", quantized=packed)
        assert distance(model(mx.array(IDS)), torch_logits(theirs)) < limit
        original, _ = load(path, dtype="float32", quantized=packed)
        # Packed, the file's Q4_K and Q6_K blocks are multiplied as they are, the folder's as MLX packs them: the same
        # values, summed in another order.
        apart = distance(model(mx.array(IDS)), np.array(original(mx.array(IDS))))
        assert apart < limit if packed else apart == 0
    assert distance(mlx_lm_logits(tmp_path / "out"), torch_logits(theirs)) < limit
    assert tokenizer.eos_token_ids == {IM_END, END_OF_TEXT}


def test_mxfp4_loads_in_qwen_mlx_and_mlx_lm_alike(tmp_path: Path):
    expected = file_of_type(tmp_path / "m.gguf", BLOCK_TYPES[39])
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    model, _ = load(tmp_path / "out", dtype="float32")
    for name, array in model.hf_parameters().items():
        assert_same_numbers(np.array(array), expected[name])
    theirs, _ = mlx_lm.load(str(tmp_path / "out"))
    layer = theirs.model.layers[0].mlp.down_proj
    assert layer.mode == "mxfp4"
    values = mx.dequantize(layer.weight, layer.scales, group_size=32, bits=4, mode="mxfp4").astype(mx.float32)
    assert_same_numbers(np.array(values), expected["model.layers.0.mlp.down_proj.weight"])


def split(whole: Path, folder: Path, tensors: int) -> list[Path]:
    """Writes a GGUF's parts of so many tensors by gguf-py."""
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(folder / "s.gguf", "qwen2", split_max_tensors=tensors)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("s-*.gguf"))


def test_split_file_in(tmp_path: Path):
    whole = write_gguf(tmp_path / "m.gguf", RandomModel(), T.Q8_0)
    parts = split(whole, tmp_path, 10)
    assert len(parts) > 3
    convert(whole, tmp_path / "whole")
    convert(parts[0], tmp_path / "parts")
    for file in (tmp_path / "whole").iterdir():
        if file.name != "README.md":
            assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes(), file.name
    card = (tmp_path / "parts" / "README.md").read_text()
    for part in parts:
        assert f"`{part.name}`, sha256 `{sha256(part.read_bytes()).hexdigest()}`" in card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folder_of_safetensors_in(dtype: str, tmp_path: Path):
    theirs = hf_model(tie_word_embeddings=dtype == "bfloat16")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    save_folder(tmp_path / "in", theirs)
    (tmp_path / "in" / "model.safetensors").unlink()
    if theirs.config.tie_word_embeddings:  # with the shared matrix stored twice, as some writers do
        state = {name: array.to(getattr(torch, dtype)).clone() for name, array in theirs.state_dict().items()}
        assert "lm_head.weight" in state
        safetensors_torch.save_file(state, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    else:
        copy.deepcopy(theirs).to(getattr(torch, dtype)).save_pretrained(tmp_path / "in", max_shard_size="100KB")
    report = convert(tmp_path / "in", tmp_path / "out", dtype="float32")
    assert all(row.exact for row in report)
    assert {row.source_type for row in report} == {dtype}
    model, _ = load(tmp_path / "out", dtype="float32")
    assert distance(model(mx.array(IDS)), torch_logits(theirs)) < tolerance(theirs)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_folder_has_the_error_it_states_and_loads_everywhere(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qwen_mlx.conversion.quantize.CHUNK_WEIGHTS", 1 << 11)  # a tensor is several pieces
    theirs = hf_model(hidden_size=128, intermediate_size=256)
    save_folder(tmp_path / "in", theirs)
    report = convert(tmp_path / "in", tmp_path / "out", quantize=bits, group_size=32)
    values, state = stored_values(tmp_path / "out"), theirs.state_dict()
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "conversion.json").read_text())}
    assert rows.keys() == values.keys() == {row.name for row in report}
    for name, row in rows.items():
        difference = values[name] - state[name].numpy()
        assert row["relative_l2"] == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(state[name]), rel=1e-3)
        assert row["max_abs"] == pytest.approx(np.abs(difference).max(), rel=1e-3)
        assert not row["exact"]
        state[name].copy_(torch.from_numpy(values[name]))  # transformers with the values that were stored
    for logits in (load(tmp_path / "out", dtype="float32")[0](mx.array(IDS)), mlx_lm_logits(tmp_path / "out")):
        assert distance(logits, torch_logits(theirs)) < tolerance(theirs)


def test_a_folder_that_mlx_lm_converted_loads(tmp_path: Path):
    save_folder(tmp_path / "in", RandomModel(hidden_size=128, intermediate_size=256))
    for name, options in (("dense", {}), ("packed", {"quantize": True, "q_bits": 4, "q_group_size": 32})):
        mlx_lm.convert(str(tmp_path / "in"), str(tmp_path / name), dtype="float32", **options)
        theirs, _ = mlx_lm.load(str(tmp_path / name))
        model, _ = load(tmp_path / name, dtype="float32", quantized=name == "packed")
        expected = np.array(theirs(mx.array(IDS)).astype(mx.float32))
        assert distance(model(mx.array(IDS)), expected) < 1e-4 * np.abs(expected).max()
    with pytest.raises(QwenMLXError, match="quantized for MLX already"):
        convert(tmp_path / "packed", tmp_path / "out")


# The files that a converter with a mistake would have written. Every matrix that could be square is.
SQUARE = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}


def _swap(weights: dict, a: str, b: str) -> None:
    for name in [name for name in weights if a in name and name.replace(a, b) in weights]:
        weights[name], weights[name.replace(a, b)] = weights[name.replace(a, b)], weights[name]


def _each(weights: dict, part: str, change) -> None:
    for name in weights:
        if part in name:
            weights[name] = change(weights[name])


def _unpermute_llama(rows: mx.array, heads: int = 4) -> mx.array:
    """The order that is undone for llama, whose converter makes rows i and i + head_dim / 2 of a head neighbours."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


MUTATIONS = {
    **{
        f"transposed {name}": (lambda w, n=name: _each(w, f"{n}.weight", mx.transpose)) for name in ("q_proj", "k_proj")
    },
    **{
        f"transposed {name}": (lambda w, n=name: _each(w, f"{n}.weight", mx.transpose)) for name in ("v_proj", "o_proj")
    },
    **{
        f"transposed {name}": (lambda w, n=name: _each(w, f"{n}.weight", mx.transpose))
        for name in ("gate_proj", "up_proj")
    },
    "transposed down_proj": lambda w: _each(w, "down_proj.weight", mx.transpose),
    "gate and up swapped": lambda w: _swap(w, "gate_proj", "up_proj"),
    "q and k swapped": lambda w: _swap(w, "q_proj", "k_proj"),
    "norms of a layer swapped": lambda w: _swap(w, "input_layernorm", "post_attention_layernorm"),
    "llama's rows of q": lambda w: _each(w, "q_proj", _unpermute_llama),
    "llama's rows of q and k": lambda w: (_each(w, "q_proj", _unpermute_llama), _each(w, "k_proj", _unpermute_llama)),
    "q bias dropped": lambda w: _each(w, "q_proj.bias", mx.zeros_like),
    "v bias dropped": lambda w: _each(w, "v_proj.bias", mx.zeros_like),
    "dims unreversed": lambda w: _each(w, "embed_tokens", lambda a: a.reshape(a.shape[::-1]).T),
    "head untied from nothing": lambda w: _each(w, "lm_head", lambda a: w["model.embed_tokens.weight"]),
}


def test_mutations_fail_by_ten_tolerances(tmp_path: Path):
    theirs = hf_model(**SQUARE)
    expected, limit = torch_logits(theirs), tolerance(theirs)
    convert(write_gguf(tmp_path / "m.gguf", theirs), tmp_path / "out", dtype="float32")
    file = tmp_path / "out" / "model.safetensors"
    good = dict(mx.load(str(file)))
    mx.eval(good)
    assert distance(load(tmp_path / "out", dtype="float32")[0](mx.array(IDS)), expected) < limit
    for name, mutate in MUTATIONS.items():
        weights = dict(good)
        mutate(weights)
        mx.save_safetensors(str(file), {key: mx.contiguous(array) for key, array in weights.items()})
        off = distance(load(tmp_path / "out", dtype="float32")[0](mx.array(IDS)), expected)
        assert off > 10 * limit, f"{name}: {off} is within ten tolerances of {limit}"


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_metadata_of_the_folder(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel(), T.Q8_0)
    convert(path, tmp_path / "out")
    config, generation = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert config["eos_token_id"] == generation["eos_token_id"] == [IM_END, END_OF_TEXT]
    expected = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    assert expected.items() <= generation.items()
    assert config["quantization"] == {"group_size": 32, "bits": 8}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML
    assert f"`m.gguf`, sha256 `{sha256(path.read_bytes()).hexdigest()}`" in (tmp_path / "out" / "README.md").read_text()
    _, mlx_tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert mlx_tokenizer.eos_token_ids == {IM_END, END_OF_TEXT}
    _, ours = load(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("hello hell 12 he'LL\n\n x", "<|im_start|>user\nhello<|im_end|>\n"):
        assert theirs.encode(text) == mlx_tokenizer.encode(text) == ours.encode(text, allow_special=True)
    chat = [{"role": "user", "content": "hello"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == ours.render_chat(chat)
    assert len(TOKENS) == theirs.vocab_size + 3 == len(theirs)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_force_replaces_model_folders_only(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel())
    out = tmp_path / "out"
    convert(path, out)
    (out / "config.json").write_text("{}")
    with pytest.raises(QwenMLXError, match="exists already; give another name, or --force"):
        convert(path, out)
    convert(path, out, force=True)
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2"
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("irreplaceable")
    before = snapshot(tmp_path)
    for target, message in ((other, "not a model folder"), (tmp_path, "holds the model"), (path, "holds the model")):
        with pytest.raises(QwenMLXError, match=f"^{target}: [^:]*{message}[^:]*$"):
            convert(path, target, force=True)
    assert snapshot(tmp_path) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.gguf", "out", "photos"]


@each("name", ["n" * 300, "loop/out", "a\0b", "file/out"])
def test_an_output_that_no_disk_can_hold_is_one_sentence(name: str, tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel())
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(QwenMLXError, match="cannot be written"):
        convert(path, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


def test_the_folder_that_holds_a_link_to_the_model_is_not_replaced(tmp_path: Path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "m.gguf").symlink_to(write_gguf(tmp_path / "m.gguf", RandomModel()))
    (tmp_path / "here" / "config.json").touch()
    with pytest.raises(QwenMLXError, match="holds the model to convert"):
        convert(tmp_path / "here" / "m.gguf", tmp_path / "here", force=True)
    assert len(list((tmp_path / "here").iterdir())) == 2


def test_a_folder_that_holds_a_part_of_the_model_is_not_replaced(tmp_path: Path):
    whole = write_gguf(tmp_path / "m.gguf", RandomModel())
    here, source = tmp_path / "here", tmp_path / "source"
    here.mkdir()
    source.mkdir()
    (here / "config.json").touch()
    first, *_, last = split(whole, source, 20)
    last.rename(here / last.name)
    last.symlink_to(here / last.name)
    with pytest.raises(QwenMLXError, match="holds a part of the model"):
        convert(first, here, force=True)
    assert (here / last.name).exists()


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel())
    out = tmp_path / "out"

    def appear(*_: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("another's")

    with pytest.raises(QwenMLXError, match="exists already"):
        convert(path, out, progress=appear)
    assert snapshot(tmp_path).keys() == {"m.gguf", "out/config.json"}


@pytest.mark.heavy
def test_two_conversions_into_one_folder_leave_one_whole_model(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel(**WIDE), MIXED)
    command = [sys.executable, "-m", "qwen_mlx.convert", str(path), str(tmp_path / "out")]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    assert len("".join(errors).splitlines()) == 1, errors
    convert(path, tmp_path / "alone")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "alone")
    assert {file.name for file in tmp_path.iterdir()} == {"m.gguf", "out", "alone"}


@pytest.mark.linux  # file names on macOS are UTF-8
def test_the_card_of_a_file_with_an_odd_name_is_in_order(tmp_path: Path):
    path = write_gguf(tmp_path / os.fsdecode(b"a`\n---\n# b\xff \xe2\x98\x83.gguf"), RandomModel())
    convert(path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").splitlines()
    assert card[7] == "# a\ufffd\ufffd---\ufffd# b\ufffd \u2603"
    assert card[11].startswith("- `a\ufffd\ufffd---\ufffd# b\ufffd \u2603.gguf`, sha256")


def run(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `limit` is the largest file that it may write, as a quota sets it."""

    def prepare() -> None:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "qwen_mlx.convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=prepare)


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel(), T.F32)
    (tmp_path / "here").mkdir()
    done = run(path, tmp_path / "here" / "out", limit=100_000)
    assert done.returncode == 2
    assert "disk is full" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.heavy
@each(("number", "existing"), [(signal.SIGINT, False), (signal.SIGTERM, True)], ids=["new", "existing"])
def test_an_interrupted_conversion_leaves_what_was_there(number: signal.Signals, existing: bool, tmp_path: Path):
    """The source is a sparse file of gigabytes, so that the signal finds the work under way."""
    path, large = write_gguf(tmp_path / "m.gguf", RandomModel()), tmp_path / "large.gguf"
    header, size = layout(small_fields(), small_tensors() | {"token_embd.weight": ([32, 1 << 26], T.Q8_0)})
    with open(large, "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    out = tmp_path / "here" / "out"
    out.parent.mkdir()
    if existing:
        convert(path, out)
    before = snapshot(out.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen_mlx.convert", str(large), str(out), "--force"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in out.parent.glob(".out.*/*.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    for _ in range(2):  # the second must not disturb the tidying up
        process.send_signal(number)
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (128 + number, -signal.SIGINT)  # which ends it at once when all is tidy
    assert "Traceback" not in stderr
    assert snapshot(out.parent) == before
    assert [file.name for file in out.parent.iterdir()] == (["out"] if existing else [])


BAD = {
    "no such file": (lambda path: path.unlink(), "no such file"),
    "not readable": (lambda path: (path.unlink(), path.mkdir()), "config.json"),
    "not a GGUF": (lambda path: path.write_bytes(b"hello, world"), "not a GGUF file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_source_is_one_sentence_and_exit_code_2(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = write_gguf(tmp_path / "m.gguf", RandomModel())
    spoil, message = BAD[case]
    spoil(path)
    for arguments in ([path, tmp_path / "out"], ["--check", path]):
        done = run(*arguments) if case == "truncated" else None
        if done is not None:
            assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
            assert message in done.stderr
        else:
            with pytest.raises(QwenMLXError, match=message):
                main([str(argument) for argument in arguments])
    assert not (tmp_path / "out").exists()


@each(
    ("name", "value", "message"),
    [
        ("blk.1.attn_k.bias", None, r"'blk\.1\.attn_k\.bias' missing"),
        ("blk.0.ffn_up.weight", (np.zeros((160, 32), np.float32), T.F32), r"shape \(160, 32\), expected \(160, 64\)"),
        ("blk.9.ffn_up.weight", (np.zeros((160, 64), np.float32), T.F32), "not part of a qwen2 model of 3 layers"),
        ("../../evil.weight", (np.zeros((2, 2), np.float32), T.F32), r"'\.\./\.\./evil\.weight' is not part"),
        ("rope_freqs.weight", (np.ones(8, np.float32), T.F32), "divides the rotary frequencies"),
    ],
)
def test_wrong_tensors_are_named(name: str, value, message: str, tmp_path: Path):
    def edit(writer, tensors) -> None:
        tensors[name] = value
        if value is None:
            del tensors[name]

    path = write_gguf(tmp_path / "m.gguf", RandomModel(), edit=edit)
    with pytest.raises(GGUFError, match=message):
        convert(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_architecture_is_named(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel())
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"llama"))
    with pytest.raises(GGUFError, match=r"general\.architecture is 'llama', expected 'qwen2'"):
        convert(path, tmp_path / "out")


def test_check_prints_every_tensor_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_gguf(tmp_path / "m.gguf", RandomModel(**WIDE), MIXED)
    assert main(["--check", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for info in GGUFFile(path).tensors.values():
        (line,) = [line for line in lines if line.split()[0] == info.name]
        assert info.type.name in line.split()
        assert str(info.nbytes) in line.split()
        assert line.endswith("ok")
    assert lines[-1].endswith("0 damaged")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(QwenMLXError, match="--check writes nothing"):
        main(["--check", str(path), str(tmp_path / "out")])
    with pytest.raises(QwenMLXError, match="no output folder"):
        main([str(path)])


@each("kind", [T.Q8_0, T.Q4_K, T.Q6_K, T.F32, T.MXFP4], ids=lambda kind: kind.name)
def test_damage_is_named_and_converted_on_request_only(kind: T, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """NaN in one scale (or value) of one tensor."""
    name, at = "blk.0.ffn_down.weight", {T.Q6_K: 208}.get(kind, 0)
    nan = {T.F32: np.float32("nan").tobytes(), T.MXFP4: b"\xff"}.get(kind, np.float16("nan").tobytes())

    def damage(writer, tensors) -> None:
        raw = np.ascontiguousarray(tensors[name][0]).view(np.uint8).copy()
        raw[5, at : at + len(nan)] = np.frombuffer(nan, np.uint8)
        tensors[name] = (raw if kind != T.F32 else raw.view(np.float32), kind)

    path = write_gguf(tmp_path / "m.gguf", RandomModel(**WIDE), kind, edit=damage)
    with pytest.raises(
        GGUFError, match=rf"m\.gguf: tensor '{name}' \({kind.name}\) holds values or scales .*--allow-nan"
    ):
        convert(path, tmp_path / "out")
    with pytest.raises(QwenMLXError, match=f"tensor '{name}' holds values that are not finite"):
        main(["--check", str(path)])
    assert "1 damaged" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    report = convert(path, tmp_path / "out", allow_nan=True, dtype="float32")
    (row,) = [row for row in report if row.not_finite]
    assert row.source_name == name
    values = stored_values(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"]
    block = BLOCK_TYPES[int(kind)].block_size
    assert not np.isfinite(values[5, :block]).all()
    assert np.isfinite(values[:5]).all()
    assert np.isfinite(values[6:]).all()
    assert np.isfinite(values[5, block:]).all()


@each(("exponent", "code", "bad"), [(255, 0x11, 32), (254, 0x77, 32), (253, 0x77, 32), (252, 0x77, 0), (254, 0x11, 0)])
def test_check_and_convert_agree_on_the_last_exponents_of_mxfp4(exponent: int, code: int, bad: int, tmp_path: Path):
    """6 * 2^(253 - 127) is infinite in float32; 255 is NaN in MLX and not in ggml."""

    def damage(writer, tensors) -> None:
        raw = tensors["blk.0.ffn_down.weight"][0]
        raw[5, :17] = [exponent, *[code] * 16]

    path = write_gguf(tmp_path / "m.gguf", RandomModel(**WIDE), T.MXFP4, edit=damage)
    found = {tensor.source_name: bad for tensor, _, bad in conversion.check(path) if bad}
    assert found == ({"blk.0.ffn_down.weight": bad} if bad else {})
    if bad:
        with pytest.raises(GGUFError, match=r"ffn_down.*not finite"):
            convert(path, tmp_path / "out")
    report = convert(path, tmp_path / "out", allow_nan=True)
    assert sum(row.not_finite for row in report) == bad


def test_float64_is_compared_before_it_is_rounded(tmp_path: Path):
    def edit(writer, tensors) -> None:
        tensors[name] = (tensors[name][0].astype(np.float64) + 1e-9, T.F64)

    def huge(writer, tensors) -> None:
        edit(writer, tensors)
        tensors[name][0][0, 0] = 1e39

    name = "blk.0.ffn_down.weight"
    path = write_gguf(tmp_path / "m.gguf", RandomModel(), edit=edit)
    (row,) = [row for row in convert(path, tmp_path / "out", dtype="float32") if not row.exact]
    assert row.source_name == name
    assert 1e-9 < row.relative_l2 < 2**-24
    path = write_gguf(tmp_path / "huge.gguf", RandomModel(), edit=huge)
    with pytest.raises(GGUFError, match=r"holds 1e\+39, too much for float32, the widest there is"):
        convert(path, tmp_path / "out2", dtype="float32")


def test_quantizing_says_what_it_cannot_and_keeps_the_sources_packing(tmp_path: Path, capsys):
    """Rows of 32 * 5 are no multiple of 64: Q8_0 stays Q8_0, F32 dense."""
    path = write_gguf(tmp_path / "m.gguf", RandomModel(intermediate_size=160), T.Q8_0)
    main([str(path), str(tmp_path / "out"), "--quantize", "4"])
    assert "3 matrices have rows that --group-size 64 does not divide" in capsys.readouterr().out
    forms = {row["source_name"]: row["stored_as"] for row in json.loads((tmp_path / "out/conversion.json").read_text())}
    assert forms["blk.0.ffn_down.weight"] == "8 bits, group 32, float16 scales"
    assert forms["blk.0.ffn_up.weight"].startswith("4 bits")


def test_a_range_beyond_float32_is_no_damage(tmp_path: Path):
    def edit(writer, tensors) -> None:
        tensors["blk.0.ffn_up.weight"][0][0, :2] = -3e38, 3e38

    path = write_gguf(tmp_path / "m.gguf", RandomModel(), edit=edit)
    with pytest.raises(GGUFError, match="range is beyond float32"):
        convert(path, tmp_path / "out", quantize=4)


def test_named_templates_are_kept(tmp_path: Path):
    folder = save_folder(tmp_path / "in", RandomModel())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    (folder / "chat_template.jinja").write_text("plain")
    convert(folder, tmp_path / "out")
    templates = Tokenizer.from_folder(tmp_path / "out").chat_templates
    assert templates == {"default": "plain", "tool_use": "with tools"}


def test_a_template_is_copied_and_never_run_by_the_converter(tmp_path: Path):
    trap = tmp_path / "trap"
    code = f"cycler.__init__.__globals__.os.system('touch {trap}')"
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ " + code + " }}"
    path = tmp_path / "m.gguf"
    fields = small_fields() | {"tokenizer.chat_template": (8, gguf_text(template))}
    header, size = layout(fields, small_tensors())
    path.write_bytes(header + bytes(size))
    convert(path, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    with pytest.raises(QwenMLXError, match="template"):
        Tokenizer.from_folder(tmp_path / "out").render_chat([{"role": "user", "content": "x"}])
    assert not trap.exists()


def test_wrong_options_are_named(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel())
    for options, message in (
        ({"dtype": "float64"}, "dtype is 'float64', expected one of bfloat16, float16, float32"),
        ({"quantize": 7}, "quantize is 7"),
        ({"group_size": 48}, "group_size is 48"),
        ({"quantize": 4, "requantize": 4}, "give one of them"),
    ):
        with pytest.raises(QwenMLXError, match=message):
            convert(path, tmp_path / "out", **options)


# ---------------------------------------------------------------------------------------------------------------------
# The real file


@pytest.fixture(scope="module")
def real_folder(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "out"
    report = convert(real_gguf, folder, dtype="float32")
    assert len(report) == 291
    assert all(row.exact for row in report)
    return folder


def test_every_tensor_of_the_real_file_is_exact(real_gguf: Path, real_folder: Path):
    """Against what tests/gguf/test_blocks.py holds to gguf-py's values on this very file: the values of dense tensors,
    and the codes, scales and biases of packed ones, which it dequantizes with MLX.
    """
    file = GGUFFile(real_gguf)
    weights = mx.load(str(real_folder / "model.safetensors"))
    settings = json.loads((real_folder / "config.json").read_text())["quantization"]
    packed = 0
    for info in file.tensors.values():
        name = to_hf(info.name)
        module, raw = name.removesuffix(".weight"), file.raw(info.name)
        if f"{module}.scales" not in weights:
            expected = blocks.dequantize(raw, info.type).reshape(info.shape)
            np.testing.assert_array_equal(np.array(weights[name]).view(np.uint32), expected.view(np.uint32))
            continue
        packed += 1
        own = settings.get(module, settings)
        assert (own["group_size"], own["bits"]) == (info.type.packing.group_size, info.type.packing.bits)
        for part, expected in zip(("weight", "scales", "biases"), blocks.affine(raw, info.type)):
            found = np.array(weights[f"{module}.{part}"])
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
    assert packed == 158


# Transformers says this, greedily.
PROMPT = "def fibonacci(n):"
SPOKEN = (
    '\n    if n <= 0:\n        return "Invalid input"\n    elif n == 1:\n        return 0\n    elif n == 2:\n'
    "        return 1\n    else:\n        a, b = 0, 1\n        for _ in range(3, n + 1"
)


def assert_speaks(model: Callable[[mx.array], mx.array], ids: list[int], spoken: list[int]) -> None:
    """By one pass: greedy decoding gives these tokens if and only if each is the likeliest after those before it."""
    logits = model(mx.array([ids + spoken[:-1]]))[0, len(ids) - 1 :]
    assert mx.argmax(logits, axis=-1).tolist() == spoken


def test_the_real_folder_speaks_the_same_64_tokens_and_all_read_the_same_ids(real_folder: Path):
    """mlx-lm by its packed steps, of which a CPU does two a second: two tokens."""
    from mlx_lm.generate import generate_step  # mlx_lm.generate is the function

    theirs, mlx_tokenizer = mlx_lm.load(str(real_folder))
    theirs.set_dtype(mx.float32)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(real_folder)
    model, tokenizer = load(real_folder)
    for text in (PROMPT, SPOKEN):
        assert hf_tokenizer.encode(text) == tokenizer.encode(text) == mlx_tokenizer.encode(text)
    ids, spoken = tokenizer.encode(PROMPT), tokenizer.encode(SPOKEN)
    assert len(spoken) == 64
    assert_speaks(model, ids, spoken)
    assert [int(token) for token, _ in generate_step(mx.array(ids), theirs, max_tokens=2)] == spoken[:2]


@pytest.mark.slow
def test_mlx_lm_speaks_the_same_64_tokens(real_folder: Path):
    theirs, tokenizer = mlx_lm.load(str(real_folder))
    theirs.set_dtype(mx.float32)
    assert_speaks(mlx_lm.utils.dequantize_model(theirs), tokenizer.encode(PROMPT), tokenizer.encode(SPOKEN))


def test_convert_is_a_function_of_the_package(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel())
    code = f"import qwen_mlx; print(len(qwen_mlx.convert({str(path)!r}, {str(tmp_path / 'out')!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) == len(GGUFFile(path).tensors)


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel(**WIDE), MIXED)
    code = (
        "import os, signal, sys; from qwen_mlx.conversion import convert as conversion\n"
        "conversion.convert(sys.argv[1], sys.argv[2], progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, path, tmp_path / "out"], check=False).returncode == -9
        assert len(list(tmp_path.glob(".out.*"))) == 1, "the one before was removed"
    mine = tmp_path / f"{temporary_prefix(tmp_path / 'out')}{os.getpid()}-x"  # of a process that still runs
    mine.mkdir()
    convert(path, tmp_path / "out")
    assert list(tmp_path.glob(".out.*")) == [mine]


def test_a_model_that_a_killed_conversion_had_put_aside_returns(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    aside = tmp_path / f"{temporary_prefix(tmp_path / 'out')}{dead.pid}-x" / "model"
    aside.mkdir(parents=True)
    (aside / "config.json").write_text("{}")
    with pytest.raises(QwenMLXError, match="exists already"):
        convert(write_gguf(tmp_path / "m.gguf", RandomModel()), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert not list(tmp_path.glob(".out.*"))
