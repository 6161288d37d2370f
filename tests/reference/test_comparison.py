"""The comparison on small random models: every shape, run, source and dtype; the measures; the tolerances' file."""

from __future__ import annotations

import copy
import resource
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_mlx import load, ops
from qwen_mlx.backend import mx
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.model.fused import FusedModel
from qwen_mlx.model.qwen2 import Qwen2
from reference import mlx_side, tolerances, torch_side
from reference.compare import trace_bytes
from reference.comparison import TapResult, Tolerance, compare
from reference.inputs import config_of, runs_of
from reference.measures import Measure, measure, measure_logits
from reference.noise import SMALL_SHAPES, measure_floors, small_ids, small_runs
from reference.small_models import hf_model, save_folder, write_gguf
from reference.taps import CACHE_TAPS, LAYER_TAPS, Run, keys_of_call
from tests.helpers.cases import each

RUNS = {run.name: run for run in small_runs()}


def test_runs_divide_their_ids():
    runs = runs_of(list(range(1, 17)))
    assert {name: run.chunks for name, run in runs.items()} == {
        "prefill": (16,),
        "chunked": (5, 5, 5, 1),
        "decode": (8, *[1] * 8),
        "padded": (13, 1, 1, 1),
    }
    assert runs["padded"].padding == (0, 8, 12)


@each("dtype", tolerances.DTYPES)
@each("shape", SMALL_SHAPES)
def test_every_tap_is_within_its_tolerance(shape: str, dtype: str, tmp_path: Path):
    """One pass, chunks, token by token, and padded rows, from safetensors and, in float32, from a GGUF."""
    theirs = hf_model(list(SMALL_SHAPES).index(shape), **SMALL_SHAPES[shape])
    limits = tolerances.tolerances("small", dtype)
    sources = [save_folder(tmp_path / "m", theirs)]
    if dtype == "float32" and not {"rope_parameters", "use_sliding_window"} & SMALL_SHAPES[shape].keys():
        sources.append(write_gguf(tmp_path / "m.gguf", theirs))
    for source in sources:
        ours, _ = load(source, dtype=dtype)
        for run in small_runs():
            result = compare(ours, run, torch_side.record(theirs, run), limits, dtype)
            assert result.passed, (source.name, run.name, result.first)
            calls, layers = len(run.chunks), theirs.config.num_hidden_layers
            assert len(result.results) == calls * (3 + layers * (len(LAYER_TAPS) + len(CACHE_TAPS)))


def test_past_1024_tokens(tmp_path: Path):
    theirs = hf_model(num_hidden_layers=1, max_position_embeddings=2048)
    ours, _ = load(save_folder(tmp_path / "m", theirs), dtype="float32")
    for run in (Run.prefill(small_ids(1100)), Run.chunked(small_ids(1100), 512)):
        limits = tolerances.from_floors(measure_floors(theirs, [run], "float32"), "float32")
        result = compare(ours, run, torch_side.record(theirs, run), limits, "float32")
        assert result.passed, result.first


def test_mlp_biases_are_compared(tmp_path: Path):
    theirs, rng = hf_model(), np.random.default_rng(0)
    biases = {
        f"model.layers.{i}.mlp.{name}.bias": rng.standard_normal(size).astype(np.float32)
        for i in range(3)
        for name, size in (("gate_proj", 160), ("up_proj", 160), ("down_proj", 64))
    }
    torch_side.add_mlp_biases(theirs, biases)
    path = write_gguf(tmp_path / "m.gguf", theirs)
    ours, _ = load(path, dtype="float32")
    limits = tolerances.tolerances("small", "float32")
    assert compare(ours, RUNS["prefill"], torch_side.record(theirs, RUNS["prefill"]), limits, "float32").passed
    again = torch_side.load(path)  # from the file, where transformers' own reader drops them
    assert compare(ours, RUNS["prefill"], torch_side.record(again, RUNS["prefill"]), limits, "float32").passed


@each("kind", [T.Q8_0, T.Q5_0, T.Q4_K, T.Q6_K], ids=lambda kind: kind.name)
def test_a_quantized_gguf_read_by_both_sides(kind: T, tmp_path: Path):
    """Each side with its own reader; packed weights too."""
    path = write_gguf(tmp_path / "m.gguf", hf_model(hidden_size=256, intermediate_size=256, num_hidden_layers=2), kind)
    theirs = torch_side.load(path)
    trace = torch_side.record(theirs, RUNS["prefill"])
    limits = tolerances.from_floors(measure_floors(theirs, [RUNS["prefill"]], "float32"), "float32")
    for packed in (False, True):
        ours, _ = load(path, dtype="float32", quantized=packed)
        result = compare(ours, RUNS["prefill"], trace, limits, "float32")
        assert result.passed, result.first


def test_recording_leaves_nothing_behind_and_changes_nothing(tmp_path: Path):
    ours, _ = load(save_folder(tmp_path / "m", hf_model()), dtype="float32")
    before = {name: getattr(ops, name) for name in dir(ops)}
    calls = {type(module): type(module).__call__ for module in ours.modules() if type(module) is not Qwen2}
    ids = RUNS["prefill"].ids
    plain = np.array(ours(mx.array(ids)))
    fused = np.array(FusedModel.of(ours)(mx.array(ids), ours.make_cache(), 0))
    taps: dict[str, np.ndarray] = {}
    mlx_side.record(ours, RUNS["prefill"], lambda key, array: taps.__setitem__(key, np.array(array)))
    assert np.array_equal(taps["0.logits"], fused)
    assert set(taps) == set(keys_of_call(0, 3))
    with mlx_side.recording(ours, lambda *_: None):
        assert np.array_equal(np.array(ours(mx.array(ids))), plain)
    with pytest.raises(ZeroDivisionError), mlx_side.recording(ours, lambda *_: 1 / 0):
        ours(mx.array(ids))
    assert before == {name: getattr(ops, name) for name in dir(ops)}
    assert all(cls.__call__ is call for cls, call in calls.items())


def test_the_reference_is_unmodified_by_its_hooks():
    theirs = hf_model()
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        plain = theirs(torch.tensor(RUNS["prefill"].ids)).logits.numpy()
    trace = torch_side.record(theirs, RUNS["prefill"])
    assert np.array_equal(trace["0.logits"], plain)
    assert set(trace) == set(keys_of_call(0, 3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in theirs.modules())


def test_measures():
    x = np.array([[3.0, 4.0], [6.0, 8.0]], np.float32)
    exact = measure(x, x)
    assert (exact.max_abs, exact.l2, exact.row, exact.problem) == (0, 0, 0, None)
    assert exact.cosine == pytest.approx(1)
    off = measure(x + np.array([[0.5, 0], [0, 0]], np.float32), x)
    assert off.max_abs == pytest.approx(0.5)
    assert off.l2 == pytest.approx(0.5 / 125**0.5)
    assert off.row == pytest.approx(0.1)
    assert off.worst == ((0, 0), 3.5, 3.0)
    for bad in (np.full_like(x, np.nan), np.where(x == 8, np.nan, x), np.where(x == 8, np.inf, x), x[:1], x.T[None]):
        found = measure(bad, x)
        assert found.problem
        assert found.l2 == found.row == np.inf
    assert "first, nan, at [1, 1]" in measure(np.where(x == 8, np.nan, x), x).problem
    assert "reference itself" in measure(x, x * np.nan).problem
    assert measure(x, 0 * x).l2 == np.inf
    assert measure(0 * x, 0 * x).l2 == 0
    assert measure(x[:0], x[:0]).problem


def test_both_errors_have_a_limit():
    for l2, row, passed in ((1e-6, 1e-6, True), (2e-6, 1e-6, False), (1e-6, 2e-6, False), (np.nan, 1e-6, False)):
        result = TapResult("0.norm", Measure(0.0, l2, row, 1.0), Tolerance(1e-6, 1e-6))
        assert result.passed == passed


def test_a_tolerance_of_zero_means_equal(tmp_path: Path):
    theirs = hf_model(num_hidden_layers=1)
    ours, _ = load(save_folder(tmp_path / "m", theirs), dtype="float32")
    trace = torch_side.record(theirs, RUNS["prefill"])
    trace["0.embeddings"] = trace["0.embeddings"] * np.float32(1 + 2**-22)
    result = compare(ours, RUNS["prefill"], trace, tolerances.tolerances("small", "float32"), "float32")
    assert result.first.key == "0.embeddings"
    assert result.first.ratio == np.inf


def test_logits_measures_equal_torch():
    rng = np.random.default_rng(0)
    theirs = rng.standard_normal((5, 300)).astype(np.float32)
    ours = theirs + 0.1 * rng.standard_normal((5, 300)).astype(np.float32)
    found = measure_logits(ours, theirs)
    a, b = (torch.log_softmax(torch.tensor(x).double(), -1) for x in (ours, theirs))
    expected = torch.nn.functional.kl_div(a, b, log_target=True, reduction="none").sum(-1).max().item()
    assert found.kl == pytest.approx(expected)
    assert found.top1 == np.mean(ours.argmax(-1) == theirs.argmax(-1))
    assert measure_logits(theirs, theirs).top10 == 1
    assert measure_logits(-theirs, theirs).top10 == 0


def test_cached_traces_are_the_same_and_are_never_taken_for_others(tmp_path: Path):
    path, run, folder = save_folder(tmp_path / "m", hf_model()), RUNS["chunked"], tmp_path / "cache"
    first, was_there = torch_side.cached_trace(path, run, folder)
    assert not was_there
    again, was_there = torch_side.cached_trace(path, run, folder)
    assert was_there
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not torch_side.cached_trace(path, RUNS["prefill"], folder)[1]
    save_folder(path, hf_model(1))
    other, was_there = torch_side.cached_trace(path, run, folder)
    assert not was_there
    assert not np.array_equal(other["0.logits"], first["0.logits"])
    for damage in (lambda whole: whole[:100], lambda whole: whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]):
        for file in folder.iterdir():
            file.write_bytes(damage(file.read_bytes()))
        assert not torch_side.cached_trace(path, run, folder)[1]
        assert torch_side.cached_trace(path, run, folder)[1]


def test_a_trace_that_another_version_made_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, run = save_folder(tmp_path / "m", hf_model(num_hidden_layers=1)), RUNS["prefill"]
    for other in (RUNS["prefill"], RUNS["decode"]):
        torch_side.cached_trace(path, other, tmp_path / "cache")
    before = set((tmp_path / "cache").iterdir())
    monkeypatch.setattr(torch_side.transformers, "__version__", "9.9")
    assert not torch_side.cached_trace(path, run, tmp_path / "cache")[1]
    after = set((tmp_path / "cache").iterdir())
    assert len(before) == len(after) == 2
    assert len(before & after) == 1


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, capsys):
    path, run = save_folder(tmp_path / "m", hf_model(num_hidden_layers=1)), RUNS["prefill"]
    (tmp_path / "file").write_text("in the way")
    trace, was_there = torch_side.cached_trace(path, run, tmp_path / "file" / "cache")
    assert "0.logits" in trace
    assert not was_there
    assert "cannot be kept" in capsys.readouterr().err
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))  # as a disk that is full
    try:
        torch_side.cached_trace(path, run, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be kept" in capsys.readouterr().err
    assert list((tmp_path / "full").iterdir()) == []


def test_memory_is_known_before(tmp_path: Path):
    theirs = hf_model(**SMALL_SHAPES["gqa 7, tied"])
    path = save_folder(tmp_path / "m", theirs)
    for run in small_runs():
        held = sum(array.nbytes for array in torch_side.record(theirs, run).values())
        assert trace_bytes(config_of(path), run) == held


def test_every_value_of_every_layer_and_call_is_compared(tmp_path: Path):
    """One element of each tap of the reference is off by a thousandth: all of them fail, and nothing else."""
    theirs = hf_model()
    ours, _ = load(save_folder(tmp_path / "m", theirs), dtype="float32")
    limits = tolerances.tolerances("small", "float32")
    for run, longest in ((Run.decode(small_ids(10), 8), 0), (RUNS["padded"], 1)):
        trace = torch_side.record(theirs, run)
        keys = [key for call in range(len(run.chunks)) for key in keys_of_call(call, 3)]
        assert sorted(trace) == sorted(keys)
        for array in trace.values():
            row = array[longest, -1].reshape(-1, array.shape[-1])[-1]
            row[np.abs(row).argmax()] *= 1.001
        result = compare(ours, run, trace, limits, "float32")
        assert [tap.key for tap in result.failures] == keys


def test_padding_is_not_compared(tmp_path: Path):
    theirs, run = hf_model(num_hidden_layers=1), RUNS["padded"]
    ours, _ = load(save_folder(tmp_path / "m", theirs), dtype="float32")
    trace = torch_side.record(theirs, run)
    for key, array in trace.items():
        start = 0 if "cache" in key else sum(run.chunks[: int(key[0])])
        array[2, : max(0, run.padding[2] - start)] = np.nan
    assert np.isnan(trace["0.logits"]).any()
    assert compare(ours, run, trace, tolerances.tolerances("small", "float32"), "float32").passed


def test_float64_is_float64_throughout():
    """Its noise floor would hide in float32 otherwise: of the norms, the angles and the softmax."""
    exact = torch_side.in_dtype(hf_model(**SMALL_SHAPES["sliding window"]), "float64")
    rough = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point() and out.dtype != torch.float64:
                rough.append(str(function))
            return out

    with Watch():  # where the window holds padding only, transformers' own softmax gives NaN
        trace = torch_side.record(exact, RUNS["padded"])
    assert rough == []
    assert all(array.dtype == np.float64 and np.isfinite(array).all() for array in trace.values())


def test_tolerances_are_their_multiples_of_their_floors():
    assert tolerances.inconsistent(tolerances.read()) == []


def test_tolerances_only_tighten():
    """Against the newest committed version that differs: what is allowed grows with a new measurement only."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tolerances.FILE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    now = tolerances.FILE.read_text(encoding="utf-8")
    commits = git("log", "-n", "20", "--format=%H", "--", tolerances.FILE.name).split()
    versions = (git("show", f"{commit}:./{tolerances.FILE.name}") for commit in commits)
    before = next((text for text in versions if text and text != now), now)  # a copy without history has none
    assert tolerances.loosened(tolerances.read(before), tolerances.read(now)) == []


def test_a_loosened_tolerance_is_seen():
    old = tolerances.read()
    new = copy.deepcopy(old)
    new["small"]["float32"]["gate"]["l2"] *= 1.5
    assert "gate.l2 grew" in tolerances.loosened(old, new)[0]
    assert "gate.l2" in tolerances.inconsistent(new)[0]
    new["small"]["float32"]["gate"]["l2_floor"] *= 1.5
    assert len(tolerances.loosened(old, new)) == 1, "a floor typed by hand is no measurement"
    new["small"]["float32"]["measured"] = "elsewhere"
    assert tolerances.loosened(old, new) == []
    assert tolerances.inconsistent(new) == []
    new["small"]["float32"]["multiples"] = [9.0, 9.0]
    assert "multiples grew" in tolerances.loosened(old, new)[0]
    assert "multiples" in tolerances.inconsistent(new)[0]
    new = copy.deepcopy(old)
    new["small"]["float32"]["gate"]["row"] *= 1.5
    new["small"]["float32"]["measured"] = "elsewhere"
    assert "gate.row grew" in tolerances.loosened(old, new)[0], "a new text beside the same floor is no measurement"
    new = copy.deepcopy(old)
    del new["small"]["float32"]["gate"], new["real"]["bfloat16"]
    assert len(tolerances.loosened(old, new)) == 2
    assert tolerances.loosened(new, old) == []


def test_floors_in_the_file_are_what_is_measured_here():
    """A floor written by hand, or by another formula, would not be near what this machine measures."""
    from reference.noise import small_floors

    measured, written = small_floors("float32"), tolerances.tolerances("small", "float32")
    for tap, (l2, row) in measured.items():
        assert l2 <= 2 * written[tap].l2_floor, tap
        assert row <= 3 * written[tap].row_floor, tap
        assert written[tap].l2_floor <= 3 * l2, tap


def test_a_dtype_in_which_the_reference_overflows_has_no_floor():
    theirs = hf_model(num_hidden_layers=1)
    with torch.no_grad():
        theirs.model.layers[0].mlp.down_proj.weight.mul_(1e6)
    with pytest.raises(QwenMLXError, match=r"own float16 has no noise floor at 0\.layers\.0\.down \(holds \d+ values"):
        measure_floors(theirs, [RUNS["prefill"]], "float16")
