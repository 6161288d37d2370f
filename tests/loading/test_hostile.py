"""GGUF files that lie. Every outcome is a model folder or a GGUFError: no other exception, no hang, no large memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from qwen_mlx.conversion.convert import convert
from qwen_mlx.errors import GGUFError
from qwen_mlx.loading.checkpoint import open_checkpoint
from tests.helpers.gguf_bytes import text
from tests.helpers.small_gguf import layout, small_fields, small_tensors, strings, u32


def assemble(fields: dict[str, tuple[int, bytes]], tensors: dict[str, tuple[list[int], T]], fill: int = 60) -> bytes:
    """A whole file whose tensor bytes are all `fill` (60 makes finite values in every type)."""
    header, size = layout(fields, tensors)
    return header + bytes([fill]) * size


GOOD = assemble(small_fields(), small_tensors())
HEADER = GOOD.index(b"\x3c" * 100)  # where the tensor bytes begin


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def test_the_unspoilt_file_converts(tmp_path: Path):
    report = convert(write(tmp_path / "good.gguf", GOOD), tmp_path / "out")
    assert {row.stored_as for row in report} > {"mxfp4", "4 bits, group 32, float16 scales", "bfloat16"}


def mutate_field(rng: random.Random) -> bytes:
    """One or two metadata fields with other bytes or another type; all that surrounds them stays in order."""
    fields = small_fields()
    for _ in range(rng.choice((1, 2))):
        key = rng.choice(list(fields))
        kind, payload = fields[key]
        payload = bytearray(payload)
        edit = rng.randrange(4)
        if edit == 0:
            payload[rng.randrange(len(payload))] = rng.randrange(256)
        elif edit == 1:
            payload[-4:] = struct.pack("<I", rng.choice((0, 1, 2, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 0x7F800000)))
        elif edit == 2:
            kind, payload = rng.choice(list(fields.values()))
        else:
            kind, payload = rng.choice(((0, b"\1"), (7, b"\1"), (11, b"\xff" * 8), (12, bytes(6) + b"\xf0\x7f")))
        fields[key] = kind, bytes(payload)
    return assemble(fields, small_tensors())


def mutate(rng: random.Random) -> bytes:
    """One to four edits of the header: bytes, lengths, counts, cuts, insertions, and pieces swapped about."""
    out = bytearray(GOOD)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(min(HEADER, len(out)))
        edit = rng.randrange(7)
        if edit == 0:
            out[at] = rng.randrange(256)
        elif edit == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif edit == 2:
            value = rng.choice((0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1))
            out[at : at + 8] = struct.pack("<Q", value)
        elif edit == 3:
            out[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 4, 5, 6, 7, 8, 9, 13, 2**16, 2**31, 2**32 - 1)))
        elif edit == 4 and rng.random() < 0.3:
            del out[max(at, 1) :]
        elif edit == 5:
            length = rng.randrange(1, 16)
            out[at:at] = rng.randbytes(length) if rng.random() < 0.5 else bytes(length)
        else:
            source, length = rng.randrange(len(out)), rng.randrange(1, 64)
            out[at : at + length] = out[source : source + length]
    return bytes(out)


@pytest.mark.heavy
@pytest.mark.parametrize("quarter", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_mutated_headers_open_or_are_refused_by_name(quarter: int, tmp_path: Path):
    """20,000 mutations in all. What opens has been checked in everything but its tensors' bytes."""
    rng = random.Random(quarter)
    path, opened, unnamed, peak = tmp_path / "m.gguf", 0, 0, 0
    for turn in range(5000):
        path.unlink(missing_ok=True)  # a new file: the last one may still be mapped
        path.write_bytes(mutate(rng) if turn % 2 else mutate_field(rng))
        watched = turn % 10 < 2  # tracing every allocation takes ten times as long
        if watched:
            tracemalloc.start()
        try:
            checkpoint = open_checkpoint(path)
        except GGUFError as error:
            unnamed += not str(error).startswith(str(path))
        else:
            opened += 1
            assert all(tensor.nbytes <= len(GOOD) for tensor in checkpoint.parameters.values())
        finally:
            if watched:
                peak = max(peak, tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
    assert unnamed == 0
    assert peak < 2_000_000, peak
    assert 300 < opened < 4500, opened  # neither all refused nor all harmless, or the mutations test nothing


field_values = st.one_of(
    st.sampled_from([(4, u32(0)), (4, u32(2**32 - 1)), (10, struct.pack("<Q", 2**64 - 1)), (5, struct.pack("<i", -1))]),
    st.floats(width=32).map(lambda value: (6, struct.pack("<f", value))),
    st.integers(0, 2**32 - 1).map(lambda value: (4, u32(value))),
    st.booleans().map(lambda value: (7, bytes([value]))),
    st.text(max_size=20).map(lambda value: (8, text(value))),
    st.lists(st.text(max_size=8), max_size=6).map(lambda values: (9, strings(values))),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6).map(
        lambda values: (9, struct.pack(f"<IQ{len(values)}i", 5, len(values), *values))
    ),
    st.just((9, struct.pack("<IQIQ", 9, 1, 9, 0))),  # a list that holds an empty list of lists
)
names = st.text(max_size=30) | st.sampled_from(
    [
        "../../etc/passwd",
        "/etc/passwd",
        "blk.0.ffn_gate.bias",
        "blk.7.ffn_up.weight",
        "rope_freqs.weight",
        "output.weight",
    ]
)


@st.composite
def whole_files(draw) -> bytes:
    """The small model with fields and tensors dropped, replaced, renamed, retyped, reshaped, and any tensor bytes."""
    fields, tensors = small_fields(), small_tensors()
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(fields)) | names)
        if draw(st.booleans()) and key in fields and len(fields) > 1:
            del fields[key]
        else:
            fields[key] = draw(field_values)
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(sorted(tensors)))
        dims, kind = tensors[key]
        edit = draw(st.sampled_from(["drop", "rename", "retype", "reshape"]))
        if edit == "retype":
            new = draw(st.sampled_from([T.F32, T.F64, T.I8, T.I32, T.Q8_0, T.Q5_1, T.NVFP4, T.Q6_K, T.MXFP4, T.TQ1_0]))
            tensors[key] = (dims, new)
        elif edit == "reshape":
            tensors[key] = (draw(st.lists(st.sampled_from([1, 2, 16, 31, 32, 64]), min_size=1, max_size=4)), kind)
        else:
            del tensors[key]
            if edit == "rename":
                tensors[draw(names)] = (dims, kind)
        if not tensors:
            break
    return assemble(fields, tensors, draw(st.sampled_from([60, 0, 255, 128, 252]) | st.integers(0, 255)))


@pytest.mark.heavy
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(whole_files(), st.booleans(), st.sampled_from([None, 4, 8]))
def test_whole_files_convert_or_are_refused(tmp_path: Path, raw: bytes, allow_nan: bool, bits: int | None):
    path, out = tmp_path / "m.gguf", tmp_path / "here" / "out"
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    refused = ""
    try:
        report = convert(path, out, allow_nan=allow_nan, requantize=bits, group_size=32, force=True)
    except GGUFError as error:
        refused = str(error)
    event("refused" if refused else "converted")
    if refused:
        assert refused.startswith(str(path))
    else:
        assert allow_nan or not any(row.not_finite for row in report)
        assert {file.name for file in out.iterdir()} <= {
            *("README.md", "config.json", "conversion.json", "generation_config.json", "model.safetensors"),
            *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        }
    assert {file.name for file in tmp_path.iterdir()} <= {"m.gguf", "here"}
    assert {file.name for file in (tmp_path / "here").iterdir()} <= {"out"} if out.parent.exists() else True
