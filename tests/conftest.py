"""The tiers of the tests, what a system cannot run, and fixtures that several test files share.

A test is marked by what its source reaches (tests/helpers/needs.py): `torch` where it compares with PyTorch,
transformers or mlx-lm, `emulator` where Metal kernels run in the emulator, `real` where it reads the real model,
`linux` where it needs Linux. `--fast` runs the tests with none of these marks; `--as-macos` selects on Linux the tests
that a Mac would run. What is not selected is counted as deselected.
"""

from __future__ import annotations

import atexit
import collections
import functools
import importlib
import importlib.abc
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

if "--fast" in sys.argv or "PYTEST_XDIST_WORKER" in os.environ:
    # Small products gain nothing by threads, which spin while they wait.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if "METAL_EMULATOR_CACHE" not in os.environ:  # all processes of a run share what the emulator compiles
    os.environ["METAL_EMULATOR_CACHE"] = tempfile.mkdtemp(prefix="metal-emulator-")
    atexit.register(shutil.rmtree, os.environ["METAL_EMULATOR_CACHE"], ignore_errors=True)

os.environ.setdefault("QWEN_MLX_KERNELS", "on")  # on a Mac the tests try the kernels, each load would try them too

from qwen_mlx.backend import mx
from tests.helpers import needs

pytest.register_assert_rewrite("tests.helpers.packed_models", "tests.helpers.blocks", "tests.helpers.nvrtc")
FAST = "not (slow or torch or emulator or real or nvrtc or heavy or browser)"
MARKS = {"slow", "torch", "emulator", "real", "nvrtc", "linux", "gpu", "heavy", "browser"}
TIERS = pytest.StashKey[collections.Counter[str]]()
COMPILATION = pytest.StashKey[subprocess.Popen[bytes]]()

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests compare float32 results of the CPU, on a machine with a GPU too; a test that means the GPU says so.
mx.set_default_device(mx.cpu)


class NoPeers(importlib.abc.MetaPathFinder):
    """Refuses the peers in the fast tier, whose tests must run where they are not installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname in ("torch", "transformers"):
            raise ModuleNotFoundError(f"{fullname} is not for tests of the fast tier", name=fullname)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Starts to compile the CPU's functions, while the workers collect: each would compile them for itself, and time
    its tests by it."""
    code = """
        from qwen_mlx.backend import mx
        from qwen_mlx.gguf.packing import DENSE, Packing
        from qwen_mlx.ops.cpu.rehearsal import rehearse
        packed = [(Packing(kind), mx.float32) for kind in ("q5_0", "q8_0", "q4_k", "q6_k")]
        rehearse([*packed, (DENSE, mx.float32), (DENSE, mx.float16)])
    """
    if importlib.util.find_spec("numba") is not None:
        command = [sys.executable, "-c", textwrap.dedent(code)]
        config.stash[COMPILATION] = subprocess.Popen(command, stderr=subprocess.DEVNULL)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node) -> None:
    """No test begins before all is compiled."""
    if COMPILATION in node.config.stash:
        node.config.stash[COMPILATION].wait()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests without PyTorch, emulator and real model")
    parser.addoption("--as-macos", action="store_true", help="behave as on macOS as far as Linux can")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIERS] = collections.Counter()
    config.option.loadscopereorder = False  # pytest-xdist would begin with the groups of most tests
    if config.getoption("fast"):
        config.option.markexpr = FAST
        sys.meta_path.insert(0, NoPeers())
    if config.getoption("as_macos"):
        sysconfig.get_config_vars()  # what reads files by the platform's name must have done so
        for name in (
            "huggingface_hub.hf_api",
            "numba",
            *(() if config.getoption("fast") else ("psutil", "torch", "transformers")),
        ):
            if importlib.util.find_spec(name.partition(".")[0]):
                importlib.import_module(name)
        sys.platform = "darwin"
        platform.system, platform.machine = lambda: "Darwin", lambda: "arm64"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file that imports PyTorch is not even imported in the fast tier."""
    if not config.getoption("fast") or not collection_path.name.startswith("test_"):
        return None
    if not needs.of_file(collection_path):
        return None
    config.stash[TIERS]["files that import torch"] += 1
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for need in sorted(needs.of_test(item.path, item.originalname)):
            item.add_marker(need)
        if {"real_gguf", "real_hf"} & set(item.fixturenames):
            item.add_marker("real")
        if "real_hf" in item.fixturenames:
            item.add_marker("torch")
    if config.getoption("loadgroup", False):  # a process of pytest-xdist, in which --dist is "no"
        sort_groups(items)
    unable = {"linux", "nvrtc"} if sys.platform != "linux" else set()
    unable |= set() if can_browse() else {"browser"}
    unable |= set() if mx.metal.is_available() or mx.cuda.is_available() else {"gpu"}
    if not config.getoption("fast") and (reason := emulator_unavailable()):
        unable.add("emulator")
        config.stash[TIERS][f"emulator tests not selected: {reason}"] += 1
    if unable:
        out = [item for item in items if unable & {mark.name for mark in item.iter_markers()}]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


@functools.cache
def group_of(file: str) -> str:
    """The tests that pytest-xdist runs in one process: a file's, or those of all files that need transformers' 2 GB."""
    text = (needs.ROOT / file).read_text(encoding="utf-8")
    return "real_hf" if re.search(r"[( ]real_hf[,):]", text) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """pytest-xdist 3.8 tells a group by an item's name, which pytest 9.2 lets nobody change."""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    return GroupScheduling(config, log)


def sort_groups(items: list[pytest.Item]) -> None:
    """Sorts what takes seconds before the rest: quick files at the end let no process wait long for another."""
    groups = {item: group_of(item.nodeid.partition("::")[0]) for item in items}
    takes_seconds = MARKS - {"linux", "gpu"}
    long = {groups[item] for item in items if takes_seconds & {mark.name for mark in item.iter_markers()}}
    items.sort(key=lambda item: (groups[item] != "real_hf", groups[item] not in long))


def emulator_unavailable() -> str | None:
    """Why the emulator cannot run here; None where it can, and in CI on Linux, where its tests must fail instead."""
    from reference.emulator import unavailable

    return None if os.environ.get("CI") and sys.platform == "linux" else unavailable()


def can_browse() -> bool:
    """True where a Chromium is installed that playwright can drive."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return importlib.util.find_spec("playwright") is not None and any(map(shutil.which, names))


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        names = {mark.name for mark in item.iter_markers()} & MARKS
        item.config.stash[TIERS][f"deselected: {', '.join(sorted(names)) or 'by name'}"] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist tells the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tiers"] = dict(session.config.stash[TIERS])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Every process selects the same tests, so the last one's counts are those of all."""
    if tiers := getattr(node, "workeroutput", {}).get("tiers"):
        node.config.stash[TIERS] = collections.Counter(tiers)


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct Q4_K_M, the default model, fetched as a user's machine fetches it."""
    from qwen_mlx.loading import hub

    return hub.resolve()


@pytest.fixture(scope="session")
def real_hf(real_gguf: Path):
    """The same file through transformers' own GGUF reader, in float32: 2 GB, loaded once for all tests."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(real_gguf.parent, gguf_file=real_gguf.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def fast_tier_imports_no_peer(request: pytest.FixtureRequest) -> Iterator[None]:
    """The fast tier ends as it began: without PyTorch and transformers in the process."""
    yield
    if request.config.getoption("fast"):
        assert not {"torch", "transformers"} & sys.modules.keys()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Says plainly how many tests ran, how many were skipped, and which were not selected."""
    ran = sum(len(terminalreporter.stats.get(kind, ())) for kind in ("passed", "failed", "error"))
    for what, count in sorted(config.stash[TIERS].items()):
        terminalreporter.write_line(f"{count:6} {what}")
    terminalreporter.write_line(f"{ran} tests ran, {len(terminalreporter.stats.get('skipped', ()))} skipped")
