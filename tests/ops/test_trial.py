"""The trial of the kernels, on a stand-in GPU whose kernels have faults: each costs its own part, and no other."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from gguf import GGMLQuantizationType as T

from qwen_mlx import generate, load, ops
from qwen_mlx.cli import selftest
from qwen_mlx.loading import kernels
from qwen_mlx.ops import dispatch, trial
from qwen_mlx.ops.trial import session, verdict
from qwen_mlx.ops.trial.cases import Data, cases
from reference.small_models import RandomModel, write_gguf
from tests.helpers.cases import each
from tests.helpers.packed_models import model_of
from tests.helpers.trials import KERNELS, stand_in_gpu

WRONG = "(numbers are not MLX's|units in the last place off)"
FAULTS = {
    "compile": "error: no matching function for call to 'load'",
    "threads": "Thread group size .512. is greater than the maximum allowed",
    "bit": WRONG,
    "row": WRONG,
    "later": WRONG,
    "slow": "slower than MLX's own",
}
NEEDED = {"matvec", "attend", "unpack"}  # by a decoding step


def spec_of(packing: str, dtype: mx.Dtype = mx.bfloat16) -> trial.Spec:
    model = model_of(packing, True)
    model.set_dtype(dtype)
    return kernels.spec_of(model)


@pytest.fixture(scope="module")
def spec() -> trial.Spec:
    return spec_of("affine")


@pytest.mark.parametrize("packing", [pytest.param("dense", marks=pytest.mark.slow), "affine", "mixed"])
def test_kernels_that_are_right_are_proven(tmp_path, packing):
    with stand_in_gpu():
        assert ops.executor() == "reference", "nothing has proved itself yet"
        verdict, held = trial.prove(spec_of(packing), tmp_path)
        verdict.adopt()
        assert held
        assert verdict.refused == {}
        expected = {"step", *KERNELS} - ({"unpack"} if packing == "dense" else set())
        assert set(verdict.proven) == expected
        assert {part for part in dispatch.PARTS if ops.executor(part) == "metal"} == expected
        assert "rope: proved itself on this machine" in ops.explain()
        assert trial.prove(spec_of(packing), tmp_path) == (verdict, False), "it is kept"


def test_products_of_a_few_rows_are_tried_where_they_have_a_kernel(spec, monkeypatch):
    """On NVIDIA's GPUs, if the model has one dense matrix or more."""
    dense = spec_of("dense").products[0]
    one = replace(spec, products=(*spec.products, replace(dense, matrices=dense.matrices[:1])))
    for device, counts in (("metal", [0, 0, 0]), ("cuda", [0, 1, 1])):
        monkeypatch.setattr(dispatch, "device", lambda device=device: device)
        found = [[case.part for case in cases(tried)].count("matmul") for tried in (spec, one, spec_of("dense"))]
        assert found == counts


@each("exact", [True, False])
def test_rows_are_tried_with_padding(spec, exact: bool):
    (case,) = (case for case in cases(spec) if case.name == "attention of rows")
    *inputs, first = case.make(Data(spec, exact, 1))
    with ops.forced("reference"):
        (right,), (unpadded,) = case.kernel(*inputs, first), case.kernel(*inputs, None)
    assert mx.array_equal(right[0], unpadded[0]), "the first row has none"
    assert not any(mx.array_equal(right[row], unpadded[row]) for row in (1, 2))


@each(("part", "fault"), [(part, list(FAULTS)[(i + j) % 6]) for i, part in enumerate(KERNELS) for j in (0, 3)])
def test_a_fault_costs_its_own_part(tmp_path, spec, part, fault):
    with stand_in_gpu(part, fault):
        verdict, _ = trial.prove(spec, tmp_path)
        verdict.adopt()
        assert set(verdict.refused) == {part, *(["step"] if part in NEEDED else [])}
        assert re.search(FAULTS[fault], verdict.refused[part])
        assert ops.executor(part) == "reference"
        assert f"{part}: plain MLX, for its kernels were refused" in ops.explain()
        others = {"step", *KERNELS} - set(verdict.refused)
        assert {p for p in dispatch.PARTS if ops.executor(p) == "metal"} == others


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> Path:
    kinds = dict.fromkeys(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"), T.Q4_K)
    model = RandomModel(hidden_size=256, intermediate_size=512, num_hidden_layers=2, tie_word_embeddings=True)
    kinds = {name: T.Q4_K for name in model.state_dict() if any(part in name for part in kinds)}
    return write_gguf(tmp_path_factory.mktemp("trial") / "small.gguf", model, kinds)


def text_of(path: Path, launched: list[str]) -> tuple[str, set[str]]:
    """Six greedy tokens, and the kernels that made them."""
    model, tokenizer = load(path, dtype="float32")
    launched.clear()
    text = generate(model, tokenizer, "hello", raw=True, max_tokens=6, temperature=0)
    return text, {name.removeprefix("qwen_") for name in launched}


def test_a_text_is_that_of_plain_mlx_whatever_is_wrong(small_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QWEN_MLX_CACHE", str(tmp_path))
    with stand_in_gpu() as gpu:
        monkeypatch.setenv("QWEN_MLX_KERNELS", "off")
        dispatch.setting.cache_clear()
        plain, kernels_used = text_of(small_file, gpu.launched)
        assert not kernels_used
    assert capsys.readouterr().err == ""
    faults = {"": "", "matvec": "bit", "swiglu": "later"}  # a part that the step needs, and one that it does not
    for part, fault in faults.items():
        with stand_in_gpu(part, fault) as gpu:
            text, kernels_used = text_of(small_file, gpu.launched)
            assert text == plain, part
            assert not any(name.startswith(KERNELS.get(part, ())) for name in kernels_used)
            assert any(name.startswith("best_token") for name in kernels_used)
            assert any(name.startswith("matvec_qkv") for name in kernels_used) == (part not in NEEDED)
        line = capsys.readouterr().err
        assert re.fullmatch(r"qwen_mlx: kernels tried on .*, Linux .* \(\d+ s\): in use, 1.0 times plain MLX.*\n", line)
        assert ("but plain MLX for" in line) == bool(part)
        assert f"{part} (" in line
        for file in (tmp_path / "kernels").iterdir():
            file.unlink()


def test_a_verdict_is_followed_without_a_word(small_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QWEN_MLX_CACHE", str(tmp_path))
    with stand_in_gpu("rope", "compile"):
        load(small_file, dtype="float32")
    capsys.readouterr()
    with stand_in_gpu() as gpu:
        load(small_file, dtype="float32")
        assert gpu.launched == []
        assert ops.executor("rope") == "reference"
        assert ops.executor("step") == "metal"
        monkeypatch.setenv("QWEN_MLX_KERNELS", "on")
        dispatch.setting.cache_clear()
        assert ops.executor("rope") == "metal"
        monkeypatch.setenv("QWEN_MLX_KERNELS", "-step")
        dispatch.setting.cache_clear()
        assert (ops.executor("step"), ops.executor("rope"), ops.executor("swiglu")) == (
            "reference",
            "reference",
            "metal",
        )
    assert capsys.readouterr().err == ""


def test_the_command_tries_once_more_and_says_what_it_found(small_file, tmp_path, monkeypatch, capsys):
    for name, value in {"QWEN_MLX_CACHE": str(tmp_path), "QWEN_MLX_KERNELS": "off"}.items():
        monkeypatch.setenv(name, value)  # both are put back afterwards
    report = tmp_path / "trial.json"
    with stand_in_gpu("rope", "slow"):
        arguments = ["--trial", "--model", str(small_file), "--json", str(report)]
        assert selftest.main(arguments) == 1
        first = next((tmp_path / "kernels").iterdir()).stat().st_mtime_ns
        assert selftest.main(arguments) == 1, "it asks again, whatever is kept"
        assert next((tmp_path / "kernels").iterdir()).stat().st_mtime_ns > first
    out = capsys.readouterr().out.splitlines()
    assert any(line.startswith("qkv_rope ") and "11000000.0 us" in line for line in out)
    assert "rope: plain MLX, for its kernels were refused (slower than MLX's own, 11000000 us against 1000000)" in out
    assert "swiglu: proved itself on this machine" in out
    assert out[-1].endswith(f"wrote {report}")
    data = json.loads(report.read_text())
    assert list(data["refused"]) == ["rope"]
    assert data["device"]
    assert data["spec"]["hidden_size"] == 256


def test_the_real_process_tries_kernels_in_the_emulator(spec, monkeypatch):
    code = """
        import sys; sys.path[:] = sys.argv[1:]
        from reference.emulator import emulate
        from qwen_mlx.ops.trial import child
        child.seconds = lambda call, inputs, traced=True: 1.0
        child.choose_cuts = lambda spec, wanted: {}
        with emulate(checked=False):
            child.main()
    """
    own = session.command()
    assert own[:2] == [sys.executable, "-c"]
    monkeypatch.setattr(session, "command", lambda: [*own[:2], textwrap.dedent(code), *own[3:]])
    with stand_in_gpu(own_process=True):
        found = session.hold(spec)
    assert found.refused == {}
    assert set(found.proven) == {"step", *KERNELS}


# ---------------------------------------------------------------------------------------------------------------------
# The process, played by a script that knows what to say

SPEC = trial.Spec(
    *("float32", 1e-6, 64, 4, 2, 16, 128, 300, 16, (0,)),
    (trial.Product("matvec", (trial.MatrixSpec("dense", 0, 0, 64, 64),), 2),),
)
PARTS = ["rms_norm", "rms_norm", "rope", "swiglu", "best_token", "matvec", "attend", "attend", "attend"]
SCRIPT = """
    import json, os, sys, time
    request = json.loads(sys.stdin.read())
    def say(**line):
        print(request["token"] + json.dumps(line), flush=True)
    def right(name, **more):
        say(start=name)
        say(done=name, **({"fault": None, "count": 1, "kernel": 1.0, "plain": 2.0} | more))
    names = [n for n in NAMES if n not in request["skip"] and PARTS[n] not in request["skip"]]
    for name in names:
        if name == "qkv_rope":
            FAULT
        right(name)
    say(end=True)
"""


def script(fault: str) -> list[str]:
    parts = {case.name: case.part for case in trial.cases.cases(SPEC)}
    code = f"PARTS = {parts!r}\nNAMES = list(PARTS)\n" + textwrap.dedent(SCRIPT).replace("FAULT", fault)
    return [sys.executable, "-S", "-c", code]


ENDS_AT_ONCE = """
import json, sys
request = json.loads(sys.stdin.read())
print(request["token"] + json.dumps({"start": "warp"}))
print(request["token"] + json.dumps({"end": True}))
"""
PROCESSES = {  # what it does when it comes to rope, and the reason that is told
    "crash": ("say(start=name); os.abort()", "ended with signal 6"),
    "exit with words": ("say(start=name); print('boom', file=sys.stderr); sys.exit(3)", "ended with status 3: boom"),
    "hang": ("say(start=name); time.sleep(60)", "did not end in time"),
    "silence about one": ("say(start=name); continue", "its result was lost"),
    "another's result": ("say(start=name); say(done='swiglu', fault=None); continue", "its result was lost"),
    "no numbers": ("right(name, kernel='fast'); continue", "its result was lost"),
    "not a number": ("right(name, plain=float('nan')); continue", "its result was lost"),
    "less than nothing": ("right(name, kernel=-1.0); continue", "its result was lost"),
    "no JSON": ("say(start=name); print(request['token'] + '{'); continue", "its result was lost"),
    "a list": ("say(start=name); print(request['token'] + '[]'); continue", "its result was lost"),
    "half a line": ("say(start=name); print(request['token'] + '{\"done\": \"qk', end=''); sys.exit()", "was lost"),
    "a wrong kernel": ("right(name, fault='5 of 9 numbers'); continue", "5 of 9 numbers"),
    "a slow kernel": ("right(name, kernel=3.0); continue", "slower than MLX's own"),
}


@each("name", PROCESSES)
def test_a_process_that_fails_costs_the_part_that_it_tries(monkeypatch, name):
    fault, reason = PROCESSES[name]
    monkeypatch.setattr(session, "command", lambda: script(fault))
    if name == "hang":
        monkeypatch.setattr(session, "CASE_SECONDS", 3.0)
    shown: list[tuple[int, int]] = []
    found = session.hold(SPEC, lambda done, total: shown.append((done, total)))
    assert list(found.refused) == ["rope"], found.refused
    assert reason in found.refused["rope"]
    assert set(found.proven) == {"step", *PARTS} - {"rope"}
    assert found.speedup == pytest.approx(1.8 if name == "a slow kernel" else 2.0)
    assert shown[-1] == (9, 9)


NONSENSE = {
    "noise around the results": "os.write(1, b'\\xff\\x00 loading\\n' * 1000); print({'done': name, 'fault': 'x'})",
    "another's token": "print('0123456789abcdef ' + json.dumps({'start': name})); print('x' * 3000000)",
}


@pytest.mark.parametrize("name", NONSENSE)
def test_what_others_print_is_no_result(monkeypatch, name):
    monkeypatch.setattr(session, "command", lambda: script(NONSENSE[name]))
    found = session.hold(SPEC)
    assert found.refused == {}
    assert set(found.proven) == {"step", *PARTS}


@each(
    ("command", "reason"),
    [
        ([sys.executable, "-S", "-c", "raise SystemExit('no MLX here')"], "status 1: no MLX here"),
        ([sys.executable, "-S", "-c", "print('nonsense' * 100000)"], "status 0"),
        ([sys.executable, "-S", "-c", ENDS_AT_ONCE], "it gave no result"),
        (["/nowhere/python"], "no process could be started (No such file"),
    ],
)
def test_a_process_that_does_not_begin_proves_nothing(monkeypatch, command, reason):
    monkeypatch.setattr(session, "command", lambda: command)
    found = session.hold(SPEC)
    assert found.proven == ()
    assert set(found.refused) == {"step", *PARTS}
    assert reason in found.refused["rope"]
    assert reason in str(found)


def test_all_time_has_an_end(monkeypatch):
    """The clock jumps when two cases are done; the process hangs before it says what it tries next."""
    now = [0.0]
    monkeypatch.setattr(session, "command", lambda: script("time.sleep(600)"))
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: now[0]))
    found = session.hold(SPEC, lambda done, total: now.append(now.pop() + session.ALL_SECONDS * (done == 2)))
    assert set(found.proven) == {"rms_norm"}
    assert "did not end in time" in found.refused["rope"]


def test_nothing_of_a_process_is_left(monkeypatch, tmp_path):
    pids, waited = tmp_path / "pids", tmp_path / "waited"
    child = f"import subprocess; file = open({str(pids)!r}, 'w'); p = subprocess.Popen(['sleep', '60'])"
    child += "; file.write(f'{p.pid} {os.getpid()}'); file.close()"
    fault = f"{child}; say(start=name); time.sleep(30); open({str(waited)!r}, 'w')"
    monkeypatch.setattr(session, "command", lambda: script(fault))
    monkeypatch.setattr(session, "CASE_SECONDS", 1.0)
    session.hold(SPEC)
    assert not waited.exists(), "it was waited for, not ended"
    for pid in map(int, pids.read_text().split()):
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"


# ---------------------------------------------------------------------------------------------------------------------
# The verdict's file

KEPT = verdict.Verdict(
    ("rope",),
    {"step": "it needs matvec"},
    {"matvec dense 64x64": ("two rows", 64)},
    1.5,
    {"qkv_rope": (1.0, 2.0)},
    3.0,
)


def test_a_verdict_is_read_as_it_was_written(tmp_path):
    known = verdict.identity(SPEC)
    path = verdict.file_of(tmp_path, known)
    verdict.write(path, known, KEPT)
    assert verdict.read(path, known) == KEPT
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing temporary is left"


CHANGES = {
    "another's": lambda data: data["identity"].update(mlx="0.1"),
    "an unknown part": lambda data: data["verdict"].update(proven=["rope", "warp"]),
    "a part twice": lambda data: data["verdict"].update(refused={"rope": "slow"}),
    "a reason that is no text": lambda data: data["verdict"].update(refused={"step": None}),
    "parts in no list": lambda data: data["verdict"].update(proven=5),
    "an unknown cut": lambda data: data["verdict"].update(choices={"matvec": ["nine rows", 64]}),
    "another number of threadgroups": lambda data: data["verdict"].update(choices={"matvec": ["two rows", 10**9]}),
    "a speedup in words": lambda data: data["verdict"].update(speedup="fast"),
    "a time in words": lambda data: data["verdict"].update(times={"qkv_rope": ["fast", 1.0]}),
    "no verdict": lambda data: data.pop("verdict"),
}
DAMAGED = {
    "empty": b"",
    "half": b'{"identity": {"dev',
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "huge": b'"' + b"x" * (2 << 20) + b'"',
}


@each("name", [*CHANGES, *DAMAGED])
def test_a_verdict_that_is_damaged_or_foreign_is_none(tmp_path, monkeypatch, name):
    known = verdict.identity(SPEC)
    path = verdict.file_of(tmp_path, known)
    verdict.write(path, known, KEPT)
    if name in CHANGES:
        data = json.loads(path.read_text())
        CHANGES[name](data)
        path.write_text(json.dumps(data))
    else:
        path.write_bytes(DAMAGED[name])
    assert verdict.read(path, known) is None
    monkeypatch.setattr(session, "command", lambda: script("pass"))
    found, held = trial.prove(SPEC, tmp_path)
    assert held, "it is asked anew"
    assert verdict.read(path, known) == found


@each("what", ["device_info", "mac_ver", "__version__", "source", "spec"])
def test_any_change_of_the_machine_or_the_model_asks_anew(tmp_path, monkeypatch, what):
    before = verdict.file_of(tmp_path, verdict.identity(SPEC))
    spec = SPEC
    if what == "device_info":
        monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M9", "architecture": "applegpu_g99s"})
    elif what == "mac_ver":
        monkeypatch.setattr(verdict.platform, "mac_ver", lambda: ("27.1", ("", "", ""), "arm64"))
    elif what == "__version__":
        monkeypatch.setattr(mx, "__version__", "9.9")
    elif what == "source":
        monkeypatch.setattr(dispatch, "SOURCES", Path(os.devnull).parent / "nowhere")
    else:
        spec = trial.Spec(**{**vars(SPEC), "eps": 1e-5})
    assert verdict.file_of(tmp_path, verdict.identity(spec)) != before


def test_a_folder_that_cannot_be_written_costs_only_another_trial(tmp_path, monkeypatch):
    (tmp_path / "kernels").write_text("in the way")
    monkeypatch.setattr(session, "command", lambda: script("pass"))
    for _ in range(2):
        found, held = trial.prove(SPEC, tmp_path)
        assert held
        assert set(found.proven) == {"step", *PARTS}


def test_verdicts_that_are_written_at_once_leave_a_whole_one(tmp_path):
    known = verdict.identity(SPEC)
    path = verdict.file_of(tmp_path, known)
    verdict.write(path, known, KEPT)
    stop, broken = threading.Event(), []

    def write() -> None:
        while not stop.is_set():
            verdict.write(path, known, KEPT)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for _ in range(300):
        if verdict.read(path, known) != KEPT:
            broken.append(path)
    stop.set()
    for writer in writers:
        writer.join()
    assert not broken
    assert [file.name for file in path.parent.iterdir()] == [path.name]
