"""Folders of safetensors that anyone may have written: refused in a sentence, or right."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from qwen_mlx import QwenMLXError, SamplingSettings, convert, load
from qwen_mlx.backend import mx
from qwen_mlx.generation.engine import generate_tokens
from qwen_mlx.generation.sampling import sample
from qwen_mlx.generation.settings import GenerationSettings
from qwen_mlx.text.tokenizer import Tokenizer
from reference.lazy import safetensors_torch, torch, transformers
from reference.small_models import IM_END, IM_START, RandomModel, save_folder, write_gguf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "m", RandomModel())


def edit(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


def test_truncation_and_padding_of_a_training_run_are_not_obeyed(folder: Path):
    edit(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert len(tokenizer.encode("x" * 50)) == 50
    assert len(tokenizer.encode("x")) == 1


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool", "float8_e4m3fn"])
def test_weights_that_are_no_weights(folder: Path, dtype: str):
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    safetensors_torch.save_file(tensors | {name: tensors[name].to(getattr(torch, dtype))}, folder / "model.safetensors")
    with pytest.raises(QwenMLXError, match=name):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 4},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "truncate": False}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "mscale": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "beta_fast": 1, "beta_slow": 32}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"rope_parameters": "x"},
        {"rms_norm_eps": 10**400},
        {"tie_word_embeddings": "false"},
        {"use_sliding_window": "false"},
        {"use_sliding_window": True, "sliding_window": "4"},
        {"max_window_layers": "x"},
        {"num_hidden_layers": 100_000_000},
        {"eos_token_id": [[1]]},
        {"quantization": [1]},
        {"model_type": "llama"},
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_honoured(folder: Path, changes: dict):
    edit(folder / "config.json", **changes)
    if "quantization" in changes:
        tensors = safetensors_torch.load_file(folder / "model.safetensors")
        tensors |= {f"lm_head.{kind}": torch.ones(263, 2) for kind in ("scales", "biases")}
        safetensors_torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QwenMLXError, match=str(folder)):
        load(folder)


def test_missing_max_window_layers_is_transformers_default(folder: Path):
    edit(folder / "config.json", use_sliding_window=True, sliding_window=4, max_window_layers=..., layer_types=...)
    model, _ = load(folder)
    ids = [[int(i) for i in np.random.default_rng(0).integers(0, 260, 40)]]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(ids)).logits.numpy()
    assert np.abs(np.array(model(mx.array(ids))) - theirs).max() < 1e-4


def test_yarn_extends_the_context(tmp_path: Path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    model, _ = load(save_folder(tmp_path / "m", RandomModel(rope_parameters=yarn, max_position_embeddings=64)))
    assert model.config.context_length == 256


def test_names_of_control_tokens_stay_text_wherever_they_stand(folder: Path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{{ m.more }}{{ m.args | tojson }}<|im_end|>"
        "{{ m.content | lower }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.from_folder(folder)
    for message in (
        {"role": "user", "content": "<|im_end|>", "more": "", "args": {}},
        {"role": "user", "content": "<|im_", "more": "end|>", "args": {}},
        {"role": "user", "content": "<", "more": "|im_end|>", "args": {}},
        {"role": "user", "content": "<|IM_END|>", "more": "", "args": {}},
        {"role": "user", "content": "", "more": "", "args": {"<|im_end|>": ["<|im_start|>"]}},
    ):
        ids = tokenizer.apply_chat_template([message])
        assert (ids.count(IM_START), ids.count(IM_END)) == (1, 1), message


@pytest.mark.parametrize("temperature", [1e-46, 1e-31])
def test_a_temperature_that_float32_cannot_hold_is_greedy(temperature: float):
    logits = mx.array(np.random.default_rng(0).standard_normal((3, 99)).astype(np.float32))
    drawn = sample(logits, SamplingSettings(temperature=temperature, top_k=20), key=mx.random.key(1))
    assert (np.array(drawn) == np.array(logits).argmax(-1)).all()


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_a_cache_holds_all_but_the_last_token_afterwards(folder: Path, count: int):
    model, _ = load(folder)
    cache = model.make_cache()
    loop = generate_tokens(model, [1, 2, 3], GenerationSettings(), cache=cache)
    for _ in range(count):
        next(loop)
    loop.close()
    assert {layer.offset for layer in cache} == {3 + count - 1}


def test_a_token_outside_the_byte_alphabet_is_shown_as_it_is(folder: Path):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["日1"] = data["model"]["vocab"].pop("hello")
    data["model"]["merges"] = data["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer.from_folder(folder).decode([259]) == "日1"


@pytest.mark.parametrize("read", [load, lambda folder: convert(folder, folder.parent / "out")], ids=["load", "convert"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "uint8", "int32"])
def test_weights_of_a_dtype_that_mlx_reads_as_numbers_of_another(folder: Path, dtype: str, read):
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    safetensors_torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QwenMLXError, match=f"tensor '{name}' has dtype .*, expected BF16, F16 or F32"):
        read(folder)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("read", [load, lambda folder: convert(folder, folder.parent / "out")], ids=["load", "convert"])
def test_a_tensor_in_two_files(folder: Path, read):
    name = "model.layers.1.mlp.up_proj.weight"
    safetensors_torch.save_file(
        {name: safetensors_torch.load_file(folder / "model.safetensors")[name]}, folder / "more.safetensors"
    )
    with pytest.raises(QwenMLXError, match=f"tensor '{name}' is in model.safetensors and in more.safetensors"):
        read(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors", "vocab.json"])
def test_a_pipe_or_a_device_is_not_waited_for(folder: Path, file: str):
    for place in ("pipe", "/dev/zero"):
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file) if place == "pipe" else (folder / file).symlink_to(place)
        with pytest.raises(QwenMLXError, match=f"{file}: is not a regular file"):
            convert(folder, folder.parent / "out")


@pytest.mark.parametrize("ids", [[[]], 10**10, -1, "a"])
def test_end_tokens_beyond_the_vocabulary(folder: Path, ids):
    edit(folder / "config.json", eos_token_id=ids)
    with pytest.raises(QwenMLXError, match=r"eos_token_id is .*, expected"):
        load(folder)


def test_force_does_not_replace_a_folder_that_holds_what_the_source_links_to(folder: Path):
    source = folder.parent / "links"
    source.mkdir()
    for file in folder.iterdir():
        (source / file.name).symlink_to(file)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(QwenMLXError, match="holds the model to convert"):
        convert(source, folder, force=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("read", [load, lambda folder: convert(folder, folder.parent / "out")], ids=["load", "convert"])
def test_fewer_embeddings_than_tokens(tmp_path: Path, read):
    folder = save_folder(tmp_path / "m", RandomModel(vocab_size=200))
    with pytest.raises(QwenMLXError, match=r"has 263 tokens, but embeddings for 200"):
        read(folder)


def test_an_index_that_names_what_no_disk_can_hold(folder: Path):
    index = {"weight_map": {"x": "n" * 300 + ".safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(QwenMLXError, match="is missing, which"):
        load(folder)


def test_an_error_of_the_callers_progress_is_not_the_files(tmp_path: Path):
    def progress(done: int, total: int) -> None:
        raise ValueError("the caller's own")

    with pytest.raises(ValueError, match="the caller's own"):
        load(write_gguf(tmp_path / "m.gguf", RandomModel()), progress=progress)
