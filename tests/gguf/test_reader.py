"""The GGUF container against gguf-py's writer and reader, and against files that lie."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_mlx.errors import GGUFError
from qwen_mlx.gguf.blocks import BLOCK_TYPES, REMOVED_TYPES
from qwen_mlx.gguf.reader import GGUFFile
from tests.helpers.cases import each
from tests.helpers.gguf_bytes import Q8_0, build, field, tensor, text


def test_agrees_with_gguf_py_on_every_value_type(tmp_path: Path):
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    for name, add, value in (
        ("a.u8", writer.add_uint8, 255),
        ("a.i8", writer.add_int8, -128),
        ("a.u16", writer.add_uint16, 65535),
        ("a.i16", writer.add_int16, -32768),
        ("a.u32", writer.add_uint32, 2**32 - 1),
        ("a.i32", writer.add_int32, -(2**31)),
        ("a.u64", writer.add_uint64, 2**64 - 1),
        ("a.i64", writer.add_int64, -(2**63)),
        ("a.f32", writer.add_float32, 1.5),
        ("a.f64", writer.add_float64, 1e-300),
        ("a.bool", writer.add_bool, True),
        ("a.text", writer.add_string, "naïve 千 \U0001f600"),
        ("a.empty", writer.add_string, " "),
        ("a.ints", writer.add_array, [1, -2, 3]),
        ("a.floats", writer.add_array, [0.5, -2.0]),
        ("a.bools", writer.add_array, [True, False]),
        ("a.texts", writer.add_array, ["x", "", "é"]),
        ("a.nested", writer.add_array, [[1, 2], [3]]),
    ):
        add(name, value)
    rng = np.random.default_rng(0)
    arrays = {
        f"t{n}": rng.standard_normal(shape).astype(np.float32) for n, shape in enumerate([(5,), (3, 7), (2, 3, 4)])
    }
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    for name, value in theirs.fields.items():
        if not name.startswith("GGUF.") and name != "a.nested":  # gguf-py flattens nested arrays when reading
            assert ours.metadata[name] == value.contents(), name
    assert ours.metadata["a.nested"] == [[1, 2], [3]]
    assert isinstance(ours.metadata["a.bool"], bool)
    assert list(ours.tensors) == list(arrays)
    for name, array in arrays.items():
        assert ours.tensors[name].shape == array.shape
        raw = ours.raw(name)
        assert not raw.flags.writeable
        np.testing.assert_array_equal(raw.view(np.float32).reshape(array.shape), array)


def test_version_2_and_read_only_file(tmp_path: Path):
    path = tmp_path / "two.gguf"
    path.write_bytes(build([field("k", 4, struct.pack("<I", 7))], [tensor("t", [8])], bytes(32), version=2))
    path.chmod(0o444)
    file = GGUFFile(path)
    assert (file.version, file.metadata["k"], file.tensors["t"].shape) == (2, 7, (8,))


def test_dims_are_reversed_and_bytes_are_not_moved(tmp_path: Path):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    path = tmp_path / "t.gguf"
    path.write_bytes(build(tensors=[tensor("w", [3, 4])], data=values.tobytes()))
    file = GGUFFile(path)
    assert file.tensors["w"].shape == (4, 3)
    np.testing.assert_array_equal(file.raw("w").view(np.float32), values)


def test_a_file_of_a_vocabulary_alone_may_end_with_its_last_word(tmp_path: Path):
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(build([field("k", 8, text("end"))]).partition(b"end")[0] + b"end")
    assert GGUFFile(path).metadata["k"] == "end"


def test_removed_types_are_those_that_gguf_py_leaves_out():
    known = {int(kind) for kind in gguf.GGMLQuantizationType}
    assert set(REMOVED_TYPES) == set(range(max(BLOCK_TYPES))) - known


def test_alignment_of_the_file_is_used(tmp_path: Path):
    path = tmp_path / "t.gguf"
    head = build([field("general.alignment", 4, struct.pack("<I", 256))], [tensor("w", [4])])
    path.write_bytes(head + bytes(-len(head) % 256) + np.float32([1, 2, 3, 4]).tobytes())
    np.testing.assert_array_equal(GGUFFile(path).raw("w").view(np.float32)[0], [1, 2, 3, 4])


BAD = {
    "empty": (b"", "empty"),
    "not gguf": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "three bytes": (b"GGU", "not a GGUF file"),
    "header cut": (b"GGUF\x03\0\0", "version"),
    "version 1": (build(version=1), "version 1, expected 2 or 3"),
    "version 4": (build(version=4), "version 4, expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2**63 tensors": (build(n_tensors=2**63), "tensor count"),
    "2**63 fields": (build(n_fields=2**63), "metadata count"),
    "long key": (build([struct.pack("<Q", 2**63)], n_fields=1, data=bytes(64)), "metadata field 0"),
    "key not utf-8": (build([text(b"\xff\xfe") + struct.pack("<IB", 0, 1)], data=bytes(64)), "not UTF-8"),
    "key twice": (build([field("k", 0, b"\1"), field("k", 0, b"\2")]), "'k' appears twice"),
    "value type 99": (build([field("k", 99, bytes(8))]), "'k' has value type 99"),
    "array type 99": (build([field("k", 9, struct.pack("<IQ", 99, 1) + bytes(64))]), "'k' has value type 99"),
    "array of 2**60": (build([field("k", 9, struct.pack("<IQ", 4, 2**60))]), "'k' has 1152921504606846976 items"),
    "array past end": (build([field("k", 9, struct.pack("<IQ", 4, 2**20))]), "length of 'k'"),
    "strings past end": (
        build([field("k", 9, struct.pack("<IQ", 8, 2) + text("a") + struct.pack("<Q", 9999))]),
        "string 1 of 'k'",
    ),
    "string not utf-8": (
        build([field("k", 9, struct.pack("<IQ", 8, 1) + text(b"\xff"))]),
        "string 0 of 'k' is not UTF-8",
    ),
    "deep arrays": (build([field("k", 9, struct.pack("<IQ", 9, 1) * 6)], data=bytes(64)), "nests arrays"),
    "alignment 0": (build([field("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment"),
    "alignment 24": (build([field("general.alignment", 4, struct.pack("<I", 24))]), "general.alignment"),
    "alignment text": (build([field("general.alignment", 8, text("32"))]), "general.alignment"),
    "five dims": (build(tensors=[tensor("w", [1] * 5)], data=bytes(64)), "'w' has 5 dimensions"),
    "no dims": (build(tensors=[tensor("w", [])], data=bytes(64)), "'w' has dimensions []"),
    "zero dim": (build(tensors=[tensor("w", [4, 0])], data=bytes(64)), "'w' has dimensions [4, 0]"),
    "2**63 elements": (build(tensors=[tensor("w", [2**62, 2])], data=bytes(64)), "'w' needs bytes"),
    "unknown type": (build(tensors=[tensor("w", [4], kind=777)], data=bytes(64)), "'w' has type id 777"),
    "broken row": (build(tensors=[tensor("w", [33], kind=Q8_0)], data=bytes(640)), "multiple of 32"),
    "truncated data": (build(tensors=[tensor("w", [64])], data=bytes(255)), "'w' needs bytes"),
    "offset past end": (build(tensors=[tensor("w", [1], offset=2**62)], data=bytes(64)), "'w' needs bytes"),
    "offset overflow": (build(tensors=[tensor("w", [8], offset=2**64 - 32)], data=bytes(64)), "'w' needs bytes"),
    "misaligned": (build(tensors=[tensor("w", [1], offset=8)], data=bytes(64)), "alignment 32"),
    "overlap": (
        build(tensors=[tensor("a", [16]), tensor("b", [16], offset=32)], data=bytes(128)),
        "'a' and 'b' overlap",
    ),
    "name twice": (build(tensors=[tensor("a", [8]), tensor("a", [8], offset=32)], data=bytes(64)), "'a' appears twice"),
    "part without others": (build([field("split.count", 2, struct.pack("<H", 2))]), "split in 2"),
}


@each("case", BAD)
def test_bad_file_is_one_sentence_that_names_the_field(case: str, tmp_path: Path):
    data, expected = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(GGUFError, match="No such file"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(GGUFError, match="cannot be read"):
        GGUFFile(tmp_path)


def split_files(folder: Path) -> list[Path]:
    writer = gguf.GGUFWriter(folder / "m.gguf", "qwen2", split_max_tensors=2)
    for n in range(5):
        writer.add_tensor(f"t{n}", np.full((2, 4), n, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("*.gguf"))


def test_split_file_is_read_as_one(tmp_path: Path):
    parts = split_files(tmp_path)
    assert len(parts) == 3
    file = GGUFFile(parts[0])
    assert list(file.tensors) == [f"t{n}" for n in range(5)]
    for n in range(5):
        np.testing.assert_array_equal(file.raw(f"t{n}").view(np.float32), np.full((2, 4), n))
    assert file.size == sum(part.stat().st_size for part in parts)


def test_split_file_with_a_wrong_part(tmp_path: Path):
    parts = split_files(tmp_path)
    with pytest.raises(GGUFError, match="open the first part"):
        GGUFFile(parts[1])
    shutil.copy(parts[2], parts[1])
    with pytest.raises(GGUFError, match=r"split\.no is 2, expected 1"):
        GGUFFile(parts[0])
    parts[1].unlink()
    with pytest.raises(GGUFError, match="part 2 of 3 is missing"):
        GGUFFile(parts[0])


SEED = build(
    [
        field("general.architecture", 8, text("qwen2")),
        field("k.list", 9, struct.pack("<IQ3i", 5, 3, 1, 2, 3)),
        field("k.words", 9, struct.pack("<IQ", 8, 2) + text("ab") + text("cde")),
        field("k.float", 6, struct.pack("<f", 2.5)),
    ],
    [tensor("a", [8, 2]), tensor("b", [32], kind=Q8_0, offset=64)],
    bytes(64 + 64),
)


def test_split_file_with_a_part_of_another_split(tmp_path: Path):
    parts = split_files(tmp_path)
    raw = parts[1].read_bytes()
    at = raw.index(b"split.count") + len(b"split.count") + 4
    parts[1].write_bytes(raw[:at] + struct.pack("<H", 9) + raw[at + 2 :])
    with pytest.raises(GGUFError, match=r"-00002-of-.*split\.count is 9, expected \d+; the parts are mixed up"):
        GGUFFile(parts[0])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_file_opens_or_is_refused(tmp_path: Path, data):
    """Every outcome is a file whose tensors can be read, or a GGUFError: never another exception."""
    raw = bytearray(SEED)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        edit = data.draw(st.sampled_from(["byte", "u64", "cut", "insert"]))
        if edit == "byte":
            raw[at] = data.draw(st.integers(0, 255))
        elif edit == "u64":
            value = data.draw(st.sampled_from([0, 1, 2**31, 2**32, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1))
            raw[at : at + 8] = struct.pack("<Q", value)
        elif edit == "cut":
            del raw[at:]
            raw = raw or bytearray(b"G")
        else:
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=16))
    path = tmp_path / "m.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    refused = ""
    try:
        file = GGUFFile(path)
    except GGUFError as error:
        refused = str(error)
    if refused:
        assert refused.startswith(str(path))
    else:
        for name, info in file.tensors.items():
            assert file.raw(name).nbytes == info.nbytes


@pytest.mark.slow
def test_real_file_agrees_with_gguf_py(real_gguf: Path):
    """Every tensor's name, type, shape and place, and the whole vocabulary, by gguf-py's reading."""
    ours, theirs = GGUFFile(real_gguf), gguf.GGUFReader(real_gguf)
    assert [
        (t.name, tuple(int(d) for d in reversed(t.shape)), int(t.tensor_type), t.data_offset) for t in theirs.tensors
    ] == [(info.name, info.shape, info.type.type_id, info.offset) for info in ours.tensors.values()]
    for name, value in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == value.contents(), name


@each(
    ("fields", "counts", "word"),
    [
        ([field(f"a{n}", 9, struct.pack("<IQ", 0, 1 << 21) + bytes(1 << 21)) for n in range(3)], {}, "items"),
        ([field("a", 8, struct.pack("<Q", 1 << 28))], {}, "128 MB"),
        ([], {"n_tensors": 1 << 20}, "tensor count is 1048576, expected at most"),
        ([], {"n_fields": 1 << 20}, "metadata count is 1048576, expected at most"),
        ([field("a", 9, struct.pack("<IQIQ", 9, 1 << 20, 0, 0))], {}, "length of 'a' is 1048576, expected at most"),
    ],
)
def test_a_header_with_holes_costs_little(tmp_path: Path, fields: list[bytes], counts: dict[str, int], word: str):
    path = tmp_path / "m.gguf"
    path.write_bytes(build(fields, **counts))
    os.truncate(path, 1 << 32)  # a hole: nothing on the disk
    with pytest.raises(GGUFError, match=word):
        GGUFFile(path)
