"""Exported GGUF files: types, values and metadata as gguf-py reads them, and the tokens of whoever loads them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from qwen_mlx import QwenMLXError, convert, export, generate, load
from qwen_mlx.cli.main import dispatch
from qwen_mlx.conversion import export as export_file
from qwen_mlx.conversion.mixes import MIXES, tensor_type
from qwen_mlx.gguf.reader import GGUFFile
from qwen_mlx.loading.checkpoint import open_checkpoint
from qwen_mlx.model.config import ModelConfig
from qwen_mlx.text.special_tokens import post_processor
from reference.lazy import torch, transformers
from reference.small_models import TOKENS, RandomModel, save_folder, to_hf, write_gguf
from tests.helpers.adapters import adapt, random_parts, write_peft
from tests.helpers.peers import IDS, distance, torch_logits

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
# The types of the matrices of a small file to copy, and of those that MLX holds packed.
COPIED = {"q_proj": T.Q4_K, "k_proj": T.Q5_0, "v_proj": T.Q6_K, "o_proj": T.Q8_0, "gate_proj": T.BF16, "up_proj": T.F16}
PACKED = {"q_proj": T.Q4_K, "k_proj": T.Q5_0, "v_proj": T.Q4_0, "o_proj": T.Q8_0, "gate_proj": T.Q5_K}
PACKED |= {"up_proj": T.Q4_1, "down_proj": T.Q5_1}

GPT_2_RULE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def kinds_of(model: RandomModel, kinds: dict[str, T]) -> dict[str, T]:
    return {name: kind for name in model.state_dict() for part, kind in kinds.items() if f".{part}.weight" in name}


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return RandomModel(**SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: RandomModel) -> Path:
    """The model in float32 as a folder of safetensors, with a tokenizer that splits as Qwen2's does."""
    path = save_folder(tmp_path_factory.mktemp("export") / "Tiny-1M-Instruct", model)
    base = write_gguf(path.parent / "base.gguf", model)
    convert(base, path.parent / "own", dtype="float32", dense=True)
    shutil.copyfile(path.parent / "own" / "tokenizer.json", path / "tokenizer.json")
    settings = {"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.75, "eos_token_id": [262, 260]}
    (path / "generation_config.json").write_text(json.dumps(settings))
    (path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: Qwen/Qwen2.5-0.5B\n---\n\n# Tiny\n")
    return path


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Values and types by name, by gguf-py's reader."""
    tensors = gguf.GGUFReader(path).tensors
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in tensors}
    return values, {t.name: t.tensor_type.name for t in tensors}


@pytest.mark.parametrize("name", MIXES)
def test_types_and_errors(tmp_path: Path, folder: Path, model: RandomModel, name: str):
    """gguf-py reads each tensor in the type of the mix, with the error that is reported and no larger one."""
    out = tmp_path / "out.gguf"
    report = {row.name: row for row in export(folder, out, name)}
    values, types = read(out)
    config = ModelConfig.from_folder(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    most = {"bf16": 2e-3, "f16": 3e-4, "q8_0": 6e-3, "q6_k": 2e-2, "q5_k_m": 4e-2, "q4_k_m": 8e-2, "q4_0": 0.11}[name]
    for hf_name, expected in model.state_dict().items():
        own = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert types[own] == tensor_type(MIXES[name], hf_name, expected.shape, config).name == report[own].stored_as
        relative = np.linalg.norm(values[own] - expected) / np.linalg.norm(expected)
        assert relative < (most if expected.ndim == 2 else 1e-9)
        assert abs(report[own].relative_l2 - relative) <= 1e-3 * relative
    assert GGUFFile(out).metadata["general.file_type"] == MIXES[name].file_type


def test_llama_cpps_mix():
    """The types that llama.cpp gave the layers of Qwen2.5-0.5B and 7B, and the 72B's values."""

    def types(layers: int, hidden: int, part: str) -> list[str]:
        config = ModelConfig(hidden, 256, layers, 8, 8, 32, 300, 1e-6, 1e6, 512, hidden < 1000)
        names = [f"model.layers.{n}.{part}.weight" for n in range(layers)]
        return [tensor_type(MIXES["q4_k_m"], each, (hidden, hidden), config).name for each in names]

    seven = types(28, 3584, "mlp.down_proj")
    assert [n for n, kind in enumerate(seven) if kind == "Q6_K"] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert set(seven) == {"Q6_K", "Q4_K"}
    assert types(28, 3584, "self_attn.v_proj") == seven
    assert set(types(28, 3584, "self_attn.k_proj")) == {"Q4_K"}
    half = types(24, 896, "self_attn.v_proj")
    assert [n for n, kind in enumerate(half) if kind == "Q8_0"] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert set(half) == {"Q8_0", "Q5_0"}
    assert set(types(80, 8192, "self_attn.v_proj")) == {"Q6_K", "Q5_K"}
    config = ModelConfig(896, 256, 24, 8, 8, 32, 300, 1e-6, 1e6, 512, True)
    for name, expected in (("q4_k_m", "Q8_0"), ("q4_0", "Q6_K"), ("q6_k", "Q8_0"), ("q8_0", "Q8_0"), ("f16", "F16")):
        columns = 1024 if expected == "Q6_K" else 896
        kind = tensor_type(MIXES[name], "model.embed_tokens.weight", (300, columns), config)
        assert kind.name == expected
    assert tensor_type(MIXES["q4_0"], "model.layers.0.mlp.up_proj.weight", (300, 40), config).name == "F16"


def test_a_folders_metadata(tmp_path: Path, folder: Path):
    """Shape, tokens, roles, templates, sampling and origin: what this package reads is what the folder says."""
    out = tmp_path / "out.gguf"
    export(folder, out, "bf16")
    ours, theirs = open_checkpoint(out), open_checkpoint(folder)
    fields = GGUFFile(out).metadata
    assert ours.config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps, rel=1e-6)
    assert {**vars(ours.config), "rms_norm_eps": 0} == {
        **vars(theirs.config),
        "rms_norm_eps": 0,
        "max_window_layers": 0,
    }
    assert ours.tokenizer.names == theirs.tokenizer.names
    assert ours.tokenizer.eos_token_ids == theirs.tokenizer.eos_token_ids
    assert ours.tokenizer.special == theirs.tokenizer.special
    assert ours.tokenizer.control == theirs.tokenizer.control
    assert ours.tokenizer.chat_templates == theirs.tokenizer.chat_templates
    text = "hello 123  héllo\n\n<|im_start|>it's"
    assert ours.tokenizer.encode(text, allow_special=True) == theirs.tokenizer.encode(text, allow_special=True)
    assert (ours.defaults.temperature, ours.defaults.top_k, ours.defaults.top_p) == (0.5, 7, 0.75)
    assert fields["general.name"] == "Tiny 1M Instruct"
    assert GGUFFile(out).value_types["general.sampling.top_k"] == (5, None)
    assert GGUFFile(out).value_types["general.sampling.penalty_repeat"] == (6, None)
    assert fields["general.size_label"] == "1M"
    assert fields["general.license"] == "apache-2.0"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/Qwen/Qwen2.5-0.5B"
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.eos_token_id"] == 262


def test_padding_rope_scaling_templates_and_end_tokens(tmp_path: Path, folder: Path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5e5}
    wide = RandomModel(**SIZES, rope_parameters=scaled | {"attention_factor": 1.5, "beta_fast": 30.0}, vocab_size=300)
    wide.save_pretrained(other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": "default", "template": "{{ 1 }}"},
        {"name": "tool_use", "template": "{{ 2 }}"},
    ]
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [262, 5]}))
    export(other, tmp_path / "out.gguf", "q8_0")
    ours, theirs = open_checkpoint(tmp_path / "out.gguf"), open_checkpoint(other)
    assert ours.config.rope_scaling.attention_factor == pytest.approx(1.5)
    assert (ours.config.rope_scaling.factor, ours.config.rope_scaling.beta_fast) == (4, 30)
    assert ours.config.rope_theta == theirs.config.rope_theta
    assert ours.config.vocab_size == 300
    assert ours.tokenizer.chat_templates == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    assert ours.tokenizer.eos_token_ids == theirs.tokenizer.eos_token_ids
    assert 5 in ours.tokenizer.eos_token_ids
    assert [*ours.tokenizer.names, *[""] * 300][:300] == [*theirs.tokenizer.names, *[""] * 300][:300]
    assert GGUFFile(tmp_path / "out.gguf").metadata["tokenizer.ggml.tokens"][299] == "[PAD299]"


def test_keep_copies_a_gguf(tmp_path: Path, capfd: pytest.CaptureFixture):
    """Every tensor's bytes and every field, its type too."""

    def edit(writer: gguf.GGUFWriter, tensors: dict) -> None:
        writer.add_uint64("general.count", 2**40)
        writer.add_array("general.tags", ["a", "ü"])
        writer.add_key_value("general.bytes", [1, 2], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8)
        writer.add_custom_alignment(64)
        tensors["rope_freqs.weight"] = (np.ones(32, np.float32), T.F32)

    model = RandomModel(**SIZES)
    source = write_gguf(tmp_path / "source.gguf", model, kinds_of(model, COPIED), edit)
    export(source, tmp_path / "out.gguf", "keep")
    export(write_gguf(tmp_path / "dense.gguf", model), tmp_path / "dense_q8_0.gguf", "q8_0")
    assert capfd.readouterr().err == ""
    before, after = GGUFFile(source), GGUFFile(tmp_path / "out.gguf")
    assert dict(before.metadata) == dict(after.metadata)
    assert dict(before.value_types) == dict(after.value_types)
    assert [*before.tensors] == [*after.tensors]
    for name, info in before.tensors.items():
        assert after.tensors[name].type is info.type
        np.testing.assert_array_equal(before.raw(name), after.raw(name))
    # Another type copies what has it already, and keeps the rest of the metadata.
    report = {row.name: row for row in export(source, tmp_path / "q4.gguf", "q4_k_m")}
    assert re.search(r"quantized already \(.*Q8_0.*\); q4_k_m rounds it again.* --type keep", capfd.readouterr().err)
    q4 = GGUFFile(tmp_path / "q4.gguf")
    assert q4.metadata == {**before.metadata, "general.file_type": 15, "general.quantization_version": 2}
    np.testing.assert_array_equal(q4.raw("blk.1.attn_q.weight"), before.raw("blk.1.attn_q.weight"))
    np.testing.assert_array_equal(q4.raw("rope_freqs.weight"), before.raw("rope_freqs.weight"))
    assert report["blk.1.attn_q.weight"].exact
    assert not report["blk.1.ffn_up.weight"].exact


@pytest.mark.parametrize("scales", ["auto", "float32"])
def test_keep_gives_back_what_mlx_has_packed(tmp_path: Path, scales: str):
    model = RandomModel(**SIZES)
    source = write_gguf(tmp_path / "source.gguf", model, kinds_of(model, PACKED) | {"lm_head.weight": T.MXFP4})
    convert(source, tmp_path / "folder", dtype="float32", scales=scales)
    report = export(tmp_path / "folder", tmp_path / "out.gguf", "keep")
    assert all(row.exact for row in report)
    (before, types), (after, own_types) = read(source), read(tmp_path / "out.gguf")
    assert own_types == types
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


def test_keep_refuses_what_no_type_holds(tmp_path: Path, folder: Path):
    convert(folder, tmp_path / "packed", quantize=8)
    with pytest.raises(
        QwenMLXError, match=r"8 bits, group 64\) has no exact form in a GGUF; give another type than keep"
    ):
        export(tmp_path / "packed", tmp_path / "out.gguf", "keep")
    assert not (tmp_path / "out.gguf").exists()
    export(tmp_path / "packed", tmp_path / "out.gguf", "q8_0")


def test_mlxs_own_quantization_of_16_bits_is_kept(tmp_path: Path, folder: Path):
    """The usual MLX folder: 4 bits, groups of 64, bfloat16 scales that float16 holds too."""
    convert(folder, tmp_path / "packed", quantize=4)
    export(tmp_path / "packed", tmp_path / "out.gguf", "keep")
    before, after = open_checkpoint(tmp_path / "packed").parameters, open_checkpoint(tmp_path / "out.gguf").parameters
    assert after["model.layers.0.mlp.up_proj.weight"].type_name == "Q4_1"
    for name, parameter in before.items():
        np.testing.assert_array_equal(after[name].values(), parameter.values())


def test_an_adapter_is_merged(tmp_path: Path, folder: Path):
    changed = RandomModel(**SIZES)
    parts = random_parts(changed, ["q_proj", "down_proj", "embed_tokens"])
    adapter = write_peft(tmp_path / "adapter", parts, 1.5)
    adapt(changed, parts, 1.5)
    assert dispatch(["export", str(folder), str(tmp_path / "o.gguf"), "--type=f16", "--adapter", str(adapter)]) == 0
    parameters = open_checkpoint(tmp_path / "o.gguf").parameters
    for name, expected in changed.state_dict().items():
        np.testing.assert_allclose(parameters[name].values().reshape(expected.shape), expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(QwenMLXError, match="keep changes no value, an adapter does"):
        export(folder, tmp_path / "keep.gguf", "keep", adapter=str(adapter))


def test_the_same_text_here_and_the_same_logits_in_transformers(tmp_path: Path, folder: Path, model: RandomModel):
    out = tmp_path / "out.gguf"
    export(folder, out, "f16")
    exported, _ = load(out, quantized=False)
    rounded = RandomModel(**SIZES)
    for value in rounded.state_dict().values():
        np.copyto(value, value.astype(np.float16 if value.ndim == 2 else np.float32))
    expected = torch_logits(to_hf(rounded))
    assert distance(exported(mx.array(IDS)), expected) < 1e-4 * np.abs(expected).max()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32)
    assert distance(exported(mx.array(IDS)), torch_logits(theirs)) < 1e-4 * np.abs(expected).max()
    shutil.copytree(folder, tmp_path / "rounded")
    rounded.save_pretrained(tmp_path / "rounded")
    pairs = [load(path, quantized=False) for path in (tmp_path / "rounded", out)]
    texts = [generate(*pair, "hello", max_tokens=24, temperature=0) for pair in pairs]
    assert texts[0] == texts[1] != ""


# ---------------------------------------------------------------------------------------------------------------------
# Refusals, and the state after a failure


def test_files_that_are_not_replaced(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture):
    out, text = tmp_path / "out.gguf", tmp_path / "notes.txt"
    text.write_text("mine")
    export(folder, out, "q8_0")
    before = out.read_bytes()
    for target, force, message in (
        (out, False, "exists already; give another name, or --force"),
        (text, True, "is not a GGUF file, so --force does not replace it"),
        (tmp_path, True, "is a folder; give the name of the file to write"),
        (tmp_path / "none" / "out.gguf", False, "its folder does not exist"),
        ("a\0b", False, "no file can have this name"),
    ):
        with pytest.raises(QwenMLXError, match=message):
            export(folder, target, "q8_0", force=force)
    with pytest.raises(QwenMLXError, match="is the model to export"):
        export(out, out, "q4_0", force=True)
    (tmp_path / "link.gguf").symlink_to(out)
    with pytest.raises(QwenMLXError, match="is the model to export"):
        export(out, tmp_path / "link.gguf", "q4_0", force=True)
    with pytest.raises(QwenMLXError, match="There is no type 'q4_k': did you mean 'q4_k_m'"):
        export(folder, out, "q4_k")
    assert out.read_bytes() == before
    assert text.read_text() == "mine"
    export(folder, out, "q4_0", force=True)
    assert out.read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.gguf", "notes.txt", "out.gguf"]


@pytest.mark.parametrize(("value", "message"), [(np.nan, "not finite"), (1e38, "too much for F16")])
def test_a_failure_leaves_nothing(tmp_path: Path, folder: Path, value: float, message: str):
    spoiled = RandomModel(**SIZES)
    spoiled.state_dict()["lm_head.weight"][3, 5] = value
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    spoiled.save_pretrained(other)
    with pytest.raises(QwenMLXError, match=f"'lm_head.weight' .*{message}"):
        export(other, tmp_path / "out.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_full_disk_is_told_first(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(QwenMLXError, match=r"needs .* MB, but 0.0 MB are free"):
        export(folder, tmp_path / "out.gguf", "q8_0")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "attend within 8"),
        ("tokenizer.json", {"pre_tokenizer": GPT_2_RULE}, "splits text by another rule than Qwen2's"),
        ("tokenizer.json", {"post_processor": post_processor(dict(zip(TOKENS[-2:], (261, 262))), {})}, "around a text"),
    ],
)
def test_what_a_gguf_cannot_say(tmp_path: Path, folder: Path, file: str, change: dict, message: str):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    content = json.loads((other / file).read_text()) | change
    (other / file).write_text(json.dumps(content))
    with pytest.raises(QwenMLXError, match=message):
        export(other, tmp_path / "out.gguf", "q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_types_of_the_command_are_those_of_the_library():
    from qwen_mlx.cli.export import TYPES

    assert TYPES == export_file.TYPE_NAMES


def test_the_file_types_are_gguf_py_s():
    assert {name: mix.file_type for name, mix in MIXES.items()} == {
        name: gguf.LlamaFileType[f"MOSTLY_{name.upper()}"] for name in MIXES
    }
