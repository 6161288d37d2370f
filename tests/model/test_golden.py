"""Small models against stored results of transformers: no PyTorch is needed (reference/golden.py makes them)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen_mlx import load, stream_generate
from qwen_mlx.backend import mx
from reference import golden
from tests.helpers.cases import each

EXPECTED = load_file(golden.FOLDER / "expected.safetensors")
NOISE = {
    name: about["noise"] for name, about in json.loads((golden.FOLDER / "expected.json").read_text())["models"].items()
}
GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest):
    """The test runs on the CPU, and on a GPU where there is one."""
    before = mx.default_device()
    mx.set_default_device(getattr(mx, request.param))
    yield request.param
    mx.set_default_device(before)


@each("name", golden.MODELS)
def test_logits_equal_stored_ones_of_transformers(name: str):
    """Each side may be off by the noise, so their difference by twice as much; the factor four is test_model's."""
    model, _ = load(golden.FOLDER / name, dtype="float32")
    logits = np.array(model(mx.array(EXPECTED[f"{name}.ids"])[None]))[0]
    assert logits.shape == EXPECTED[f"{name}.logits"].shape
    assert np.abs(logits - EXPECTED[f"{name}.logits"]).max() < 4 * NOISE[name]


@pytest.mark.parametrize("name", golden.MODELS)
def test_greedy_ids_equal_stored_ones_of_transformers(name: str, device: str):
    model, tokenizer = load(golden.FOLDER / name, dtype="float32")
    greedy = EXPECTED[f"{name}.greedy"].tolist()
    assert not tokenizer.eos_token_ids & set(greedy), "it would end here before transformers does"
    chunks = stream_generate(model, tokenizer, EXPECTED[f"{name}.ids"].tolist(), max_tokens=len(greedy), temperature=0)
    assert [chunk.token for chunk in chunks] == greedy


def test_every_model_makes_a_difference():
    """The stored logits of no two models are alike, nor are a model's own at two positions."""
    logits = [EXPECTED[f"{name}.logits"] for name in golden.MODELS]
    for i, mine in enumerate(logits):
        assert np.abs(mine[0] - mine[1]).max() > 0.1
        assert all(np.abs(mine - other).max() > 0.1 for other in logits[:i])


def test_stored_models_and_results_are_what_transformers_gives_today(tmp_path):
    """The models bit for bit; results of another processor or version of PyTorch within the noise."""
    golden.write_models(tmp_path)
    for name in golden.MODELS:
        stored, fresh = (load_file(folder / name / "model.safetensors") for folder in (golden.FOLDER, tmp_path))
        assert stored.keys() == fresh.keys()
        assert all(np.array_equal(stored[key], fresh[key]) for key in stored)
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (golden.FOLDER / name / file).read_text() == (tmp_path / name / file).read_text()
    for name, (ids, logits, greedy, noise) in golden.results(tmp_path).items():
        assert np.array_equal(ids, EXPECTED[f"{name}.ids"])
        assert np.array_equal(greedy, EXPECTED[f"{name}.greedy"])
        assert np.abs(logits - EXPECTED[f"{name}.logits"]).max() <= 2 * NOISE[name]
        assert NOISE[name] / 2 < noise < 2 * NOISE[name]
