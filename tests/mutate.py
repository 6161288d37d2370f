"""`python -m tests.mutate`: makes small wrong changes one at a time and tells which of them no test sees.

It works on a copy of the tree, so that an interrupted run leaves the tree as it was, and notes each result, so that the
next run goes on after it. `--trace` comes first: it runs the tests once, under coverage, and notes which of them pass,
how long each takes and which lines it touches. A mutant of a Python line then meets the tests that touch the line,
those of its own room first, the quick ones first, up to --seconds; a mutant of a kernel meets KERNEL_TESTS. Mutants
that change no result stand in tests/equivalent_mutants.toml, with the reason. Exits with 1 if one survived.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from tests.helpers.mutants import Mutant, of_kernel, of_python, statement_lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
ROOMS = ("model", "ops", "metal", "generation", "loading", "gguf", "conversion", "text")
SOURCES = [*(f"qwen_mlx/{room}" for room in ROOMS), "reference"]
OF = {".py": of_python, ".metal": of_kernel, ".h": of_kernel}
KERNEL_TESTS = ["-m", "emulator", "tests/ops/test_selftest_decoding.py", "tests/ops", "tests/model/test_fused.py"]
EQUIVALENT = "tests/equivalent_mutants.toml"


class Place(NamedTuple):
    """A mutant of a file, whose text is `text`."""

    file: str
    text: str
    mutant: Mutant

    @property
    def line(self) -> int:
        """The line that changes, from 1."""
        return self.text.count("\n", 0, self.mutant.start) + 1

    def described(self) -> dict[str, str]:
        """The file, and its line before and after."""
        lines = (text.splitlines()[self.line - 1].strip() for text in (self.text, self.mutant.apply(self.text)))
        return {"file": self.file, **dict(zip(("before", "after"), lines))}

    @property
    def key(self) -> str:
        """What a result belongs to: another text of the file is another mutant."""
        return sha256(repr(self).encode()).hexdigest()[:16]


class Copy:
    """A copy of a tree, without what git ignores, in which one file at a time is changed."""

    def __init__(self, root: Path, work: Path) -> None:
        self.folder, self.work = work / "tree", work
        shutil.rmtree(self.folder, ignore_errors=True)
        command = ["git", "ls-files", "-coz", "--exclude-standard"]
        for name in subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode().split("\0"):
            if (root / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / name, self.folder / name)

    def pytest(self, arguments: Sequence[str], numba: str = "numba", timeout: float | None = None) -> tuple[int, str]:
        """pytest's exit code and output; 1 where it took longer than `timeout` seconds. numba: the folder of its
        compiled functions, which do not notice that a function which they call has changed."""
        (self.work / "arguments").write_text("\n".join(arguments), encoding="utf-8")
        environment = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(self.folder), "COLUMNS": "200"}
        environment["NUMBA_CACHE_DIR"] = str(self.work / numba)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{self.work / 'arguments'}"]
        with open(self.work / "output", "w+", encoding="utf-8", errors="replace") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = 1
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            output.seek(0)
            return code, output.read()


def trace(copy: Copy, arguments: Sequence[str]) -> None:
    """Runs the tests once and notes the times of those that pass, and the lines that each touches."""
    coverage = ["--cov=qwen_mlx", "--cov=reference", "--cov-context=test", "--cov-report="]
    code, output = copy.pytest([*coverage, f"--junitxml={copy.work / 'times.xml'}", *arguments])
    print(output[-2000:])
    if code > 1:
        raise SystemExit(f"pytest ended with {code}; nothing was noted.")
    times = {}
    for case in ElementTree.parse(copy.work / "times.xml").iter("testcase"):
        if not len(case):  # a test that failed or was skipped has an element that says so
            file, name = case.attrib["classname"].replace(".", "/"), case.attrib["name"]
            times[f"{file}.py::{name}"] = float(case.attrib["time"])
    shutil.move(copy.folder / ".coverage", copy.work / "coverage")
    (copy.work / "times.json").write_text(json.dumps(times), encoding="utf-8")


class Tests:
    """The tests that a trace has noted and that still exist."""

    def __init__(self, copy: Copy) -> None:
        from coverage import CoverageData

        self._data = CoverageData(str(copy.work / "coverage"))
        self._data.read()
        self._measured = {Path(name).relative_to(copy.folder).as_posix(): name for name in self._data.measured_files()}
        code, output = copy.pytest(["--collect-only", "-m", "slow or not slow"])
        if code:
            raise SystemExit(f"The tests of the unchanged tree cannot be collected:\n{output[-2000:]}")
        listed = set(output.splitlines())
        times = json.loads((copy.work / "times.json").read_text(encoding="utf-8"))
        self.times = {test: seconds for test, seconds in times.items() if test in listed}

    def of(self, place: Place, seconds: float) -> list[str]:
        """Those that touch the mutant's line, up to `seconds` of them in all."""
        if not place.file.endswith(".py"):
            return KERNEL_TESTS
        lines = self._data.contexts_by_lineno(self._measured.get(place.file, ""))
        contexts = {test for line in statement_lines(place.text, place.line) for test in lines.get(line, ())}
        if contexts == {""}:  # a line that importing the file runs
            contexts = set().union(*lines.values())
        room = f"tests/{Path(place.file).parts[1 if place.file.startswith('qwen_mlx') else 0]}/"
        tests = {context.rpartition("|")[0] for context in contexts} & self.times.keys()
        chosen, left = [], seconds
        for test in sorted(tests, key=lambda test: (not test.startswith(room), self.times[test])):
            left -= self.times[test]
            if chosen and left < 0:
                break
            chosen.append(test)
        return chosen


def meet(copy: Copy, place: Place, tests: list[str], seconds: float) -> dict[str, Any]:
    """The result of a mutant: killed (by the test that failed, or a hang, or a crash), survived, or untested."""
    result: dict[str, Any] = {"key": place.key, **place.described(), "line": place.line, "tests": len(tests)}
    if not tests:
        return result | {"outcome": "untested"}
    target, own_numba = copy.folder / place.file, place.file.startswith("qwen_mlx/ops/cpu/")
    target.write_text(place.mutant.apply(place.text), encoding="utf-8")
    try:
        code, output = copy.pytest(["-x", *tests], "numba_once" if own_numba else "numba", 10 * seconds + 120)
    finally:
        target.write_text(place.text, encoding="utf-8")
        shutil.rmtree(copy.work / "numba_once", ignore_errors=True)
    by = next((line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))), f"exit code {code}")
    return result | ({"outcome": "survived"} if code == 0 else {"outcome": "killed", "by": by})


def draw(root: Path, sources: Sequence[str], count: int, seed: int) -> list[Place]:
    """`count` mutants: each of a source folder or file by lot, and then one of its mutants by lot."""
    places: dict[str, list[Place]] = {}
    for source in sources:
        files = [root / source] if (root / source).is_file() else sorted((root / source).rglob("*"))
        for path in files:
            if path.suffix in OF:
                text, name = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
                places.setdefault(source, []).extend(Place(name, text, mutant) for mutant in OF[path.suffix](text))
    lots, drawn = random.Random(seed), []
    while places and len(drawn) < count:
        source = lots.choice(sorted(places))
        drawn.append(places[source].pop(lots.randrange(len(places[source]))))
        places = {source: left for source, left in places.items() if left}
    return drawn


def report(results: Sequence[dict[str, Any]]) -> None:
    """Prints what was killed of each file, and every other mutant."""
    for file in sorted({result["file"] for result in results}):
        outcomes = Counter(result["outcome"] for result in results if result["file"] == file)
        print(f"{file:48} " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    for result in results:
        if result["outcome"] != "killed":
            print(f"\n{result['outcome']} {result['tests']} tests: {result['file']}:{result['line']}")
            print(f"  - {result['before']}\n  + {result['after']}\n  {result.get('reason', '')}".rstrip())
    print("\n", dict(Counter(result["outcome"] for result in results)))


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description="Find wrong lines that no test sees.")
    parser.add_argument("sources", nargs="*", help=f"folders or files to change (default: {' '.join(SOURCES)})")
    parser.add_argument("--trace", nargs=argparse.REMAINDER, help="run the tests once; pytest's arguments may follow")
    parser.add_argument("--count", type=int, default=100, help="mutants to draw (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    parser.add_argument("--seconds", type=float, default=60, help="tests for a mutant (default: 60)")
    parser.add_argument("--again", action="store_true", help="run again what survived, after tests were added")
    parser.add_argument("--work", type=Path, default=root / ".mutants", help="where copy, trace and results are kept")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    copy, notes = Copy(root, options.work.resolve()), options.work / "results.jsonl"
    if options.trace is not None:
        trace(copy, options.trace)
        return 0
    if not (options.work / "times.json").exists():
        raise SystemExit("No trace yet; run python -m tests.mutate --trace first.")
    tests, file = Tests(copy), root / EQUIVALENT
    equivalent = tomllib.loads(file.read_text(encoding="utf-8"))["mutant"] if file.exists() else []
    reasons = {(m["file"], m["before"], m["after"]): m["reason"] for m in equivalent}
    noted = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
    done = {result["key"]: result for result in map(json.loads, noted)}
    results = []
    for place in draw(root, options.sources or SOURCES, options.count, options.seed):
        if reason := reasons.get(tuple(place.described().values())):
            result = {**place.described(), "line": place.line, "tests": 0, "outcome": "equivalent", "reason": reason}
        elif place.key in done and (done[place.key]["outcome"] == "killed" or not options.again):
            result = done[place.key]
        else:
            result = meet(copy, place, tests.of(place, options.seconds), options.seconds)
            with open(notes, "a", encoding="utf-8") as output:
                print(json.dumps(result), file=output)
            print(f"{result['outcome']:9} {place.file}:{place.line}  {result['after'][:90]}", flush=True)
        results.append(result)
    report(results)
    return int(any(result["outcome"] in ("survived", "untested") for result in results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that pytest ends too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
