"""Adapters of every form: the values of a model whose matrices were changed in float64, and sentences for the rest."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from qwen_mlx import PromptCache, QwenMLXError, load
from qwen_mlx.backend import mx
from qwen_mlx.cli.main import dispatch
from qwen_mlx.generation.prompt_cache import fingerprint
from qwen_mlx.loading.adapters.apply import adapted, merged
from qwen_mlx.loading.checkpoint import open_checkpoint
from qwen_mlx.model.fused import FusedModel
from qwen_mlx.parallel.shards import Shard
from reference.small_models import RandomModel, save_folder, write_gguf
from tests.helpers.adapters import adapt, random_parts, write, write_gguf_adapter, write_json, write_mlx_lm, write_peft
from tests.helpers.cases import each

IDS = [[3, 14, 15, 92, 65, 35, 89, 79, 32]]
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SCALE = 1.5
FORMS = {"peft": write_peft, "mlx-lm": write_mlx_lm}


def model_of(seed: int = 0, **settings: object) -> RandomModel:
    return RandomModel(seed, **SIZES | settings)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "base", model_of())


def write_form(kind: str, path: Path, parts: dict) -> Path:
    if kind == "gguf":
        return write_gguf_adapter(path.with_suffix(".gguf"), parts, SCALE, layers=8)
    return FORMS[kind](path, parts, SCALE)


def logits(model, ids=IDS) -> np.ndarray:
    return np.array(model(mx.array(ids)).astype(mx.float32))


def decoded(model, ids=IDS) -> np.ndarray:
    """The logits after each token as the token loop computes them: a prompt, then token by token."""
    fused, cache = FusedModel.of(model), model.make_cache()
    rows = [fused(mx.array([ids[0][:4]]), cache, 0), *(fused(mx.array([[i]]), cache) for i in ids[0][4:])]
    return np.array(mx.concatenate(rows, axis=1).astype(mx.float32))


def close(got: np.ndarray, expected: np.ndarray, bound: float = 2e-5) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound * np.abs(expected).max())


def expected_logits(tmp_path: Path, parts: dict, **settings: object) -> np.ndarray:
    changed = model_of(**settings)
    adapt(changed, parts, SCALE)
    return logits(load(save_folder(tmp_path / "expected", changed), dtype="float32")[0])


@pytest.mark.parametrize(
    ("kind", "dora"), [("peft", False), ("peft", True), ("mlx-lm", False), ("mlx-lm", True), ("gguf", False)], ids=str
)
def test_each_form_gives_the_changed_model(tmp_path: Path, base: Path, kind: str, dora: bool):
    parts = random_parts(model_of(), PROJECTIONS, dora=dora)
    expected = expected_logits(tmp_path, parts)
    model, _ = load(base, dtype="float32", adapter=write_form(kind, tmp_path / "adapter", parts))
    assert np.abs(expected - logits(load(base, dtype="float32")[0])).max() > 0.1
    close(logits(model), expected)
    close(decoded(model), expected)
    assert "lora_a" not in model.model.layers[0].mlp.up_proj  # merged


@each("dora", [False, True], ids=["lora", "dora"])
@each("names", [PROJECTIONS, ["q_proj", "v_proj"], ["up_proj", "k_proj", "lm_head"]], ids=str)
@each("kind", [T.Q8_0, T.F16, T.Q4_0], ids=lambda kind: kind.name)
def test_beside_packed_weights(tmp_path: Path, kind: T, names: list[str], dora: bool):
    source = model_of()
    path = write_gguf(tmp_path / "m.gguf", source, kind)
    parts = random_parts(source, names, dora=dora)
    adapter = write_peft(tmp_path / "adapter", parts, SCALE)
    dense, _ = load(path, dtype="float32", quantized=False, adapter=adapter)
    model, _ = load(path, dtype="float32", quantized=True, adapter=adapter)
    adapt(source, parts, SCALE)
    expected = logits(load(save_folder(tmp_path / "expected", source), dtype="float32")[0])
    close(logits(dense), expected)
    close(logits(model), expected)
    close(decoded(model), expected)
    projections = [module for name, module in model.named_modules() if name.endswith(tuple(names))]
    assert all("lora_a" in module for module in projections)


def test_several_with_scales(tmp_path: Path, base: Path):
    first, second = random_parts(model_of(), PROJECTIONS, dora=True), random_parts(model_of(), ["q_proj"], 3, seed=5)
    one, two = write_peft(tmp_path / "a", first, SCALE), write_mlx_lm(tmp_path / "b", second, SCALE)
    changed, both = model_of(), model_of()
    adapt(changed, first, SCALE, 0.5)
    for name, value in model_of().state_dict().items():
        adapt(both, {name.removesuffix(".weight"): second[name[:-7]]} if name[:-7] in second else {}, SCALE, -2.0)
        np.copyto(changed.state_dict()[name], changed.state_dict()[name] + both.state_dict()[name] - value)
    expected = logits(load(save_folder(tmp_path / "expected", changed), dtype="float32")[0])
    for names in ([f"{one}:0.5", f"{two}:-2"], [f"{two}:-2.0", f"{one}:0.5"]):
        close(logits(load(base, dtype="float32", adapter=names)[0]), expected)
    plain = logits(load(base, dtype="float32")[0])
    close(logits(load(base, dtype="float32", adapter=f"{one}:0")[0]), plain)


def test_ranks_and_alphas_by_pattern(tmp_path: Path, base: Path):
    parts = random_parts(model_of(), ["q_proj", "k_proj"], 4) | random_parts(model_of(), ["0.mlp.down_proj"], 9)
    folder = write_peft(
        tmp_path / "adapter",
        parts,
        SCALE,
        lora_alpha=2,
        use_rslora=True,
        target_modules=r".*layers\.\d\.self_attn\.(q|k)_proj|model.layers.0.mlp.down_proj",
        rank_pattern={r"layers\.0\.mlp\.down_proj": 9},
        alpha_pattern={"^model.layers.1.self_attn.q_proj": 6, "self_attn.q_proj": 4, "k_pro.": 1},
    )
    scales = {"q_proj": 4 / 2, "k_proj": 1 / 2, "down_proj": 2 / 3}
    changed = model_of()
    for module, part in parts.items():
        first = module == "model.layers.1.self_attn.q_proj"
        adapt(changed, {module: part}, 6 / 2 if first else scales[module.rpartition(".")[2]])
    expected = logits(load(save_folder(tmp_path / "expected", changed), dtype="float32")[0])
    close(logits(load(base, dtype="float32", adapter=folder)[0]), expected)


@pytest.mark.parametrize("targets", ["all-linear", None, [*PROJECTIONS]])
def test_targets_and_layers(tmp_path: Path, base: Path, targets: object):
    parts = random_parts(model_of(), PROJECTIONS)
    layers = None
    if isinstance(targets, list):
        parts = {module: part for module, part in parts.items() if ".layers.1." in module}
        layers = [1]
    folder = write_peft(tmp_path / "adapter", parts, SCALE, target_modules=targets, layers_to_transform=layers)
    close(logits(load(base, dtype="float32", adapter=folder)[0]), expected_logits(tmp_path, parts))


def test_whole_parameters(tmp_path: Path, base: Path):
    """modules_to_save and biases of peft's, fine_tune_type full of mlx-lm's."""
    other, changed = model_of(7), model_of()
    names = ["lm_head.weight", "model.layers.1.self_attn.q_proj.bias", "model.norm.weight"]
    for name in names:
        np.copyto(changed.state_dict()[name], other.state_dict()[name])
    parts = random_parts(model_of(), ["v_proj"])
    folder = write_peft(tmp_path / "a", parts, SCALE, bias="all", modules_to_save=["lm_head", "norm"])
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = other.state_dict()[names[0]]
    tensors["base_model.model.model.layers.1.self_attn.q_proj.base_layer.bias"] = other.state_dict()[names[1]]
    tensors["base_model.model.model.norm.weight"] = other.state_dict()[names[2]]
    write(folder / "adapter_model.safetensors", tensors)
    full = tmp_path / "b"
    full.mkdir()
    write(full / "adapters.safetensors", {name: other.state_dict()[name] for name in names})
    write_json(full / "adapter_config.json", {"fine_tune_type": "full", "num_layers": 2, "lora_parameters": {}})
    expected = logits(load(save_folder(tmp_path / "e1", changed), dtype="float32")[0])
    close(logits(load(base, dtype="float32", adapter=full)[0]), expected)
    adapt(changed, parts, SCALE)
    expected = logits(load(save_folder(tmp_path / "e2", changed), dtype="float32")[0])
    close(logits(load(base, dtype="float32", adapter=folder)[0]), expected)
    with pytest.raises(QwenMLXError, match="cannot be scaled"):
        load(base, adapter=f"{full}:0.5")
    with pytest.raises(QwenMLXError, match="both hold"):
        load(base, adapter=[folder, full])


@each("packed", [False, True], ids=["dense", "packed"])
@each("kind", ["peft", "mlx-lm", "gguf"])
def test_an_embedding_of_a_tied_model(tmp_path: Path, kind: str, packed: bool):
    """mlx-lm's head follows the embedding; peft's and llama.cpp's does not, so that it becomes a matrix of its own."""
    source = model_of(tie_word_embeddings=True)
    path = write_gguf(tmp_path / "m.gguf", source, T.Q8_0)
    parts = random_parts(source, ["embed_tokens"])
    changed = model_of(tie_word_embeddings=kind == "mlx-lm")
    for name, value in source.state_dict().items():
        np.copyto(changed.state_dict()[name], value)
    if kind != "mlx-lm":
        np.copyto(changed.state_dict()["lm_head.weight"], source.state_dict()["model.embed_tokens.weight"])
    adapt(changed, parts, SCALE)
    expected = logits(load(save_folder(tmp_path / "expected", changed), dtype="float32")[0])
    adapter = write_form(kind, tmp_path / "adapter", parts)
    model, _ = load(path, dtype="float32", quantized=packed, adapter=adapter)
    assert model.config.tie_word_embeddings == (kind == "mlx-lm")
    close(logits(model), expected)
    close(decoded(model), expected)


def test_gradients_reach_the_factors_beside_packed_weights(tmp_path: Path):
    source = model_of()
    path = write_gguf(tmp_path / "m.gguf", source, T.Q8_0)
    model, _ = load(path, adapter=write_peft(tmp_path / "a", random_parts(source, ["q_proj"]), SCALE))
    names = {name for name, _ in tree_flatten(model.trainable_parameters()) if "lora_" in name}
    assert names == {f"model.layers.{i}.self_attn.q_proj.lora_{x}" for i in range(2) for x in "ab"}
    projection = model.model.layers[0].self_attn.q_proj

    def loss(a: mx.array) -> mx.array:
        projection["lora_a"] = a
        return model(mx.array(IDS)).square().mean()

    a = projection["lora_a"]
    slope, step = mx.grad(loss)(a), 1e-2
    direction = mx.random.normal(a.shape, key=mx.random.key(1))
    numeric = (loss(a + step * direction) - loss(a - step * direction)).item() / (2 * step)
    assert abs(numeric - (slope * direction).sum().item()) < 2e-2 * abs(numeric)


def test_the_joined_step_sees_a_factor_that_changed(tmp_path: Path):
    source = model_of()
    path = write_gguf(tmp_path / "m.gguf", source, T.Q8_0)
    model, _ = load(path, adapter=write_peft(tmp_path / "a", random_parts(source, PROJECTIONS), SCALE))
    close(decoded(model), logits(model))
    projection = model.model.layers[0].self_attn.k_proj
    projection["lora_b"] = projection["lora_b"] * 2
    close(decoded(model), logits(model))


def test_a_prompt_cache_belongs_to_its_adapter(tmp_path: Path, base: Path):
    parts = random_parts(model_of(), ["q_proj"])
    adapter = write_peft(tmp_path / "a", parts, SCALE)
    models = [load(base, adapter=names)[0] for names in (None, adapter, f"{adapter}:1e-6", f"{adapter}:0.5")]
    assert len({fingerprint(model) for model in models}) == 4
    cache = PromptCache(models[1])
    cache.keep([1, 2, 3])
    models[1](mx.array([[1, 2, 3]]), cache.layers)
    cache.record([1, 2, 3], cache.layers)
    cache.save(tmp_path / "cache.safetensors")
    PromptCache.load(tmp_path / "cache.safetensors", models[1])
    with pytest.raises(QwenMLXError, match="another model"):
        PromptCache.load(tmp_path / "cache.safetensors", models[0])


def test_commands_take_adapters(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture):
    adapter = write_peft(tmp_path / "a", random_parts(model_of(), PROJECTIONS), SCALE)
    (tmp_path / "t.txt").write_text("hello hello hell " * 8)
    results = []
    for extra in ([], ["--adapter", str(adapter)], ["--adapter", f"{adapter}:0"]):
        arguments = ["--model", str(base), "--text", str(tmp_path / "t.txt"), *extra]
        assert dispatch(["evaluate", *arguments]) == 0
        results.append(capsys.readouterr().out)
    assert results[0] == results[2] != results[1]
    generate = ["generate", "--model", str(base), "--prompt", "hello", "--raw", "--temp", "0", "-n", "4"]
    assert dispatch([*generate, "--verbose", "--adapter", f"{adapter}:0.5"]) == 0
    assert f"adapter: {adapter}:0.5" in capsys.readouterr().err


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_ranks_get_their_parts(tmp_path: Path, base: Path, dora: bool):
    """Side by side the ranks' parts are the matrix that one rank has."""
    adapter = write_peft(tmp_path / "a", random_parts(model_of(), PROJECTIONS, dora=dora), SCALE)
    checkpoint = adapted(open_checkpoint(base), str(adapter))
    shards = [Shard(rank, 2, checkpoint.config) for rank in range(2)]
    for name, delta in checkpoint.deltas.items():
        whole = merged(checkpoint.parameters[name], delta)
        cuts = [shard.cut(name) for shard in shards]
        parts = [merged(checkpoint.parameters[name].part(*cut), delta.part(*cut)).values() for cut in cuts]
        by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
        np.testing.assert_allclose(np.concatenate(parts, axis=int(by_columns)), whole.values(), rtol=1e-5, atol=1e-6)
        for cut, part in zip(cuts, parts):
            np.testing.assert_allclose(whole.part(*cut).values(), part, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot apply


def refusal(base: Path, adapter: object) -> str:
    with pytest.raises(QwenMLXError) as caught:
        load(base, adapter=adapter)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["peft", "mlx-lm", "gguf"])
def test_another_models_adapter(tmp_path: Path, base: Path, kind: str):
    wider = random_parts(model_of(hidden_size=128), ["q_proj"])
    assert "(128, 128)" in refusal(base, write_form(kind, tmp_path / "wide", wider))
    longer = random_parts(model_of(num_hidden_layers=3), ["q_proj"])
    sentence = refusal(base, write_form(kind, tmp_path / "long", longer))
    assert ("blk.2.attn_q" if kind == "gguf" else "model.layers.2.self_attn.q_proj") in sentence
    assert "belongs to another" in sentence


@pytest.mark.parametrize("kind", ["peft", "mlx-lm"])
def test_fewer_tensors_than_the_configuration_names(tmp_path: Path, base: Path, kind: str):
    fewer = random_parts(model_of(), ["0.self_attn.q_proj"])
    assert "no tensors for 'model.layers.1.self_attn.q_proj'" in refusal(base, write_form(kind, tmp_path / "a", fewer))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": 3}, "peft_type is 3"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"use_dora": True}, "lacks a magnitude"),
        ({"r": 5}, "the rank 5, but its tensors have 4"),
        ({"r": "four"}, "r is 'four'"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": {"((": 1}}, "no regular expression"),
        ({"target_modules": "(("}, "no regular expression"),
        ({"target_modules": 7}, "target_modules is 7"),
        ({"target_modules": ["q_proj", "v_proj"]}, "no tensors for 'model.layers.0.self_attn.v_proj'"),
        ({"target_modules": ["v_proj"], "exclude_modules": ["v_proj"]}, "does not name"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"layers_to_transform": [0]}, "tensors for 'model.layers.1.self_attn.q_proj', which"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_to_transform"),
    ],
    ids=str,
)
def test_configurations_that_mean_something_else(tmp_path: Path, base: Path, changes: dict, words: str):
    adapter = write_peft(tmp_path / "a", random_parts(model_of(), ["q_proj"]), SCALE, **changes)
    assert words in refusal(base, adapter)


def test_a_pattern_that_never_ends(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch):
    from qwen_mlx.loading.adapters import patterns

    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    parts = random_parts(model_of(), ["q_proj"])
    assert "take more than" in refusal(base, write_peft(tmp_path / "a", parts, SCALE, target_modules=r"([\w.]+)+!"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fine_tune_type": "prompt"}, "fine_tune_type"),
        ({"fine_tune_type": "dora"}, "lora_a, lora_b and m"),
        ({"lora_parameters": {"rank": 4}}, "scale is None"),
        ({"lora_parameters": {"rank": 5, "scale": 1.0}}, "rank 5"),
        ({"lora_parameters": {"rank": True, "scale": 1.0}}, "rank is True"),
        ({"lora_parameters": []}, "lora_parameters is []"),
        ({"lora_parameters": {"rank": 4, "scale": 1, "keys": ["mlp.up_proj"]}}, "no tensors for 'model.layers.0.mlp"),
        ({"num_layers": "all"}, "'all' layers"),
    ],
    ids=str,
)
def test_configurations_of_mlx_lm(tmp_path: Path, base: Path, changes: dict, words: str):
    assert words in refusal(base, write_mlx_lm(tmp_path / "a", random_parts(model_of(), ["q_proj"]), SCALE, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": "model"}, "general.type is 'model'"),
        ({"adapter_type": "control_vector"}, "adapter.type is 'control_vector'"),
        ({"architecture": "llama"}, "general.architecture is 'llama'"),
        ({"alpha": float("nan")}, "adapter.lora.alpha is nan"),
    ],
    ids=str,
)
def test_gguf_fields(tmp_path: Path, base: Path, changes: dict, words: str):
    parts = random_parts(model_of(), ["q_proj"])
    assert words in refusal(base, write_gguf_adapter(tmp_path / "a.gguf", parts, SCALE, 2, **changes))


@pytest.mark.parametrize("kind", ["peft", "mlx-lm", "gguf"])
def test_numbers_that_are_none(tmp_path: Path, base: Path, kind: str):
    parts = random_parts(model_of(), ["q_proj"])
    next(iter(parts.values())).b[3, 2] = np.nan
    sentence = refusal(base, write_form(kind, tmp_path / "a", parts))
    assert re.search("lora_[ab].* not finite", sentence, re.IGNORECASE)


def test_a_sum_beyond_float32(tmp_path: Path, base: Path):
    parts = random_parts(model_of(), ["q_proj"])
    next(iter(parts.values())).b[:] = 3e38
    assert "beyond float32" in refusal(base, write_peft(tmp_path / "a", parts, SCALE))


def test_files_that_are_missing_or_pickles(tmp_path: Path, base: Path):
    parts = random_parts(model_of(), ["q_proj"])
    folder = write_peft(tmp_path / "a", parts, SCALE)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    sentence = refusal(base, folder)
    assert re.search("adapter_model.bin.* save it again as safetensors", sentence)
    (folder / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors is missing" in refusal(base, folder)
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json" in refusal(base, folder)
    shutil.copy(write_gguf_adapter(tmp_path / "g.gguf", parts, 1, 2), folder)
    assert "g.gguf" in refusal(base, folder)
    write_json(folder / "adapter_config.json", {"x": 1})
    assert "neither peft's" in refusal(base, folder)
    assert "no such file or folder" in refusal(base, tmp_path / "nothing")
    assert "is no adapter" in refusal(base, base / "config.json")
    assert "expected PATH" in refusal(base, 5)
    assert "expected PATH" in refusal(base, f"{base / 'x'}:inf")
    assert "changes nothing" in refusal(base, empty(tmp_path / "e"))


def empty(folder: Path) -> Path:
    folder.mkdir()
    write(folder / "adapters.safetensors", {})
    write_json(folder / "adapter_config.json", {"fine_tune_type": "full"})
    return folder


def test_an_adapter_is_no_model(tmp_path: Path):
    parts = random_parts(model_of(), ["q_proj"])
    for path in (write_peft(tmp_path / "a", parts, 1), write_gguf_adapter(tmp_path / "a.gguf", parts, 1, 2)):
        with pytest.raises(QwenMLXError, match="--adapter"):
            load(path)


def test_a_resized_vocabulary(tmp_path: Path, base: Path):
    folder = write_peft(tmp_path / "a", random_parts(model_of(), ["q_proj"]), 1)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = np.zeros((300, 64), np.float32)
    write(folder / "adapter_model.safetensors", tensors)
    assert "its vocabulary was resized" in refusal(base, folder)


def test_the_config_is_json(tmp_path: Path, base: Path):
    folder = write_peft(tmp_path / "a", random_parts(model_of(), ["q_proj"]), 1)
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text[:-1])
    assert "not valid JSON" in refusal(base, folder)
    assert json.loads(text)
