"""Damaged adapters: a sentence, or an adapter that changes finite numbers; never another error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from qwen_mlx import QwenMLXError
from qwen_mlx.loading.adapters.apply import adapted
from qwen_mlx.loading.checkpoint import Checkpoint, open_checkpoint
from reference.small_models import RandomModel, save_folder
from tests.helpers.adapters import random_parts, write, write_gguf_adapter, write_mlx_lm, write_peft

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KINDS = ["peft", "mlx-lm", "gguf"]
NUMBERS = st.integers() | st.floats() | st.booleans() | st.none()
JSON = st.recursive(
    NUMBERS
    | st.text(max_size=8)
    | st.sampled_from(["all-linear", "q_proj", "(q|v)_proj", "lora", "dora", "full", "LORA"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora"]
FIELDS += ["modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules", "init_lora_weights", "bias"]
FIELDS += ["fine_tune_type", "lora_parameters", "num_layers", "trainable_token_indices", "ensure_weight_tying"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("hostile")
    model = RandomModel(**SIZES)
    checkpoint = open_checkpoint(save_folder(folder / "base", model))
    parts = random_parts(model, ["q_proj", "down_proj"])
    paths = {
        "peft": write_peft(folder / "peft", parts, 1.5),
        "mlx-lm": write_mlx_lm(folder / "mlx", parts, 1.5),
        "gguf": write_gguf_adapter(folder / "a.gguf", parts, 1.5, 1),
    }
    return checkpoint, paths


def apply(checkpoint: Checkpoint, path: Path) -> bool:
    """True if an adapter applies, and then to finite numbers only; False if it is refused in a sentence."""
    try:
        result = adapted(checkpoint, path)
    except QwenMLXError as error:
        sentence = str(error)
    else:
        for delta in result.deltas.values():
            assert all(np.isfinite(array).all() for array in delta if array is not None)
        return True
    assert str(path) in sentence
    assert "\n" not in sentence
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_whole_ones_apply(files, kind: str):
    assert apply(files[0], files[1][kind])


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(data=st.data())
def test_damaged_bytes(files, tmp_path: Path, kind: str, data: st.DataObject):
    checkpoint, paths = files
    copy = tmp_path / paths[kind].name
    if copy.is_dir():
        shutil.rmtree(copy)
        shutil.copytree(paths[kind], copy)
        file = data.draw(st.sampled_from(sorted(copy.iterdir())))
    elif paths[kind].is_dir():
        shutil.copytree(paths[kind], copy)
        file = data.draw(st.sampled_from(sorted(copy.iterdir())))
    else:
        file = copy
        file.write_bytes(paths[kind].read_bytes())
    raw = bytearray(file.read_bytes())
    header = st.integers(0, min(len(raw), 2000) - 1)
    for at in data.draw(st.lists(header | st.integers(0, len(raw) - 1), max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]
    file.unlink()  # what is mapped stays as it was
    file.write_bytes(raw)
    apply(checkpoint, copy)


@pytest.mark.parametrize("kind", ["peft", "mlx-lm"])
@FEW
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_configuration(files, tmp_path: Path, kind: str, changes: dict):
    checkpoint, paths = files
    copy = tmp_path / kind
    shutil.copytree(paths[kind], copy, dirs_exist_ok=True)
    config = json.loads((paths[kind] / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | changes))
    apply(checkpoint, copy)


@pytest.mark.parametrize("kind", ["peft", "mlx-lm"])
@FEW
@given(data=st.data())
def test_any_tensors(files, tmp_path: Path, kind: str, data: st.DataObject):
    checkpoint, paths = files
    copy = tmp_path / kind
    shutil.copytree(paths[kind], copy, dirs_exist_ok=True)
    file = next(copy.glob("*.safetensors"))
    tensors = load_file(paths[kind] / file.name)
    names = sorted(tensors)
    endings = ["", ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".lora_a", ".m", ".weight", ".bias"]
    for _ in range(data.draw(st.integers(1, 3))):
        old = data.draw(st.sampled_from(names))
        stem = old.split(".lora_")[0]
        shape = data.draw(st.lists(st.sampled_from([0, 1, 4, 32, 64]), max_size=3))
        dtype = data.draw(st.sampled_from([np.float32, np.float16, np.int32, np.float64, np.uint8]))
        value = data.draw(st.sampled_from([0, 1, np.nan, np.inf, 6e4]))
        with np.errstate(all="ignore"):
            array = np.full(shape, value).astype(dtype)
        tensors.pop(old, None) if data.draw(st.booleans()) else None
        tensors[stem + data.draw(st.sampled_from(endings))] = array
    file.unlink()
    write(file, tensors)
    apply(checkpoint, copy)
