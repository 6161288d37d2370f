"""Packed folders read by the libraries that define them, and by transformers: the same weights, the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_mlx import load
from qwen_mlx.backend import mx
from reference.lazy import bitsandbytes_functional, compressors, mlx_lm_utils, quantization, torch, transformers
from reference.small_models import to_hf
from tests.helpers import foreign
from tests.helpers.cases import each
from tests.helpers.foreign import Packed, packed_folder
from tests.helpers.peers import IDS, distance, tolerance, torch_logits

CT: dict[str, Any] = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def ct(layout: str, **weights: object) -> dict[str, Any]:
    own = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    return CT | {"format": layout, "config_groups": {"group_0": {"targets": ["Linear"], "weights": own}}}


ROW = {"strategy": "channel", "group_size": None, "num_bits": 8}
FOLDERS = {
    "compressed-tensors w4a16": (ct("pack-quantized"), foreign.pack_quantized, {}),
    "compressed-tensors w8a16": (ct("pack-quantized", **ROW), foreign.pack_quantized, {"bits": 8, "group": None}),
    "compressed-tensors fp8": (ct("float-quantized", **ROW, type="float"), foreign.float_quantized, {}),
    "bitsandbytes nf4": (BNB, foreign.nf4, {}),
    "bitsandbytes nf4, nested": (BNB | {"bnb_4bit_use_double_quant": True}, foreign.nf4, {"nested": True}),
}


@each("kind", FOLDERS)
def test_transformers_reads_the_same_model(tmp_path: Path, kind: str):
    settings, pack, arguments = FOLDERS[kind]
    folder, expected = packed_folder(tmp_path / "m", settings, pack, **arguments)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, _ = load(folder, quantized=True)
    assert distance(model(mx.array(IDS)), torch_logits(theirs)) < tolerance(to_hf(expected))


def decompressed(tensors: Packed, layout: str, **weights: object) -> np.ndarray:
    """The float32 weights that compressed-tensors makes of a module's tensors, their scales made float32."""
    dtypes = {"BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64, "I8": torch.int8}
    dtypes |= {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
    state = {name: torch.from_numpy(array.copy()).view(dtypes[dtype]) for name, (dtype, array) in tensors[0].items()}
    state["weight_scale"] = state["weight_scale"].float()
    arguments = quantization.QuantizationArgs(**weights)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments, format=layout)
    compressor = compressors.BaseCompressor.get_value_from_registry(layout)
    return compressor.decompress(state, scheme)["weight"].float().numpy()


@each("symmetric", [True, False], ids=["symmetric", "zero points"])
@each("bits", [2, 4, 8])
def test_compressed_tensors_unpacks_the_helper_s_tensors(bits: int, symmetric: bool):
    packed = foreign.pack_quantized(np.random.default_rng(bits), 36, 64, bits=bits, symmetric=symmetric)
    settings = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": 32}
    np.testing.assert_array_equal(decompressed(packed, "pack-quantized", **settings), packed[1])


def test_compressed_tensors_unpacks_int8():
    packed = foreign.int_quantized(np.random.default_rng(0), 24, 64)
    settings = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
    np.testing.assert_array_equal(decompressed(packed, "int-quantized", **settings), packed[1])


def test_compressed_tensors_unpacks_nvfp4():
    packed = foreign.fp4(np.random.default_rng(0), 24, 64)
    settings = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    values = decompressed(packed, "nvfp4-pack-quantized", **settings)  # in bfloat16
    np.testing.assert_allclose(values, packed[1], rtol=2**-8, atol=0)


def test_bitsandbytes_unpacks_int8():
    tensors, values = foreign.llm_int8(np.random.default_rng(0), 24, 64)
    codes, largest = (torch.from_numpy(tensors[name][1]) for name in ("weight", "SCB"))
    theirs = bitsandbytes_functional.int8_vectorwise_dequant(codes, largest).numpy()
    np.testing.assert_allclose(theirs, values, rtol=3e-7, atol=0)


@pytest.mark.parametrize("group", [32, 128])
def test_mlx_lm_reads_the_same_awq_matrices(tmp_path: Path, group: int):
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    folder, expected = packed_folder(tmp_path / "m", settings, foreign.awq, group=group)
    theirs, _ = mlx_lm_utils.load_model(folder)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"):
        module = dict(theirs.named_modules())[name]
        scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
        values = mx.dequantize(module.weight, scales, biases, group_size=group, bits=4)
        # It rounds the biases to float16, 2^-11 of 15 times the largest scale.
        assert distance(values, expected.state_dict()[f"{name}.weight"]) < 15 * 2 / 16 * 2**-11
