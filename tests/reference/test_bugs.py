"""The harness is tested by breaking the model: each bug is seen at its tap, and named where it has a signature."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from qwen_mlx import load
from reference import tolerances, torch_side
from reference.comparison import compare
from reference.diagnose import diagnose
from reference.noise import SMALL_SHAPES, small_runs
from reference.small_models import hf_model, save_folder
from tests.helpers.bugs_of_blocks import BUGS, Bug
from tests.helpers.cases import each

RUNS = {run.name: run for run in small_runs()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory):
    """(folder, trace of the reference) by shape and run, each made once."""

    @cache
    def model_of(shape: str):
        theirs = hf_model(**SMALL_SHAPES[shape])
        return theirs, save_folder(tmp_path_factory.mktemp("models") / "m", theirs)

    @cache
    def made(shape: str, run: str):
        theirs, folder = model_of(shape)
        return folder, torch_side.record(theirs, RUNS[run])

    return made


@each("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_seen_at_its_tap_and_named(bug: Bug, prepared, monkeypatch: pytest.MonkeyPatch):
    folder, theirs = prepared(bug.shape, bug.run)
    run, limits = RUNS[bug.run], tolerances.tolerances("small", bug.dtype)
    model, _ = load(Path(folder), dtype=bug.dtype)
    assert compare(model, run, theirs, limits, bug.dtype).passed
    bug.put(model, monkeypatch)
    broken = compare(model, run, theirs, limits, bug.dtype)
    assert broken.first is not None
    assert broken.first.key == bug.first
    assert broken.first.measure.problem or broken.first.ratio > 10
    cause = diagnose(model, run, theirs, bug.first, bug.dtype)
    if bug.cause is None:
        assert cause is None, "it has a signature: say so"
    else:
        assert cause is not None
        assert bug.cause in cause


def test_bugs_are_many_and_distinct():
    assert len(BUGS) >= 15
    assert len({bug.name for bug in BUGS}) == len(BUGS)
