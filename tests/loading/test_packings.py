"""Folders packed by other libraries: their values by definition, and the same bits in MLX's form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwen_mlx import QwenMLXError, convert, load
from qwen_mlx.backend import mx
from qwen_mlx.loading.checkpoint import open_checkpoint
from qwen_mlx.model.layers import QuantizedLinear
from qwen_mlx.parallel.shards import ALL
from reference.small_models import RandomModel, save_folder
from tests.helpers import foreign
from tests.helpers.cases import each
from tests.helpers.foreign import packed_folder

CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "iters": 200,
    "packing_format": "auto_round:auto_gptq",
}
# Settings, packer, its arguments, and the bits and group in which MLX expresses it exactly.
EXACT = {
    "awq": (AWQ, foreign.awq, {}, (4, 32)),
    "awq, groups of 128": (AWQ | {"group_size": 128}, foreign.awq, {"group": 128}, (4, 128)),
    "gptq": (GPTQ, foreign.gptq, {}, (4, 32)),
    "gptq, 8 bits": (GPTQ | {"bits": 8, "group_size": 64}, foreign.gptq, {"bits": 8, "group": 64}, (8, 64)),
    "gptq, 2 bits": (GPTQ | {"bits": 2}, foreign.gptq, {"bits": 2}, (2, 32)),
    "gptq, symmetric": (GPTQ | {"group_size": 128}, foreign.gptq, {"group": 128, "symmetric": True}, (4, 128)),
    "gptq, format 2": (GPTQ | {"checkpoint_format": "gptq_v2"}, foreign.gptq, {"version": "gptq_v2"}, (4, 32)),
    "auto-round": (ROUND, foreign.gptq, {}, (4, 32)),
    "auto-round, zero points as they are": (
        ROUND | {"quant_method": "intel/auto-round", "packing_format": "auto_round"},
        foreign.gptq,
        {"version": "gptq_v2"},
        (4, 32),
    ),
    "auto-round, awq": (ROUND | {"packing_format": "auto_round:auto_awq"}, foreign.awq, {}, (4, 32)),
    "compressed-tensors w4a16": (CT, foreign.pack_quantized, {}, (4, 32)),
    "compressed-tensors w4a16, zero points": (CT, foreign.pack_quantized, {"symmetric": False}, (4, 32)),
    "compressed-tensors w8a16, rows": (CT, foreign.pack_quantized, {"bits": 8, "group": None}, (8, 128)),
    "compressed-tensors w8a8": (CT | {"format": "int-quantized"}, foreign.int_quantized, {}, (8, 128)),
}
DENSE = {
    "gptq, act-order": (GPTQ | {"desc_act": True}, foreign.gptq, {"order": True}),
    "gptq, groups of 16": (GPTQ | {"group_size": 16}, foreign.gptq, {"group": 16}),
    "compressed-tensors, act-order": (CT, foreign.pack_quantized, {"order": True}),
    "compressed-tensors, fp8": (CT | {"format": "float-quantized"}, foreign.float_quantized, {}),
    "fp8, blocks": (
        {"quant_method": "fp8", "weight_block_size": [32, 48]},
        foreign.float_quantized,
        {"scales": "block"},
    ),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, foreign.float_quantized, {}),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, foreign.float_quantized, {"scales": "one"}),
    "bitsandbytes nf4": (BNB, foreign.nf4, {}),
    "bitsandbytes nf4 without its name": ({"load_in_4bit": True}, foreign.nf4, {}),
    "bitsandbytes nf4, nested": (BNB, foreign.nf4, {"nested": True}),
    "bitsandbytes nf4, stored as bfloat16": (
        BNB | {"bnb_4bit_quant_storage": "bfloat16"},
        foreign.nf4,
        {"storage": "BF16"},
    ),
    "bitsandbytes nf4, stored as float32": (BNB, foreign.nf4, {"storage": "F32"}),
    "bitsandbytes fp4": (BNB, foreign.nf4, {"kind": "fp4"}),
    "compressed-tensors, nvfp4": (CT | {"format": "nvfp4-pack-quantized"}, foreign.fp4, {}),
    "compressed-tensors, mxfp4": (CT | {"format": "mxfp4-pack-quantized"}, foreign.fp4, {"kind": "mxfp4"}),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, foreign.llm_int8, {}),
}
ALL_KINDS = {name: case[:3] for name, case in (EXACT | DENSE).items()}


def dequantized(module: QuantizedLinear) -> np.ndarray:
    codes, scales, biases = module.matrix.arrays
    packing = module.matrix.packing
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return np.array(mx.dequantize(codes, scales, biases, group_size=packing.group_size, bits=packing.bits))


def projections_of(model) -> dict[str, object]:
    return {f"{name}.weight": module for name, module in model.named_modules() if name.endswith("_proj")}


@each("kind", ALL_KINDS)
def test_dense_values_are_the_definition_s(tmp_path: Path, kind: str, capsys):
    settings, pack, arguments = ALL_KINDS[kind]
    folder, expected = packed_folder(tmp_path / "m", settings, pack, **arguments)
    model, _ = load(folder, quantized=False)
    for name, values in expected.state_dict().items():
        np.testing.assert_array_equal(np.array(model.hf_parameters()[name]), values, err_msg=name)
    said = capsys.readouterr().err
    assert ("become dense" in said) == (kind in DENSE), said


@each("kind", EXACT)
def test_packed_values_are_the_same_bit_for_bit(tmp_path: Path, kind: str):
    settings, pack, arguments, (bits, group) = EXACT[kind]
    folder, expected = packed_folder(tmp_path / "m", settings, pack, **arguments)
    model, _ = load(folder, quantized=True)
    modules = projections_of(model)
    assert len(modules) == 14
    for name, module in modules.items():
        packing = module.matrix.packing
        assert (packing.kind, packing.bits, packing.group_size) == ("affine", bits, group)
        np.testing.assert_array_equal(dequantized(module), expected.state_dict()[name], err_msg=name)


@each("kind", ["awq", "gptq, act-order", "compressed-tensors w4a16, zero points", "fp8, blocks"])
def test_logits_are_those_of_the_dense_folder(tmp_path: Path, kind: str):
    settings, pack, arguments = ALL_KINDS[kind]
    folder, expected = packed_folder(tmp_path / "m", settings, pack, **arguments)
    dense = save_folder(tmp_path / "dense", expected)
    ids = mx.array([[1, 5, 9, 200, 17]])
    ours = np.array(load(folder)[0](ids))
    np.testing.assert_array_equal(ours, np.array(load(dense)[0](ids)))
    packed = np.array(load(folder, quantized=True)[0](ids))
    assert np.abs(packed - ours).max() < 1e-5 * np.abs(ours).max()


@each("kind", ALL_KINDS)
def test_a_rank_s_part_has_the_values_of_the_whole(tmp_path: Path, kind: str):
    settings, pack, arguments = ALL_KINDS[kind]
    folder, expected = packed_folder(tmp_path / "m", settings, pack, **arguments)
    for name, parameter in open_checkpoint(folder).parameters.items():
        if not name.endswith("_proj.weight"):
            continue
        whole = expected.state_dict()[name]
        for rows, columns in ((slice(5, 43), ALL), (slice(16, 64), slice(32, 96)), (ALL, slice(7, 50))):
            part = parameter.part(rows, columns)
            np.testing.assert_array_equal(part.values(), whole[rows, columns])
            np.testing.assert_array_equal(part.part(slice(3, 9), ALL).values(2, 5), whole[rows, columns][5:8])
            assert bool(part.packings) == bool(
                parameter.packings
                and columns.indices(128)[0] % parameter.packings[0].group_size == 0
                and columns.indices(parameter.width)[1] % parameter.packings[0].group_size == 0
            )
            assert 0 < part.nbytes <= parameter.nbytes
            for packing in part.packings:
                codes, scales, biases = map(mx.array, part.arrays(packing))
                values = mx.dequantize(codes, scales, biases, group_size=packing.group_size, bits=packing.bits)
                np.testing.assert_array_equal(np.array(values), whole[rows, columns])


@each("kind", ["awq", "gptq, symmetric", "compressed-tensors w8a8", "bitsandbytes nf4"])
def test_conversion_keeps_what_is_exact(tmp_path: Path, kind: str):
    settings, pack, arguments = ALL_KINDS[kind]
    folder, expected = packed_folder(tmp_path / "m", settings, pack, **arguments)
    report = convert(folder, tmp_path / "out", dtype="float32")
    assert all(row.exact for row in report)
    stored = {row.name: row.stored_as for row in report}
    if kind == "gptq, symmetric":  # scale * 8 is a float16 too
        assert stored["model.layers.0.mlp.up_proj.weight"] == "4 bits, group 128, float16 scales"
    again, _ = load(tmp_path / "out", quantized=False)
    for name, values in expected.state_dict().items():
        np.testing.assert_array_equal(np.array(again.hf_parameters()[name]), values, err_msg=name)


def test_rotations_that_the_weights_hold_already(tmp_path: Path):
    for transform in ({}, {"config_groups": {"R1": {"apply": [{"location": "weight_input"}]}}}):
        folder, _ = packed_folder(
            tmp_path / str(len(transform)), CT | {"transform_config": transform}, foreign.pack_quantized
        )
        open_checkpoint(folder)


def test_activations_that_would_be_quantized_are_said(tmp_path: Path, capsys):
    settings = CT | {"config_groups": {"group_0": {"input_activations": {"num_bits": 8}}}, "spin": [1], "odd": None}
    folder, _ = packed_folder(tmp_path / "m", settings, foreign.int_quantized, input_scale=True)
    one = np.ones(1, np.uint32)
    damaged(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.k_scale": ("F32", one)}))
    load(folder)
    said = capsys.readouterr().err
    assert "only its weights are quantized" in said
    assert "left out of quantization_config, because it is not known here: spin\n" in said


@each(
    ("file", "own", "pack"),
    [
        ("quantize_config.json", {key: GPTQ[key] for key in ("bits", "group_size")}, foreign.gptq),
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
            foreign.float_quantized,
        ),
    ],
)
def test_settings_beside_config_json(tmp_path: Path, file: str, own: dict, pack):
    folder, expected = packed_folder(tmp_path / "m", None, pack)
    (folder / file).write_text(json.dumps(own))
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(
        np.array(load(folder, quantized=False)[0].hf_parameters()[name]), expected.state_dict()[name]
    )


@each(
    ("mode", "bits", "group"),
    [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16), ("affine", 1, 64), ("affine", 4, 64)],
)
def test_mlx_s_own_modes(tmp_path: Path, mode: str, bits: int, group: int):
    model = RandomModel(hidden_size=128, intermediate_size=256)
    folder = save_folder(tmp_path / "m", model)
    tensors: dict[str, mx.array] = {name: mx.array(array) for name, array in model.state_dict().items()}
    expected = {}
    for name in foreign.projections(model):
        arrays = mx.quantize(tensors.pop(name), group_size=group, bits=bits, mode=mode)
        expected[name] = np.array(mx.dequantize(*arrays, group_size=group, bits=bits, mode=mode).astype(mx.float32))
        tensors |= {
            f"{name.removesuffix('.weight')}.{end}": a for end, a in zip(("weight", "scales", "biases"), arrays)
        }
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": group, "bits": bits, "mode": mode}
    (folder / "config.json").write_text(json.dumps(config))
    parameters = load(folder, quantized=False)[0].hf_parameters()
    for name, values in expected.items():
        np.testing.assert_array_equal(np.array(parameters[name]), values, err_msg=name)
    with pytest.raises(QwenMLXError, match="quantized for MLX already"):
        convert(folder, tmp_path / "out")
    scales = next(name for name in tensors if name.endswith(".scales"))
    nan = {"mxfp4": 0xFF, "mxfp8": 0xFF, "nvfp4": 0x7F, "affine": float("nan")}[mode]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors | {scales: mx.full_like(tensors[scales], nan)})
    with pytest.raises(QwenMLXError, match=rf"{scales.removesuffix('.scales')}.* inf or NaN"):
        load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Damage

MODULE = "model.layers.1.mlp.down_proj"
OPTIONAL = (
    "g_idx",
    "weight_g_idx",
    "weight_zero_point",
    "weight_format",
)  # without them the folder says something else


def damaged(folder: Path, change) -> None:
    """Rewrites the folder's safetensors after change(tensors), which has {name: (dtype, array)}."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            raw = np.frombuffer(data, np.uint8, last - first, start + first)
            size = max(1, raw.nbytes // max(1, int(np.prod(entry["shape"]))))
            elements = raw.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size])
            tensors[name] = (entry["dtype"], elements.reshape(entry["shape"]))
    change(tensors)
    foreign.write_safetensors(path, tensors)


def refused(folder: Path) -> str:
    """The sentence that load() and convert() refuse the folder with."""
    with pytest.raises(QwenMLXError) as error:
        load(folder)
    with pytest.raises(QwenMLXError) as again:
        convert(folder, folder.parent / "out")
    assert str(again.value) == str(error.value)
    assert "cannot be loaded" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.heavy
@each("kind", ALL_KINDS)
def test_each_tensor_missing_or_of_another_dtype_or_shape(tmp_path: Path, kind: str):
    settings, pack, arguments = ALL_KINDS[kind]
    folder, _ = packed_folder(tmp_path / "m", settings, pack, **arguments)
    intact = (folder / "model.safetensors").read_bytes()
    stored = open_checkpoint(folder).parameters[f"{MODULE}.weight"].weights.tensors
    names = [tensor.name for tensor in stored]
    assert names
    for name in names:
        changes = {
            "missing": lambda tensors, name=name: tensors.pop(name),
            "dtype": lambda tensors, name=name: tensors.update({name: ("U64", np.zeros((3, 5), np.uint64))}),
            "shape": lambda tensors, name=name: tensors.update(
                {name: (tensors[name][0], np.zeros((3, 5), tensors[name][1].dtype))}
            ),
        }
        for what, change in changes.items():
            if what == "missing" and name.rpartition(".")[2] in OPTIONAL:
                continue
            foreign.replace_bytes(folder / "model.safetensors", intact)
            damaged(folder, change)
            message = refused(folder)
            assert name in message or f"'{MODULE}.weight" in message, (name, what, message)


SETTINGS = {
    "another method": ({"quant_method": "hqq"}, foreign.gptq, r"quant_method is 'hqq', expected one of auto-round, "),
    "no name": ({"quant_method": 3}, foreign.gptq, r"quant_method is 3, expected one of"),
    "no method": (
        {"config_groups": {}, "format": "pack-quantized"},
        foreign.pack_quantized,
        r"has no 'quant_method' but config_groups, format \('config_groups' is a setting of compressed-tensors\)",
    ),
    "no method, as GPTQ's tools wrote it": (
        {"bits": 4, "group_size": 32, "desc_act": True},
        foreign.gptq,
        r"'desc_act' is a setting of gptq\), expected one of .*; write the method's name there",
    ),
    "no method that is known": ({"weights": "int4"}, foreign.gptq, r"has no 'quant_method' but weights, expected one"),
    "not an object": ([1], foreign.gptq, r"'quantization_config' is \[1\], expected an object"),
    "awq for another kernel": (AWQ | {"version": "gemv"}, foreign.awq, r"version is 'gemv', expected 'gemm'"),
    "awq of 8 bits": (AWQ | {"bits": 8}, foreign.awq, r"AWQ's bits are 8, expected 4"),
    "gptq for another kernel": (
        GPTQ | {"checkpoint_format": "gptq_v3"},
        foreign.gptq,
        r"_format is 'gptq_v3', expected",
    ),
    "gptq for Marlin's kernel": (GPTQ | {"is_marlin_format": True}, foreign.gptq, r"checkpoint_format is 'marlin'"),
    "gptq of 3 bits": (GPTQ | {"bits": 3}, foreign.gptq, r"GPTQ's bits are 3, expected 2, 4 or 8; take another"),
    "compressed-tensors of 3 bits": (
        CT | {"config_groups": {"group_0": {"weights": {"num_bits": 3}}}},
        foreign.pack_quantized,
        r"num_bits are 3, expected 2, 4 or 8; take the original",
    ),
    "compressed-tensors' format": (
        CT | {"format": "marlin-24"},
        foreign.pack_quantized,
        r"format is 'marlin-24', expected",
    ),
    "auto-round's format": (
        ROUND | {"packing_format": "auto_round:llm_compressor"},
        foreign.gptq,
        r"packing_format is 'auto_round:llm_compressor', expected one of auto_round:auto_gptq, auto_round, ",
    ),
    "auto-round of 3 bits": (ROUND | {"bits": 3}, foreign.gptq, r"GPTQ's bits are 3, expected 2, 4 or 8; take another"),
    "compressed-tensors' groups": (
        CT | {"config_groups": [1]},
        foreign.pack_quantized,
        r"config_groups are \[1\], expected an object",
    ),
    "compressed-tensors of other bits": (
        CT | {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
        foreign.pack_quantized,
        r"weight_packed' has codes of 4 bits, but the configuration says 8",
    ),
    "gptq of other bits": (GPTQ | {"bits": 8}, foreign.gptq, r"codes of 4 bits, but the configuration says 8"),
    "gptq of other groups": (GPTQ | {"group_size": 64}, foreign.gptq, r"scales' has groups of 32, but the .* says 64"),
    "sparse": (
        CT | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        foreign.pack_quantized,
        r"weights are sparse",
    ),
    "rotated activations": (
        CT | {"transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": [{"location": "input"}]}}}},
        foreign.pack_quantized,
        r"transform_config rotates activations \('input'\), expected weights alone",
    ),
    "modelopt's fp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, foreign.float_quantized, r"is 'NVFP4'"),
    "blocks of nothing": (
        {"quant_method": "fp8", "weight_block_size": [0, "x"]},
        foreign.float_quantized,
        r"weight_block_size is \[0, 'x'\]",
    ),
}


@each("case", SETTINGS)
def test_settings_that_are_not_read(tmp_path: Path, case: str):
    settings, pack, message = SETTINGS[case]
    folder, _ = packed_folder(tmp_path / "m", settings, pack)
    with pytest.raises(QwenMLXError, match=message):
        open_checkpoint(folder)


VALUES = {
    "gptq's group": ("gptq, act-order", "g_idx", 4, 9, r"g_idx' names group 9, expected 0 to 7"),
    "compressed-tensors' group": ("compressed-tensors, act-order", "weight_g_idx", 1, 2**32 - 1, r"names group -1"),
    "compressed-tensors' shape": ("compressed-tensors w4a16", "weight_shape", 0, 77, r"says \(77, 256\), expected"),
    "bitsandbytes' state": (
        "bitsandbytes nf4",
        "weight.quant_state.bitsandbytes__nf4",
        0,
        ord("["),
        r"is not a JSON object; the file is damaged",
    ),
    "bitsandbytes' layout": ("bitsandbytes int8", "weight_format", (), 2, r"weight_format' is 2, expected 0 \(rows\)"),
}


@each("case", VALUES)
def test_values_that_no_file_should_have(tmp_path: Path, case: str):
    kind, end, place, value, message = VALUES[case]
    settings, pack, arguments = ALL_KINDS[kind]
    folder, _ = packed_folder(tmp_path / "m", settings, pack, **arguments)

    def change(tensors) -> None:
        dtype, array = tensors[f"{MODULE}.{end}"]
        array = array.copy()
        array[place] = value
        tensors[f"{MODULE}.{end}"] = dtype, array

    damaged(folder, change)
    with pytest.raises(QwenMLXError, match=message):
        open_checkpoint(folder)


@each("key", ["blocksize", "nested_blocksize", "nested_offset", "shape"])
@each("value", [0, "x", None, -64, True, [1]], ids=str)
def test_a_state_of_bitsandbytes_that_says_nonsense(tmp_path: Path, key: str, value: object):
    if (key, value) in (("nested_offset", 0), ("nested_offset", -64)):
        return  # it is a number
    folder, _ = packed_folder(tmp_path / "m", BNB, foreign.nf4, nested=True)
    name = f"{MODULE}.weight.quant_state.bitsandbytes__nf4"

    def change(tensors) -> None:
        state = json.loads(tensors[name][1].tobytes()) | {key: value}
        tensors[name] = "U8", np.frombuffer(json.dumps(state).encode(), np.uint8)

    damaged(folder, change)
    with pytest.raises(QwenMLXError, match=f"quant_state of '{MODULE}.weight' .*{key}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_groups_of_the_other_format_s_size(tmp_path: Path, kind: str):
    settings = CT | {"format": f"{kind}-pack-quantized"}
    folder, _ = packed_folder(tmp_path / "m", settings, foreign.fp4, kind=kind)

    def change(tensors) -> None:
        dtype, array = tensors[f"{MODULE}.weight_scale"]
        tensors[f"{MODULE}.weight_scale"] = dtype, np.repeat(array, 2, 1) if kind == "mxfp4" else array[:, ::2]

    damaged(folder, change)
    with pytest.raises(QwenMLXError, match=rf"'{MODULE}.weight_scale' has shape .*, expected \(128, "):
        open_checkpoint(folder)


def test_a_scale_that_is_not_finite(tmp_path: Path):
    folder, _ = packed_folder(tmp_path / "m", AWQ, foreign.awq)

    def change(tensors) -> None:
        dtype, array = tensors[f"{MODULE}.scales"]
        array = array.copy()
        array[0, 0] = 0x7C00
        tensors[f"{MODULE}.scales"] = dtype, array

    damaged(folder, change)
    with pytest.raises(QwenMLXError, match=f"'{MODULE}.qweight'.* has a scale that is inf or NaN"):
        load(folder, quantized=True)
    with pytest.raises(QwenMLXError, match=f"'{MODULE}.qweight'.* has a value that is inf or NaN"):
        load(folder, quantized=False)
    with pytest.raises(QwenMLXError, match=f"'{MODULE}.qweight'.* not finite"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
