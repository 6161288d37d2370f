"""The model against transformers on small random models, loaded from GGUF and from safetensors, in float32 on the CPU.

The tolerance of each comparison is four times the noise that transformers' float32 shows against its own float64 on the
same model and ids: two implementations may each be off by that noise, and their difference by twice as much.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from mlx.utils import tree_flatten
from safetensors.torch import save_file

from qwen_mlx import QwenMLXError, load
from qwen_mlx.backend import mx
from qwen_mlx.gguf.reader import GGUFFile
from qwen_mlx.loading.load import DTYPES
from qwen_mlx.model.layers import QuantizedLinear, matrix_of
from reference.small_models import hf_model, save_folder, write_gguf
from tests.helpers.cases import each
from tests.helpers.peers import IDS, distance, tolerance, torch_logits

SHAPES = {
    "gqa 2": {},
    "gqa 1": {"num_key_value_heads": 4},
    "gqa 7, head size 32": {"hidden_size": 224, "num_attention_heads": 7, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "one layer": {"num_hidden_layers": 1},
    "theta 1e4": {"rope_theta": 10000.0},
    "eps 1e-5": {"rms_norm_eps": 1e-5},
    "large eps": {"rms_norm_eps": 0.5},
}


@each("shape", SHAPES)
@each("source", ["gguf", "safetensors"])
def test_logits_equal_transformers(shape: str, source: str, tmp_path: Path):
    theirs = hf_model(**SHAPES[shape])
    path = write_gguf(tmp_path / "m.gguf", theirs) if source == "gguf" else save_folder(tmp_path / "m", theirs)
    model, _ = load(path, dtype="float32")
    assert distance(model(mx.array(IDS)), torch_logits(theirs)) < tolerance(theirs)


ROW_TYPES = [T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K]


@each("packed", [False, True], ids=["dense", "packed"])
@each("kind", ROW_TYPES, ids=lambda kind: kind.name)
def test_every_file_type_gives_the_logits_of_gguf_py_s_values(kind: T, packed: bool, tmp_path: Path):
    theirs = hf_model(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    path = write_gguf(tmp_path / "m.gguf", theirs, kind)
    model, _ = load(path, dtype="float32", quantized=packed)
    assert distance(model(mx.array(IDS)), torch_logits(theirs)) < tolerance(theirs)
    quantized = packed and kind not in (T.F16, T.BF16)
    modules = dict(model.named_modules())
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert isinstance(modules[f"model.layers.0.{module}"], QuantizedLinear) == quantized
    matrix = matrix_of(modules["model.layers.0.mlp.down_proj"])
    # A CPU reads every block as it lies, a GPU only these two; the others become MLX's affine form there.
    assert (matrix.packing.kind == "affine") == (
        quantized and mx.default_device() != mx.cpu and kind not in (T.Q4_K, T.Q6_K)
    )
    if quantized and matrix.packing.kind != "affine":
        kept = sum(array.nbytes for array in matrix.arrays)
        assert kept == GGUFFile(path).tensors["blk.0.ffn_down.weight"].nbytes, "the file's bytes, and no more"


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_projections_of_different_types_side_by_side(packed: bool, tmp_path: Path):
    """As in real Q4_K_M files, where v is finer than q and k."""
    kinds = {}
    for i, (q, k, v, gate, up) in enumerate(
        [
            (T.Q5_0, T.Q5_0, T.Q8_0, T.Q4_K, T.Q4_K),
            (T.Q4_K, T.Q6_K, T.Q4_K, T.Q8_0, T.Q6_K),
            (T.F16, T.Q4_0, T.Q6_K, T.F16, T.Q6_K),
        ]
    ):
        kinds |= {
            f"model.layers.{i}.self_attn.{name}_proj.weight": kind for name, kind in (("q", q), ("k", k), ("v", v))
        }
        kinds |= {f"model.layers.{i}.mlp.{name}_proj.weight": kind for name, kind in (("gate", gate), ("up", up))}
    theirs = hf_model(hidden_size=256, intermediate_size=512)
    model, _ = load(write_gguf(tmp_path / "m.gguf", theirs, kinds), dtype="float32", quantized=packed)
    assert distance(model(mx.array(IDS)), torch_logits(theirs)) < tolerance(theirs)


def test_hf_parameters_are_those_of_transformers_by_value(tmp_path: Path):
    theirs = hf_model()
    model, _ = load(write_gguf(tmp_path / "m.gguf", theirs), dtype="float32")
    mine = model.hf_parameters()
    assert mine.keys() == theirs.state_dict().keys() == model.config.parameter_shapes().keys()
    for name, value in theirs.state_dict().items():
        assert np.array_equal(np.array(mine[name]), value.numpy()), name


@pytest.mark.parametrize("kind", [T.F32, T.Q4_K, T.Q8_0], ids=lambda kind: kind.name)
def test_mlp_biases_are_used_when_the_file_has_them(kind: T, tmp_path: Path):
    sizes, arguments = {"hidden_size": 256, "intermediate_size": 512}, {"dtype": "float32", "quantized": kind != T.F32}
    theirs = hf_model(**sizes)
    torch.manual_seed(5)
    for layer in theirs.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(layer.mlp, name)
            new = torch.nn.Linear(old.in_features, old.out_features, bias=True)
            new.weight = old.weight
            torch.nn.init.normal_(new.bias, std=30)  # random blocks have large products
            setattr(layer.mlp, name, new)
    without, _ = load(write_gguf(tmp_path / "without.gguf", hf_model(**sizes), kind), **arguments)
    model, _ = load(write_gguf(tmp_path / "with.gguf", theirs, kind), **arguments)
    assert distance(model(mx.array(IDS)), torch_logits(theirs)) < tolerance(theirs)
    assert distance(without(mx.array(IDS)), torch_logits(theirs)) > 10 * tolerance(theirs)
    assert not any("mlp" in name and "bias" in name for name, _ in tree_flatten(without.parameters()))


def test_sliding_window_and_yarn_equal_transformers(tmp_path: Path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    for overrides in (
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        {"rope_parameters": yarn, "max_position_embeddings": 256},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ):
        theirs = hf_model(**overrides)
        model, _ = load(save_folder(tmp_path / "m", theirs), dtype="float32")
        ids = [[int(i) for i in np.random.default_rng(1).integers(0, 260, 100)]]
        assert distance(model(mx.array(ids)), torch_logits(theirs, ids)) < tolerance(theirs, ids), overrides


def test_chunks_decode_and_last_logits_equal_one_pass(tmp_path: Path):
    theirs = hf_model()
    model, _ = load(write_gguf(tmp_path / "m.gguf", theirs), dtype="float32")
    whole, limit = torch_logits(theirs), tolerance(theirs)
    for sizes in ([17], [5, 12], [1] * 17, [16, 1]):
        cache, parts, at = model.make_cache(), [], 0
        for size in sizes:
            parts.append(model(mx.array(IDS)[:, at : at + size], cache))
            at += size
        assert distance(mx.concatenate(parts, axis=1), whole) < limit
        assert cache[0].offset == 17
    assert distance(model(mx.array(IDS), logits_to_keep=1), whole[:, -1:]) < limit


def test_cache_grows_past_its_step_and_trims(tmp_path: Path):
    theirs = hf_model(max_position_embeddings=1024)
    model, _ = load(write_gguf(tmp_path / "m.gguf", theirs), dtype="float32")
    ids = [[int(i) for i in np.random.default_rng(2).integers(0, 260, 600)]]
    cache = model.make_cache()
    for at in range(0, 600, 100):
        logits = model(mx.array(ids)[:, at : at + 100], cache)
    whole, limit = torch_logits(theirs, ids), tolerance(theirs, ids)
    assert distance(logits, whole[:, 500:]) < limit
    for layer in cache:
        layer.trim(50)
    again = model(mx.array(ids)[:, 550:], cache)
    assert distance(again, whole[:, 550:]) < limit


def mutations(state: dict[str, torch.Tensor]):
    """(name, changed weights): each a way in which a port has gone wrong before."""
    layer = "model.layers.1."

    def changed(**edits):
        return state | {layer + name.replace("__", "."): value for name, value in edits.items()}

    q, k = state[layer + "self_attn.q_proj.weight"], state[layer + "self_attn.k_proj.weight"]
    gate, up = state[layer + "mlp.gate_proj.weight"], state[layer + "mlp.up_proj.weight"]
    rows, heads = q.shape[0], 4
    size = rows // heads
    unpermuted = q.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(rows, -1)  # undoes llama.cpp's row order
    yield "q_proj transposed", changed(self_attn__q_proj__weight=q.T.contiguous())
    o = state[layer + "self_attn.o_proj.weight"]
    yield "o_proj transposed", changed(self_attn__o_proj__weight=o.T.contiguous())
    yield "gate and up swapped", changed(mlp__gate_proj__weight=up, mlp__up_proj__weight=gate)
    yield "q and k swapped", changed(self_attn__q_proj__weight=k, self_attn__k_proj__weight=q)
    yield "q rows unpermuted as for llama", changed(self_attn__q_proj__weight=unpermuted)
    for name in ("q_proj", "k_proj", "v_proj"):
        bias = torch.zeros_like(state[f"{layer}self_attn.{name}.bias"])
        yield f"{name} bias dropped", changed(**{f"self_attn__{name}__bias": bias})
    down = state[layer + "mlp.down_proj.weight"]
    yield (
        "down_proj read in GGUF's order of dims",
        changed(mlp__down_proj__weight=down.reshape(down.shape[::-1]).T.contiguous()),
    )
    yield (
        "norms swapped",
        changed(
            input_layernorm__weight=state[layer + "post_attention_layernorm.weight"],
            post_attention_layernorm__weight=state[layer + "input_layernorm.weight"],
        ),
    )


def test_wrong_weights_are_seen(tmp_path: Path):
    """Each mutation keeps every shape (square projections, a kv head for each head) and must fail by ten tolerances."""
    theirs = hf_model(num_key_value_heads=4)
    folder = save_folder(tmp_path / "m", theirs)
    expected, limit = torch_logits(theirs), tolerance(theirs)
    seen = []
    for name, state in mutations({key: value.clone() for key, value in theirs.state_dict().items()}):
        save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / "model.safetensors")
        model, _ = load(folder, dtype="float32")
        assert distance(model(mx.array(IDS)), expected) > 10 * limit, name
        seen.append(name)
    assert len(seen) == 10


@each("dtype", DTYPES)
@each("packed", [False, True], ids=["dense", "packed"])
@each("kind", [T.F32, *ROW_TYPES], ids=lambda kind: kind.name)
def test_dtype_of_every_tap(kind: T, packed: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the file's types, every module and every cache works in the dtype asked for."""
    theirs = hf_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    model, _ = load(write_gguf(tmp_path / "m.gguf", theirs, kind), dtype=dtype, quantized=packed)
    seen = []
    for cls in {type(module) for module in model.modules()}:
        call = cls.__call__ if "__call__" in cls.__dict__ else None
        if call is not None:

            def tap(self, *args, _call=call, **kwargs):
                out = _call(self, *args, **kwargs)
                seen.extend((type(self).__name__, array.dtype) for array in (out if isinstance(out, tuple) else (out,)))
                return out

            monkeypatch.setattr(cls, "__call__", tap)
    cache = model.make_cache()
    model(mx.array(IDS), cache)
    seen += [("cache", array.dtype) for array in cache[0].state]
    assert len(seen) >= 15
    assert {found for _, found in seen} == {DTYPES[dtype]}, seen
    stored = {mx.uint32, mx.uint8, *({T.F16: mx.float16, T.BF16: mx.bfloat16}.get(kind, mx.uint32),) * packed}
    for name, array in tree_flatten(model.parameters()):
        assert array.dtype in {DTYPES[dtype], *stored} or name.endswith((".scales", ".biases", ".factors")), name


@each("dtype", ["int4", "", 5, mx.int32])
def test_an_impossible_dtype_is_refused(dtype, tmp_path: Path):
    with pytest.raises(QwenMLXError, match="float32, bfloat16, float16"):
        load(write_gguf(tmp_path / "m.gguf", hf_model()), dtype=dtype)


def test_default_dtype_is_float32_on_cpu(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", hf_model(), T.F16)
    assert mx.default_device() == mx.cpu
    assert load(path)[0](mx.array([[1, 2]])).dtype == mx.float32
    assert {array.dtype for _, array in tree_flatten(load(path, quantized=False)[0].parameters())} == {mx.float32}
