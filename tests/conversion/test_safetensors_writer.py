"""The piecewise writer, read back by the safetensors library and by MLX."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from qwen_mlx.backend import mx
from qwen_mlx.conversion.write import ShardedWriter, TensorSpec, shard
from reference.lazy import torch

NUMPY = {"F32": np.float32, "F16": np.float16, "U32": np.uint32, "U8": np.uint8, "BF16": np.uint16}


def random_tensors() -> dict[str, tuple[TensorSpec, np.ndarray]]:
    rng = np.random.default_rng(0)
    tensors = {}
    for number, (dtype, kind) in enumerate(NUMPY.items()):
        shape = (7, 3 + number)
        array = rng.integers(0, 2**16, shape).astype(kind) if dtype != "F32" else rng.standard_normal(shape)
        tensors[f"t.{dtype}"] = (TensorSpec(f"t.{dtype}", dtype, shape), array.astype(kind))
    return tensors


def test_pieces_in_any_order_become_one_file_that_both_libraries_read(tmp_path: Path):
    tensors = random_tensors()
    with ShardedWriter(tmp_path, [spec for spec, _ in tensors.values()], 10**9) as writer:
        for rows in (slice(0, 2), slice(2, 6), slice(6, 7)):
            for name, (_, array) in reversed(tensors.items()):
                writer.write(name, array[rows])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    ours = mx.load(str(tmp_path / "model.safetensors"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}
        assert set(file.keys()) == set(ours) == set(tensors)
        for name, (spec, array) in tensors.items():
            theirs = file.get_tensor(name)
            assert str(ours[name].dtype).split(".")[-1] == str(theirs.dtype).split(".")[-1]
            assert (ours[name].dtype == mx.bfloat16) == (spec.dtype == "BF16")
            if spec.dtype == "BF16":
                ours[name], theirs = ours[name].view(mx.uint16), theirs.view(torch.uint16)
            np.testing.assert_array_equal(np.array(ours[name]), array)
            np.testing.assert_array_equal(theirs.numpy(), array)


def test_shards_stay_below_the_limit_and_the_index_names_every_tensor(tmp_path: Path):
    specs = [TensorSpec(f"t{n}", "F32", (size,)) for n, size in enumerate([10, 10, 5, 100, 1, 1])]
    assert [[spec.name for spec in group] for group in shard(specs, 80)] == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"]]
    with ShardedWriter(tmp_path, specs, 80) as writer:
        for number, spec in enumerate(specs):
            writer.write(spec.name, np.full(spec.shape, number, np.float32))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 127
    assert sorted(set(index["weight_map"].values())) == [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    for number, spec in enumerate(specs):
        read = mx.load(str(tmp_path / index["weight_map"][spec.name]))[spec.name]
        np.testing.assert_array_equal(np.array(read), np.full(spec.shape, number, np.float32))


def test_too_many_or_too_few_bytes_are_refused(tmp_path: Path):
    spec = TensorSpec("t", "F32", (4,))
    with pytest.raises(ValueError, match="more bytes"), ShardedWriter(tmp_path, [spec], 100) as writer:
        writer.write("t", np.zeros(5, np.float32))
    with pytest.raises(ValueError, match="not written whole"), ShardedWriter(tmp_path, [spec], 100) as writer:
        writer.write("t", np.zeros(3, np.float32))


def test_offsets_are_aligned_to_eight_bytes(tmp_path: Path):
    """MLX and the safetensors library map the data as it lies: a header of odd length would misalign every tensor."""
    for length in range(1, 9):
        name = "n" * length
        with ShardedWriter(tmp_path, [TensorSpec(name, "F32", (2,))], 100) as writer:
            writer.write(name, np.ones(2, np.float32))
        raw = (tmp_path / "model.safetensors").read_bytes()
        assert int.from_bytes(raw[:8], "little") % 8 == 0
        assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + 8


def test_a_file_cut_short_is_noticed_by_the_reader(tmp_path: Path):
    """This keeps half-written folders from loading, should one ever escape."""
    with ShardedWriter(tmp_path, [TensorSpec("t", "F32", (64,))], 1000) as writer:
        writer.write("t", np.ones(64, np.float32))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        safe_open(path, "numpy").__enter__()
