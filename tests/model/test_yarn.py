"""YaRN as Qwen documents it: the same rotary tables as transformers', from every place that can ask for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from qwen_mlx import ModelConfig, QwenMLXError, load, ops
from qwen_mlx.backend import mx
from qwen_mlx.cli.generate import main
from qwen_mlx.generation.text import encode_prompt, generate
from qwen_mlx.gguf.reader import GGUFFile
from qwen_mlx.model.config import RopeScaling
from qwen_mlx.model.qwen2 import rotary_of
from reference.lazy import modeling_qwen2, torch, transformers
from reference.small_models import RandomModel, hf_model, save_folder, write_gguf
from tests.helpers.cases import each

# https://qwen.readthedocs.io and the model cards of Qwen2.5-7B-Instruct and larger: "rope_scaling" in config.json.
DOCUMENTED = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
QWEN = ModelConfig(3584, 18944, 28, 28, 4, 128, 152064, 1e-6, 1000000.0, 32768, False)


def theirs(config: ModelConfig) -> modeling_qwen2.Qwen2RotaryEmbedding:
    return modeling_qwen2.Qwen2RotaryEmbedding(transformers.Qwen2Config(**config.to_hf()))


@each("config", [QWEN, replace(QWEN, head_dim=64, hidden_size=896, num_attention_heads=14, num_key_value_heads=2)])
@each("factor", [4, 2.5])
def test_tables_equal_transformers_to_float32_rounding_up_to_131072(config: ModelConfig, factor: float):
    config = config.with_yarn(factor)
    rotary, oracle = rotary_of(config), theirs(config)
    frequencies = np.array(rotary.inv_freq, np.float32)
    expected = oracle.inv_freq.numpy()
    np.testing.assert_array_max_ulp(frequencies, expected, maxulp=2)
    assert rotary.attention_factor == pytest.approx(oracle.attention_scaling, rel=1e-7)
    positions = [0, 1, 1000, 32767, 32768, 65536, 100003, 131071, 131072]
    ones = mx.array(np.eye(2, dtype=np.float32).repeat(config.head_dim // 2, 1)[:1][None, None])
    ours = np.concatenate(
        [np.array(ops.rope(ones, rotary.table(position, 1))).reshape(1, 2, -1) for position in positions]
    )
    cos, sin = oracle(torch.zeros(1), torch.tensor([positions]))
    half = config.head_dim // 2
    expected_tables = torch.stack([cos[0, :, :half], sin[0, :, :half]], 1).numpy()
    # They round each angle to float32: half a unit in its last place, and two of the frequency's.
    angles = np.array(positions, np.float64)[:, None] * expected
    slack = (0.5 + 2) * np.spacing(angles.astype(np.float32)) + 4 * 2.0**-23
    assert (np.abs(ours - expected_tables) <= rotary.attention_factor * slack[:, None]).all()
    # From our own frequencies without that rounding: to the last bit but one.
    exact = np.array(positions, np.float64)[:, None] * frequencies.astype(np.float64)
    exact_tables = rotary.attention_factor * np.stack([np.cos(exact), np.sin(exact)], 1)
    np.testing.assert_allclose(ours, exact_tables, rtol=0, atol=2.0**-23)
    # This would see a missing scaling, and a factor that is 1 % off.
    for wrong in (replace(config, rope_scaling=None), config.with_yarn(1.01 * factor)):
        table = np.array(ops.rope(ones, rotary_of(wrong).table(131072, 1))).reshape(2, -1)
        assert (np.abs(table - expected_tables[-1]) > 20 * rotary.attention_factor * slack[-1]).any()


def test_config_json_gguf_and_argument_give_what_is_documented(tmp_path: Path):
    plain = hf_model(max_position_embeddings=32768)
    folder = save_folder(tmp_path / "plain", plain)
    gguf = write_gguf(tmp_path / "plain.gguf", plain)

    def with_scaling(writer, tensors) -> None:
        writer.add_string("qwen2.rope.scaling.type", "yarn")
        writer.add_float32("qwen2.rope.scaling.factor", 4.0)
        writer.add_uint32("qwen2.rope.scaling.original_context_length", 32768)

    scaled = write_gguf(tmp_path / "scaled.gguf", plain, edit=with_scaling)
    documented = save_folder(tmp_path / "documented", plain)
    edited = save_folder(tmp_path / "edited", plain)  # as transformers 5 saves it, then by hand
    raw = json.loads((documented / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps(raw | {"rope_scaling": DOCUMENTED}))
    raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
    (documented / "config.json").write_text(json.dumps(raw | {"rope_scaling": DOCUMENTED}))

    with pytest.warns(UserWarning, match=r"rope_scaling has no 'rope_theta', so .* 1000000.0 counts; transformers"):
        edited_config = ModelConfig.from_folder(edited)
    configs = [
        ModelConfig.from_folder(documented),
        edited_config,
        ModelConfig.from_gguf(GGUFFile(scaled)),
        ModelConfig.from_gguf(GGUFFile(gguf)).with_yarn(4),
        load(folder, yarn=4)[0].config,
        load(gguf, yarn=4.0)[0].config,
    ]
    assert len({rotary_of(config) for config in configs}) == 1
    assert {config.context_length for config in configs} == {131072}
    assert configs[0].rope_scaling.original_max_position_embeddings == 32768
    assert rotary_of(configs[0]) != rotary_of(replace(configs[0], rope_scaling=None))


@each(
    "given",
    [
        {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
        {"factor": 1.0, "mscale": 0.7, "mscale_all_dim": 1.3},
        {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3, "attention_factor": 1.25},
        {"factor": None, "original_max_position_embeddings": 1024},
        {"factor": 4.0, "beta_fast": 8, "beta_slow": 8},
    ],
)
def test_settings_of_deepseek_s_yarn_equal_transformers(tmp_path: Path, given: dict):
    raw = json.loads((save_folder(tmp_path, RandomModel(max_position_embeddings=4096)) / "config.json").read_text())
    raw["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 4096} | given
    (tmp_path / "config.json").write_text(json.dumps(raw))
    rotary = rotary_of(ModelConfig.from_folder(tmp_path))
    oracle = modeling_qwen2.Qwen2RotaryEmbedding(transformers.Qwen2Config(**raw))
    np.testing.assert_array_max_ulp(np.array(rotary.inv_freq, np.float32), oracle.inv_freq.numpy(), maxulp=2)
    assert rotary.attention_factor == pytest.approx(oracle.attention_scaling, rel=1e-7)


@each(
    "given",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": {"rope_theta": 2e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": DOCUMENTED, "rope_theta": 1e6},
        {"rope_parameters": {"rope_theta": 5e5} | DOCUMENTED, "rope_scaling": {"factor": 2.0}, "rope_theta": 1e6},
        {"rope_parameters": DOCUMENTED, "rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": DOCUMENTED},
    ],
)
def test_rope_scaling_beside_rope_parameters_equals_transformers(tmp_path: Path, given: dict):
    raw = json.loads((save_folder(tmp_path, RandomModel()) / "config.json").read_text())
    del raw["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(raw | given))
    config = ModelConfig.from_folder(tmp_path)
    oracle = transformers.Qwen2Config(**raw, **given).rope_parameters
    assert (config.rope_theta, config.rope_scaling is not None) == (oracle["rope_theta"], oracle["rope_type"] == "yarn")


def test_each_field_of_rope_scaling_is_read_alone(tmp_path: Path):
    """What is left out is transformers' default; ggml's attn_factor is a factor on YaRN's own."""
    model, own = RandomModel(max_position_embeddings=4096), 0.1 * math.log(4) + 1
    raw = json.loads((save_folder(tmp_path / "m", model) / "config.json").read_text())
    for name, key, value, expected in (
        ("attention_factor", "attn_factor", 0.75, 0.75 * own),
        ("attention_factor", "attn_factor", 1.0, own),
        ("attention_factor", "yarn_attn_factor", 0.75, 0.75 * own),
        ("beta_fast", "yarn_beta_fast", 16.0, 16.0),
        ("beta_slow", "yarn_beta_slow", 2.0, 2.0),
        ("original_max_position_embeddings", "original_context_length", 64, 64),
        ("type", "type", "yarn", "yarn"),
    ):

        def with_scaling(writer, tensors, key=key, value=value) -> None:
            for field, content in {"type": "yarn", "factor": 4.0, key: value}.items():
                kind = {str: "string", float: "float32", int: "uint32"}[type(content)]
                getattr(writer, f"add_{kind}")(f"qwen2.rope.scaling.{field}", content)

        rope = raw["rope_parameters"] | {"rope_type": "yarn", "factor": 4.0}
        rope |= {} if name == "type" else {name: value}
        (tmp_path / "m" / "config.json").write_text(json.dumps(raw | {"rope_parameters": rope}))
        plain = RopeScaling("yarn", 4.0, 4096)
        folder = ModelConfig.from_folder(tmp_path / "m")
        file = ModelConfig.from_gguf(GGUFFile(write_gguf(tmp_path / "m.gguf", model, edit=with_scaling)))
        assert folder.rope_scaling == replace(plain, **{name: value})
        assert file.rope_scaling == replace(plain, **{name: expected})


def test_rope_factors_of_a_gguf_divide_its_frequencies(tmp_path: Path):
    """As ggml_rope_ext does with freq_factors, and for angles that make a difference to the logits."""
    plain, ids = RandomModel(), mx.array([[5, 17, 200, 3, 9, 40]])
    before, _ = load(write_gguf(tmp_path / "m.gguf", plain))
    factors = np.linspace(0.5, 4, before.config.head_dim // 2).astype(np.float32)

    def with_factors(writer, tensors) -> None:
        tensors["rope_freqs.weight"] = (factors, gguf.GGMLQuantizationType.F32)

    model, _ = load(write_gguf(tmp_path / "m.gguf", plain, edit=with_factors))
    expected = np.array(before.model.rotary.inv_freq) / factors
    np.testing.assert_allclose(model.model.rotary.inv_freq, expected, rtol=1e-7)
    assert not np.allclose(np.array(model(ids)), np.array(before(ids)), rtol=1e-3)


def test_logits_past_the_trained_context_equal_transformers(tmp_path: Path):
    """A model whose own context is 32 tokens, extended 4 times by the argument."""
    small = hf_model(max_position_embeddings=32)
    gguf = write_gguf(tmp_path / "m.gguf", small)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1000000.0}
    extended = hf_model(max_position_embeddings=32, rope_parameters=yarn)
    extended.load_state_dict(small.state_dict())
    ids = np.random.default_rng(0).integers(0, 260, (1, 120))
    with torch.no_grad():
        expected = extended(torch.from_numpy(ids)).logits.numpy()
    found = np.array(load(gguf, yarn=4)[0](mx.array(ids)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert np.abs(np.array(load(gguf)[0](mx.array(ids))) - expected).max() > 0.01 * np.abs(expected).max()


def test_a_prompt_past_the_limit_says_how_to_extend(tmp_path: Path, capfd):
    gguf = write_gguf(tmp_path / "m.gguf", RandomModel(max_position_embeddings=32))
    text = ["--model", str(gguf), "--temp", "0", "--max-tokens", "3", "--prompt"]
    with pytest.raises(QwenMLXError, match=r"context 32: shorten it, or extend the context with --yarn 4 \(in Python"):
        main([*text, "x" * 60])
    assert main([*text, "x" * 60, "--yarn", "4"]) == 0
    for arguments, context in (([], 32), (["--yarn", "4"], 128)):
        with pytest.raises(QwenMLXError, match=f"context {context}: .*--yarn 7"):
            main([*text, "x" * 200, *arguments])
    model, tokenizer = load(gguf)
    with pytest.raises(QwenMLXError, match=r"context 32: shorten it\.$"):
        generate(model, tokenizer, encode_prompt(tokenizer, "x" * 40 * 32))


@each("factor", [0, 1, -4, 33, float("nan"), float("inf"), "4", True])
def test_factors_that_cannot_be_are_refused(factor):
    with pytest.raises(QwenMLXError, match=r"yarn is .*, expected more than 1 and at most 32; Qwen documents 4"):
        QWEN.with_yarn(factor)


def test_models_that_yarn_does_not_suit_are_refused(tmp_path: Path):
    long = replace(QWEN, max_position_embeddings=131072)  # the base models' config.json
    with pytest.raises(QwenMLXError, match="context is 131072 already"):
        long.with_yarn(4)
    assert long.with_yarn(8).context_length == 262144
    linear = ModelConfig.from_folder(
        save_folder(tmp_path, RandomModel(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}))
    )
    with pytest.raises(QwenMLXError, match="has linear rope scaling"):
        linear.with_yarn(4)
    # A model that brings YaRN keeps where it started from.
    assert QWEN.with_yarn(4).with_yarn(8) == QWEN.with_yarn(8)
    assert replace(QWEN, max_position_embeddings=4096).with_yarn(4).context_length == 16384  # Qwen2.5-Math
