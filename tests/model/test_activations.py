"""Activations and hidden states as public calls, against transformers, and the ids that they and the model take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_mlx import QwenMLXError, activations, hidden_states, load
from qwen_mlx.backend import mx
from qwen_mlx.model.activations import LAYER_TAPS
from qwen_mlx.model.qwen2 import Qwen2
from reference.small_models import RandomModel, hf_model, save_folder
from tests.helpers.cases import each

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen2:
    return load(save_folder(tmp_path_factory.mktemp("small") / "m", RandomModel()), dtype="float32")[0]


def test_hidden_states_and_attention_are_those_of_transformers(tmp_path: Path):
    import torch

    theirs = hf_model()
    theirs.set_attn_implementation("eager")
    ours, _ = load(save_folder(tmp_path / "m", theirs), dtype="float32")
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS]), output_hidden_states=True, output_attentions=True)
    found = hidden_states(ours, IDS)
    assert len(found) == len(expected.hidden_states) == 4
    for ours_, theirs_ in zip(found, expected.hidden_states):
        np.testing.assert_allclose(ours_, theirs_.numpy(), rtol=1e-4, atol=1e-5)
    probabilities = activations(ours, IDS, ["layers.2.probs"])["layers.2.probs"]
    np.testing.assert_allclose(probabilities, expected.attentions[2].numpy().swapaxes(1, 2), rtol=1e-4, atol=1e-6)


def test_every_activation_has_its_name_and_the_names_choose(model: Qwen2):
    every = activations(model, IDS)
    layers = [f"layers.{i}.{tap}" for i in range(3) for tap in LAYER_TAPS]
    assert set(every) == {"embeddings", *layers, "norm", "logits"}
    assert np.array_equal(every["logits"], model(mx.array([IDS])))
    some = activations(model, IDS, ["layers.1.gate", "logits"])
    assert set(some) == {"layers.1.gate", "logits"}
    assert np.array_equal(some["layers.1.gate"], every["layers.1.gate"])
    assert np.array_equal(hidden_states(model, IDS)[1], every["layers.0.residual"])
    with pytest.raises(QwenMLXError, match=r"no activation 'layers.1.gat': did you mean 'layers.1.gate'"):
        activations(model, IDS, ["layers.1.gat"])
    with pytest.raises(QwenMLXError, match="names is 'logits', expected a list"):
        activations(model, IDS, "logits")


def test_ids_are_lists_arrays_one_row_or_several(model: Qwen2):
    expected = np.array(model(mx.array([IDS])))
    for ids in (IDS, [IDS], np.array(IDS), np.array([IDS], np.uint8), mx.array(IDS), tuple(IDS)):
        assert np.array_equal(model(ids), expected)
    assert model([IDS, IDS]).shape == (2, *expected.shape[1:])


ROWS = [[], [[]], [[1], [2, 3]], [0.5], ["a"], [True], [[[1]]], [-1], [10**6]]


@each("ids", [*ROWS, "abc", 5, None, mx.array([0.5]), mx.array(1)])
def test_what_is_no_ids_is_refused(model: Qwen2, ids: object):
    with pytest.raises(QwenMLXError, match="input_ids"):
        model(ids)
