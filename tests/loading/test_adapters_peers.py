"""Adapters as peft and mlx-lm save them, and the logits that they compute with them; the real model with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from qwen_mlx import load
from reference.lazy import mlx_lm_tuner, mlx_lm_utils, peft, torch, transformers
from reference.small_models import RandomModel, save_folder, to_hf, write_gguf
from tests.helpers.adapters import write_json
from tests.helpers.cases import each
from tests.helpers.peers import IDS, distance, tolerance, torch_logits

SIZES = {"num_hidden_layers": 2}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ALL},
    "all linear": {"target_modules": "all-linear", "use_rslora": True},
    "pattern": {"target_modules": r".*\.(0|1)\.self_attn\.[qv]_proj", "exclude_modules": r".*1.*v_proj"},
    "ranks": {"target_modules": ALL, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {r"^model.*\.1\..*k_proj": 5}},
    "DoRA": {"target_modules": ALL, "use_dora": True},
    "biases": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "biases of its own": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "layers_to_transform": [1]},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "post_attention_layernorm"]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
}


def randomized(model, seed: int = 0):
    """peft's model with every number that it trains random: b starts at zero, where an adapter does nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(0.7 + 0.6 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def peft_model(theirs, folder: Path, **settings: Any):
    model = randomized(peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, **settings)))
    model.save_pretrained(folder)
    return model


@each("tied", [False, True], ids=["untied", "tied"])
@each("kind", CONFIGS)
def test_peft_computes_the_same_logits(tmp_path: Path, kind: str, tied: bool):
    source = RandomModel(**SIZES, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "m.gguf", source, T.Q8_0)
    plain = torch_logits(to_hf(source))
    theirs = peft_model(to_hf(source), tmp_path / "adapter", **CONFIGS[kind])
    expected, bound = torch_logits(theirs), tolerance(to_hf(source))
    assert np.abs(expected - plain).max() > 100 * bound
    for packed in (False, True):
        model, _ = load(path, dtype="float32", quantized=packed, adapter=tmp_path / "adapter")
        assert distance(model(mx.array(IDS)), expected) < bound


def test_two_of_peft_at_once(tmp_path: Path):
    source = RandomModel(**SIZES)
    path = write_gguf(tmp_path / "m.gguf", source, T.Q8_0)
    peft_model(to_hf(source), tmp_path / "a", target_modules=ALL)
    peft_model(to_hf(source), tmp_path / "b", target_modules=["q_proj", "up_proj"], use_rslora=True)
    theirs = peft.PeftModel.from_pretrained(to_hf(source), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.base_model.set_adapter(["a", "b"])
    for module in theirs.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("b", 0.5)
    model, _ = load(path, dtype="float32", adapter=[tmp_path / "a", f"{tmp_path / 'b'}:0.5"])
    assert distance(model(mx.array(IDS)), torch_logits(theirs)) < tolerance(to_hf(source))


KEYS: dict[str, tuple[list[str] | None, bool]] = {
    "LoRA": (None, False),
    "DoRA": (["self_attn.q_proj", "mlp.down_proj"], True),
    "embedding": (["self_attn.v_proj", "model.embed_tokens"], False),
}


@pytest.mark.parametrize("kind", KEYS)
def test_mlx_lm_computes_the_same_logits(tmp_path: Path, kind: str):
    keys, dora = KEYS[kind]
    base = save_folder(tmp_path / "m", RandomModel(**SIZES, tie_word_embeddings=True))
    theirs, _ = mlx_lm_utils.load(str(base))
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    mlx_lm_tuner.linear_to_lora_layers(theirs, 1, parameters, use_dora=dora)
    mx.random.seed(0)
    weights = {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_b"):
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
            weights |= {f"{name}.lora_a": module.lora_a, f"{name}.lora_b": module.lora_b}
            if dora:
                module.m = module.m * mx.random.uniform(0.7, 1.3, module.m.shape)
                weights[f"{name}.m"] = module.m
    folder = tmp_path / "adapter"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 1, "lora_parameters": parameters}
    write_json(folder / "adapter_config.json", config)
    expected = np.array(theirs(mx.array(IDS)))
    model, _ = load(base, dtype="float32", adapter=folder)
    bound = tolerance(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert distance(model(mx.array(IDS)), expected) < bound


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_real_model_with_an_adapter_of_rank_16(tmp_path: Path, real_gguf: Path, real_hf, packed: bool):
    ids = [list(range(100, 164))]
    plain = torch_logits(real_hf, ids)
    theirs = peft.get_peft_model(real_hf, peft.LoraConfig(r=16, lora_alpha=32, target_modules=ALL))
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.01 * torch.randn_like(parameter))
        theirs.eval().save_pretrained(tmp_path / "adapter")
        expected = torch_logits(theirs, ids)
    finally:
        theirs.unload()
    assert np.abs(expected - plain).max() > 1
    model, _ = load(real_gguf, dtype="float32", quantized=packed, adapter=tmp_path / "adapter")
    error = distance(model(mx.array(ids)), expected) / np.abs(expected).max()
    assert error < 1e-4
