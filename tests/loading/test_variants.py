"""Checkpoints that differ from a plain Qwen2 in their tensors or leave fields out: the same function, and a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from qwen_mlx import GGUFError, QwenMLXError, convert, load, load_encoder, score
from qwen_mlx.backend import mx
from qwen_mlx.model.fused import FusedModel
from reference.lazy import torch, transformers
from reference.small_models import RandomModel, save_folder, to_hf, write_gguf
from tests.helpers.cases import each
from tests.helpers.foreign import Stored, write_safetensors
from tests.helpers.peers import IDS, distance, tolerance, torch_logits

T = gguf.GGMLQuantizationType
LAYERS = range(3)
Change = Callable[[dict[str, Stored]], None]


def folder_of(path: Path, model: RandomModel, change: Change | None = None, **config: object) -> Path:
    """The model's folder after `change` to its tensors and to config.json; a field that is ... is left out."""
    save_folder(path, model)
    tensors: dict[str, Stored] = {name: ("F32", array) for name, array in model.state_dict().items()}
    if change:
        change(tensors)
    write_safetensors(path / "model.safetensors", tensors)
    settings = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    return path


def logits(path: Path, ids: list[list[int]] = IDS, **arguments: object) -> np.ndarray:
    return np.array(load(path, **arguments)[0](mx.array(ids)))


def add_biases(tensors: dict[str, Stored], values: np.ndarray | None = None) -> None:
    """A bias for o, gate, up and down of every layer; zero without `values`."""
    for name, (_, array) in list(tensors.items()):
        if name.endswith(("o_proj.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight")):
            bias = np.zeros(len(array)) if values is None else np.resize(values, len(array))
            tensors[name.replace("weight", "bias")] = "F32", bias.astype(np.float32)


def fuse(tensors: dict[str, Stored]) -> None:
    for i in LAYERS:
        for kind in ("weight", "bias"):
            names = [f"model.layers.{i}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            joined = np.concatenate([tensors.pop(name)[1] for name in names])
            tensors[f"model.layers.{i}.self_attn.qkv_proj.{kind}"] = "F32", joined
        names = [f"model.layers.{i}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        joined = np.concatenate([tensors.pop(name)[1] for name in names])
        tensors[f"model.layers.{i}.mlp.gate_up_proj.weight"] = "F32", joined


def renamed(rename: Callable[[str], str]) -> Change:
    def change(tensors: dict[str, Stored]) -> None:
        items = [(rename(name), value) for name, value in tensors.items()]
        tensors.clear()
        tensors.update(items)

    return change


def add_value_head(tensors: dict[str, Stored]) -> None:
    tensors["v_head.summary.weight"] = "F32", np.ones((1, 64), np.float32)
    tensors["v_head.summary.bias"] = "F32", np.ones(1, np.float32)


def to_float64(tensors: dict[str, Stored]) -> None:
    for name, (_, array) in tensors.items():
        tensors[name] = "F64", array.astype(np.float64)


SAME = {  # the same model: what differs, and what is said
    "biases that are zero": (add_biases, ""),
    "fused projections": (fuse, ""),
    "prefix of a wrapper": (renamed(lambda name: f"language_model.{name}"), ""),
    "prefix of an adapter": (renamed(lambda name: f"base_model.model.{name}"), ""),
    "names of the bare model": (renamed(lambda name: name.removeprefix("model.")), ""),
    "value head": (add_value_head, "the value head (v_head.summary.weight) is left out"),
    "float64": (to_float64, ""),
}


def test_a_copy_beside_the_model_is_not_taken_for_it(tmp_path: Path):
    def change(tensors: dict[str, Stored]) -> None:
        tensors.update({f"ema.{name}": (kind, array * 0) for name, (kind, array) in list(tensors.items())})

    with pytest.raises(QwenMLXError, match=r"tensor 'ema\.lm_head\.weight' is not part"):
        load(folder_of(tmp_path / "copied", RandomModel(), change))


@each("kind", SAME)
def test_the_same_model(tmp_path: Path, kind: str, capsys):
    change, said = SAME[kind]
    model = RandomModel()
    plain, other = folder_of(tmp_path / "plain", model), folder_of(tmp_path / "other", model, change)
    expected = logits(plain)
    capsys.readouterr()
    np.testing.assert_array_equal(logits(other), expected)
    assert said in capsys.readouterr().err
    report = convert(other, tmp_path / "out", dtype="float32")
    assert all(row.exact for row in report)
    np.testing.assert_array_equal(logits(tmp_path / "out"), expected)


def test_a_tied_model_with_a_copy_of_its_embedding(tmp_path: Path, capsys):
    model = RandomModel(tie_word_embeddings=True)

    def change(tensors: dict[str, Stored]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    expected = logits(folder_of(tmp_path / "plain", model))
    np.testing.assert_array_equal(logits(folder_of(tmp_path / "copy", model, change)), expected)
    assert not capsys.readouterr().err


def test_a_tied_model_with_a_head_of_its_own_is_transformers_s(tmp_path: Path, capsys):
    model = RandomModel(tie_word_embeddings=True)
    head = np.random.default_rng(1).standard_normal((263, 64)).astype(np.float32)

    def change(tensors: dict[str, Stored]) -> None:
        tensors["lm_head.weight"] = "F32", head

    folder = folder_of(tmp_path / "m", model, change)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert distance(mx.array(logits(folder)), torch_logits(theirs)) < tolerance(theirs)
    assert "has an lm_head of its own; it is used" in capsys.readouterr().err


def test_a_tied_model_whose_only_matrix_is_its_head_is_transformers_s(tmp_path: Path, capsys):
    def change(tensors: dict[str, Stored]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    def wrap(tensors: dict[str, Stored]) -> None:
        change(tensors)
        renamed(lambda name: f"language_model.{name}")(tensors)

    folder = folder_of(tmp_path / "m", RandomModel(tie_word_embeddings=True), change)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert distance(mx.array(logits(folder)), torch_logits(theirs)) < tolerance(theirs)
    assert "the checkpoint has no embedding; its lm_head" in capsys.readouterr().err
    wrapped = folder_of(tmp_path / "w", RandomModel(tie_word_embeddings=True), wrap)
    np.testing.assert_array_equal(logits(wrapped), logits(folder))


def add_scores(tensors: dict[str, Stored]) -> None:
    tensors["score.weight"] = "F32", np.ones((2, 64), np.float32)


def test_a_classification_head_beside_a_language_head_is_chosen_by_the_architecture(tmp_path: Path, capsys):
    model = RandomModel()
    expected = logits(folder_of(tmp_path / "plain", model))
    np.testing.assert_array_equal(logits(folder_of(tmp_path / "text", model, add_scores)), expected)
    assert "classification head (score.weight) is left out, because config.json's arch" in capsys.readouterr().err
    classes = {"architectures": ["Qwen2ForSequenceClassification"]}
    folder = folder_of(tmp_path / "scores", model, add_scores, **classes)
    assert score(load_encoder(folder), ["x"]).shape == (1, 2)
    assert "the language head (lm_head.weight) is left out, because config.json's arch" in capsys.readouterr().err
    with pytest.raises(QwenMLXError, match=r"no language head"):
        load(folder)
    load_encoder(folder_of(tmp_path / "none", model, **classes))
    assert "names a model with scores, but the checkpoint has no score.weight" in capsys.readouterr().err


@each(
    ("name", "message"),
    [
        ("score.weight", r"classification head \(score.weight\) and no lm_head, but .* write Qwen2ForSequenceClass"),
        ("qa_outputs.weight", r"'qa_outputs.weight' is not part of this model, but of a head that is not computed"),
    ],
)
def test_a_head_of_another_architecture_is_named(tmp_path: Path, name: str, message: str):
    def change(tensors: dict[str, Stored]) -> None:
        array = tensors["lm_head.weight"]
        tensors[name] = array
        if name == "score.weight":
            del tensors["lm_head.weight"]

    with pytest.raises(QwenMLXError, match=message):
        load(folder_of(tmp_path / "m", RandomModel(), change))


@each("value", [np.nan, np.inf, 1e300])
@each("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.bias"])
def test_a_vector_that_is_not_finite_is_refused(tmp_path: Path, name: str, value: float):
    def change(tensors: dict[str, Stored]) -> None:
        array = tensors[name][1].astype(np.float64)
        array[3] = value
        tensors[name] = "F64", array

    def edit(writer, tensors) -> None:
        tensors["blk.1.attn_k.bias"] = np.full(len(tensors["blk.1.attn_k.bias"][0]), value, np.float64), T.F64

    with pytest.raises(QwenMLXError, match=f"tensor '{name}' has inf or NaN among its values, expected finite"):
        load(folder_of(tmp_path / "m", RandomModel(), change))
    with pytest.raises(GGUFError, match=r"tensor 'blk.1.attn_k.bias' has inf or NaN among its values"):
        convert(write_gguf(tmp_path / "m.gguf", RandomModel(), edit=edit), tmp_path / "out")


def test_biases_that_are_not_zero_are_added(tmp_path: Path, capsys):
    model, values = RandomModel(), np.linspace(-1, 1, 37)
    folder = folder_of(tmp_path / "m", model, lambda tensors: add_biases(tensors, values))
    theirs = to_hf(model)
    for layer in theirs.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            bias = np.resize(values, module.out_features).astype(np.float32)
            module.bias = torch.nn.Parameter(torch.from_numpy(bias))
    assert distance(mx.array(logits(folder)), torch_logits(theirs)) < tolerance(theirs)
    assert "biases that a Qwen2 lacks" in capsys.readouterr().err
    convert(folder, tmp_path / "out", dtype="float32")
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(folder))


def test_a_bias_of_one_layer_is_zero_in_the_others(tmp_path: Path):
    name = "model.layers.1.self_attn.o_proj.bias"

    def one(tensors: dict[str, Stored]) -> None:
        tensors[name] = "F32", np.ones(64, np.float32)

    def all_layers(tensors: dict[str, Stored]) -> None:
        one(tensors)
        for i in (0, 2):
            tensors[name.replace("1", str(i))] = "F32", np.zeros(64, np.float32)

    model = RandomModel()
    first, second = (
        folder_of(tmp_path / "a", model, one),
        folder_of(tmp_path / "b", model, all_layers, o_proj_bias=True),
    )
    np.testing.assert_array_equal(logits(first), logits(second))
    assert np.abs(logits(first) - logits(folder_of(tmp_path / "c", model))).max() > 0.1


def without_biases(model: RandomModel) -> RandomModel:
    for name, array in model.state_dict().items():
        if name.endswith("bias"):
            array[...] = 0
    return model


def test_no_biases_at_all(tmp_path: Path, capsys):
    model = without_biases(RandomModel())

    def change(tensors: dict[str, Stored]) -> None:
        for name in [name for name in tensors if name.endswith("bias")]:
            del tensors[name]

    expected = logits(folder_of(tmp_path / "plain", model))
    assert not capsys.readouterr().err
    np.testing.assert_array_equal(logits(folder_of(tmp_path / "m", model, change)), expected)
    assert "9 biases are missing" in capsys.readouterr().err


def test_a_file_that_has_some_of_its_biases_is_damaged(tmp_path: Path):
    name = "model.layers.1.self_attn.k_proj.bias"
    with pytest.raises(QwenMLXError, match=f"tensor '{name}' is missing"):
        load(folder_of(tmp_path / "m", RandomModel(), lambda tensors: tensors.pop(name)))
    path = write_gguf(tmp_path / "m.gguf", RandomModel(), edit=lambda _, tensors: tensors.pop("blk.1.attn_k.bias"))
    with pytest.raises(QwenMLXError, match=r"tensor 'blk.1.attn_k.bias' missing"):
        load(path)


@pytest.mark.parametrize("what", ["fused", "no biases", "o_proj bias"])
def test_gguf(tmp_path: Path, what: str, capsys):
    model = without_biases(RandomModel()) if what == "no biases" else RandomModel()

    def edit(writer, tensors) -> None:
        for i in LAYERS:
            for kind in ("weight", "bias"):
                names = [f"blk.{i}.attn_{part}.{kind}" for part in "qkv"]
                if what == "fused":
                    arrays, kinds = zip(*(tensors.pop(name) for name in names))
                    tensors[f"blk.{i}.attn_qkv.{kind}"] = np.concatenate(arrays), kinds[0]
                elif what == "no biases" and kind == "bias":
                    for name in names:
                        del tensors[name]
            if what == "o_proj bias":
                tensors[f"blk.{i}.attn_output.bias"] = np.full(64, 0.5 + i, np.float32), tensors[names[0]][1]

    path = write_gguf(tmp_path / "m.gguf", model, edit=edit)
    change = None
    if what == "o_proj bias":

        def change(tensors: dict[str, Stored]) -> None:
            for i in LAYERS:
                tensors[f"model.layers.{i}.self_attn.o_proj.bias"] = "F32", np.full(64, 0.5 + i, np.float32)

    expected = logits(folder_of(tmp_path / "m", model, change))
    capsys.readouterr()
    np.testing.assert_array_equal(logits(path), expected)
    assert ("9 biases are missing, such as 'blk.0.attn_q.bias'" in capsys.readouterr().err) == (what == "no biases")


@pytest.mark.parametrize("kind", [T.F16, T.Q8_0, T.NVFP4], ids=["float16", "q8_0", "nvfp4"])
def test_a_gguf_s_factor_of_a_matrix(tmp_path: Path, kind: T, capsys):
    """NVFP4's second scale, which llama.cpp reads beside a matrix of any type."""
    model, factors = RandomModel(), {"ffn_up": "mlp.up_proj", "attn_q": "self_attn.q_proj"}
    state, rng = model.state_dict(), np.random.default_rng(0)

    def edit(writer, tensors) -> None:
        for short, name in factors.items():
            weight = state[f"model.layers.1.{name}.weight"]
            if kind == T.NVFP4:
                raw = rng.integers(0, 256, (weight.shape[0], weight.shape[1] // 64, 36), np.uint8)
                raw[..., :4] = rng.integers(0x18, 0x28, raw[..., :4].shape)  # scales of 2^-4 to 2^-2
                raw = raw.reshape(weight.shape[0], -1)
                tensors[f"blk.1.{short}.weight"] = raw, kind
                weight[...] = gguf.quants.dequantize(raw, kind)
            weight *= np.float32(0.3)
            tensors[f"blk.1.{short}.scale"] = np.array([0.3], np.float32), T.F32
            tensors[f"blk.1.{short}.input_scale"] = np.array([7], np.float32), T.F32

    path = write_gguf(tmp_path / "m.gguf", model, T.F32 if kind == T.NVFP4 else kind, edit)
    folder = folder_of(tmp_path / "m", model)
    np.testing.assert_array_equal(logits(path, quantized=False), logits(folder, quantized=False))
    assert "made for quantized activations" in capsys.readouterr().err
    convert(path, tmp_path / "out", dtype="float32")
    np.testing.assert_allclose(logits(tmp_path / "out"), logits(folder), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "blk.1.ffn_up.scale",
            np.ones(2, np.float32),
            r"ffn_up.scale' is F32 of shape \(2,\), expected one F32",
        ),
        ("blk.1.ffn_up.scale", np.float32([np.nan]), r"'blk.1.ffn_up.scale' is inf or NaN"),
        ("blk.9.ffn_up.scale", np.ones(1, np.float32), r"'blk.9.ffn_up.scale' has no 'blk.9.ffn_up.weight' to scale"),
    ],
)
def test_a_damaged_factor(tmp_path: Path, name: str, array: np.ndarray, message: str):
    path = write_gguf(
        tmp_path / "m.gguf", RandomModel(), edit=lambda writer, tensors: tensors.update({name: (array, T.F32)})
    )
    with pytest.raises(QwenMLXError, match=message):
        load(path)


def test_more_rows_than_vocab_size(tmp_path: Path, capsys):
    folder = folder_of(tmp_path / "m", RandomModel(vocab_size=270), vocab_size=263)
    assert logits(folder).shape[-1] == 270
    assert "config.json says vocab_size 263, but the embedding has 270 rows" in capsys.readouterr().err


def test_fields_that_config_json_leaves_out_are_transformers_s(tmp_path: Path):
    left_out = dict.fromkeys(("tie_word_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta"), ...)
    model = RandomModel(rope_theta=10000.0, num_key_value_heads=4, max_position_embeddings=32768)
    folder = folder_of(tmp_path / "m", model, **left_out, num_key_value_heads=None, max_position_embeddings=...)
    settings = json.loads((folder / "config.json").read_text())
    assert not settings.keys() & left_out.keys()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert distance(mx.array(logits(folder)), torch_logits(theirs)) < tolerance(theirs)
    assert load(folder)[0].config.context_length == theirs.config.max_position_embeddings


@each(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "x.lora_b",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "lm_head.modules_to_save.default.weight",
    ],
)
@each("alone", [True, False])
def test_an_adapter_that_is_not_merged(tmp_path: Path, name: str, alone: bool):
    def change(tensors: dict[str, Stored]) -> None:
        if alone:
            tensors.clear()
        tensors[name] = "F32", np.ones((4, 64), np.float32)

    folder = folder_of(tmp_path / "m", RandomModel(), change)
    with pytest.raises(QwenMLXError, match=rf"model.safetensors: tensor '{name}' is of a LoRA adapter; merge it"):
        load(folder)


def test_code_of_a_folder_s_own_is_not_run_and_said(tmp_path: Path, capsys):
    own, gte = (
        {"AutoModel": f"{name}.Qwen2Model", "AutoConfig": "configuration.C"} for name in ("modeling", "modeling_qwen")
    )
    reward = {"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"}
    for i, (classes, said) in enumerate(((own, True), (gte, False), (reward, False), ({"AutoConfig": "x.C"}, False))):
        folder = folder_of(tmp_path / str(i), RandomModel(), auto_map=classes, is_causal=True)
        load(folder)
        assert ("code of its own (modeling.Qwen2Model), which is not run" in capsys.readouterr().err) == said


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_with_a_bias(tmp_path: Path, tied: bool):
    """llama.cpp adds it to the logits of either head; a folder's tied head has none in any library."""
    model, bias = RandomModel(tie_word_embeddings=tied), np.linspace(-3, 3, 263).astype(np.float32)
    path = write_gguf(
        tmp_path / "m.gguf", model, edit=lambda _, tensors: tensors.update({"output.bias": (bias, T.F32)})
    )
    expected = logits(folder_of(tmp_path / "plain", model)) + bias
    # The tied head is another product, with sums in another order: 8.3e-7 of logits up to 8.
    close = {"rtol": 0, "atol": 2e-6 if tied else 0}
    np.testing.assert_allclose(logits(path), expected, **close)
    convert(path, tmp_path / "out", dtype="float32")
    np.testing.assert_allclose(logits(tmp_path / "out"), expected, **close)

    folder = folder_of(tmp_path / "m", model, lambda tensors: tensors.update({"lm_head.bias": ("F32", bias)}))
    if tied:
        with pytest.raises(QwenMLXError, match=r"'lm_head.bias' is not zero, and a head that shares the embedding's"):
            load(folder)
    else:
        np.testing.assert_array_equal(logits(folder), expected)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj.bias", "lm_head.bias"])
def test_decoding_adds_a_bias_that_a_qwen2_lacks(tmp_path: Path, name: str):
    """A token after others is computed in another way than a prompt."""

    def change(tensors: dict[str, Stored]) -> None:
        tensors[name] = "F32", np.ones(len(tensors[name.replace("bias", "weight")][1]), np.float32)

    model, _ = load(folder_of(tmp_path / "m", RandomModel(), change))
    fused, cache = FusedModel.of(model), model.make_cache()
    whole = np.array(model(mx.array(IDS)))[0, -1]
    fused(mx.array([IDS[0][:-1]]), cache)
    assert np.abs(np.array(fused(mx.array([IDS[0][-1:]]), cache))[0, -1] - whole).max() < 1e-4
