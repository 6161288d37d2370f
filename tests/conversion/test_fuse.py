"""Fused folders: the changed values, and the logits of mlx-lm and transformers, which read them too."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from qwen_mlx import QwenMLXError, convert, load
from qwen_mlx.cli.main import dispatch
from qwen_mlx.loading.checkpoint import open_checkpoint
from reference.lazy import mlx_lm_utils, torch, transformers
from reference.small_models import RandomModel, save_folder, write_gguf
from tests.helpers.adapters import adapt, random_parts, write_peft
from tests.helpers.peers import IDS, distance, torch_logits

NAMES = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def make(tmp_path: Path, dora: bool = False, names: list[str] = NAMES) -> tuple[Path, Path, RandomModel]:
    """A base in Q8_0 with a tied head, an adapter, and the model that they make, whose head is its own."""
    source = RandomModel(**SIZES, tie_word_embeddings=True)
    base = write_gguf(tmp_path / "base.gguf", source, T.Q8_0)
    parts = random_parts(source, [name for name in names if not (dora and name == "embed_tokens")], dora=dora)
    adapter = write_peft(tmp_path / "adapter", parts, 1.5)
    changed = RandomModel(**SIZES, tie_word_embeddings=dora or "embed_tokens" not in names)
    for name, value in source.state_dict().items():
        np.copyto(changed.state_dict()[name], value)
    if not changed.config.tie_word_embeddings:
        np.copyto(changed.state_dict()["lm_head.weight"], source.state_dict()["model.embed_tokens.weight"])
    adapt(changed, parts, 1.5)
    return base, adapter, changed


def values_of(folder: Path) -> dict[str, np.ndarray]:
    parameters = open_checkpoint(folder).parameters
    return {name: parameter.values().reshape(parameter.shape) for name, parameter in parameters.items()}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_changed_values(tmp_path: Path, dora: bool, capsys: pytest.CaptureFixture):
    base, adapter, changed = make(tmp_path, dora)
    arguments = ["fuse", str(base), str(tmp_path / "out"), "--adapter", str(adapter), "--dtype", "float32"]
    assert dispatch(arguments) == 0
    assert "float32: " in capsys.readouterr().out
    values, expected = values_of(tmp_path / "out"), changed.state_dict()
    assert values.keys() == expected.keys()
    for name, value in values.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == dora
    assert "the adapter `adapter:1`, merged" in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("bits", [None, 8], ids=["dense", "quantized"])
def test_mlx_lm_and_transformers_read_what_was_fused(tmp_path: Path, bits: int | None):
    base, adapter, changed = make(tmp_path)
    out = tmp_path / "out"
    rows = convert(base, out, adapter=adapter, dtype="float32", quantize=bits, dense=bits is None)
    reference = save_folder(tmp_path / "expected", changed)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    expected = torch_logits(theirs)
    ours = load(out, dtype="float32")[0](mx.array(IDS))
    bound = 1e-4 if bits is None else 0.05
    assert distance(ours, expected) < bound * np.abs(expected).max()
    mlx_lm_logits = np.array(mlx_lm_utils.load(str(out))[0](mx.array(IDS)).astype(mx.float32))
    assert distance(ours, mlx_lm_logits) < 1e-4 * np.abs(expected).max()
    if bits is None:
        fused = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert distance(ours, torch_logits(fused)) < 1e-4 * np.abs(expected).max()
    else:
        errors = {row.name: row.relative_l2 for row in rows}
        name = "model.layers.0.mlp.down_proj.weight"
        stored, exact = values_of(out)[name], changed.state_dict()[name]
        relative = np.linalg.norm(stored - exact) / np.linalg.norm(exact)
        assert abs(errors[name] - relative) < 1e-3 * relative


def test_a_base_that_mlx_has_packed(tmp_path: Path):
    """The usual base of an adapter that mlx-lm trains."""
    base, _, _ = make(tmp_path)
    packed = tmp_path / "packed"
    convert(base, packed, quantize=4)
    source = RandomModel(**SIZES, tie_word_embeddings=True)
    for name, value in values_of(packed).items():
        np.copyto(source.state_dict()[name], value)
    parts = random_parts(source, ["q_proj"])
    adapter = write_peft(tmp_path / "other", parts, 1.5)
    adapt(source, parts, 1.5)
    convert(packed, tmp_path / "out", adapter=adapter, dtype="float32", dense=True)
    for name, value in values_of(tmp_path / "out").items():
        np.testing.assert_allclose(value, source.state_dict()[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(QwenMLXError, match="quantized for MLX already"):
        convert(packed, tmp_path / "again", dense=True)


def test_without_dense_what_no_adapter_changes_stays_packed(tmp_path: Path):
    base, adapter, _ = make(tmp_path, names=["q_proj"])
    forms = {row.name: row.stored_as for row in convert(base, tmp_path / "out", adapter=adapter)}
    assert forms["model.layers.0.self_attn.q_proj.weight"] == "bfloat16"
    assert forms["model.layers.0.self_attn.k_proj.weight"].startswith("8 bits")


def test_nothing_is_written_for_an_adapter_that_does_not_fit(tmp_path: Path):
    base, _, _ = make(tmp_path)
    parts = random_parts(RandomModel(**SIZES | {"hidden_size": 128}), ["q_proj"])
    with pytest.raises(QwenMLXError, match="another base"):
        dispatch(["fuse", str(base), str(tmp_path / "out"), "--adapter", str(write_peft(tmp_path / "w", parts, 1))])
    with pytest.raises(QwenMLXError, match="dense unpacks every matrix"):
        convert(base, tmp_path / "out", dense=True, quantize=4)
    assert not (tmp_path / "out").exists()
