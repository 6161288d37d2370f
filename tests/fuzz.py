"""`python -m tests.fuzz`: hostile input by the thousand, watched for signals, hangs, memory, tracebacks, leftovers.

Each kind of case runs in a process of its own, which tells the number of the case that it begins. Exits with 1 if
there is a finding; each names the kind, the seed and the case.
"""

from __future__ import annotations

import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from tests.helpers.fuzz_cases import KINDS, World, arguments

SECONDS = 20
MEMORY = 1 << 30  # bytes over what the process had before its first case
UNIT = 1 if sys.platform == "darwin" else 1024
ALLOWED = {"model", "m.gguf", "cache", "others"}


def work(kind: str, seed: int, first: int, cases: int) -> None:
    """Runs cases and writes a line as each begins, and one for each finding."""
    from qwen_mlx.errors import QwenMLXError

    lines = sys.stdout
    sys.stdout = sys.stderr
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name))
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT
        for case in range(first, cases):
            print(case, file=lines, flush=True)
            try:
                KINDS[kind](world, random.Random(f"{kind} {seed} {case}"))
            except QwenMLXError as error:
                if "\n" in str(error).strip() or len(str(error)) > 3000:
                    print(f"{case} an error of more than a sentence", file=lines, flush=True)
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno} {str(error)[:100]!r}"
                print(f"{case} {text}", file=lines, flush=True)
            if world.case.exists():
                shutil.rmtree(world.case) if world.case.is_dir() else world.case.unlink()
            if left := {path.name for path in world.folder.iterdir()} - ALLOWED:
                print(f"{case} left {', '.join(left)!r}", file=lines, flush=True)
                for entry in left:
                    path = world.folder / entry
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT - base
            if grown > MEMORY:
                print(f"{case} took {grown >> 20} MB", file=lines, flush=True)
                base += grown


def alone(cache: str) -> dict[str, str]:
    """The environment of a process that fetches nothing, whatever a case names."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "QWEN_MLX_CACHE": cache}


def watch(kind: str, seed: int, first: int, cases: int) -> list[str]:
    """Runs all cases of a kind, going on after one that ended or held its process. Prints and returns the findings."""
    findings: list[str] = []

    def add(finding: str) -> None:
        findings.append(f"{kind} {seed} {case}: {finding}")
        print(findings[-1], flush=True)

    while first < cases:
        command = [sys.executable, "-m", "tests.fuzz", "--work", kind, str(seed), str(first), str(cases)]
        with (
            tempfile.TemporaryDirectory() as cache,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, env=alone(cache)
            ) as process,
        ):
            assert process.stdout is not None
            case, rest, stopped = first - 1, b"", False
            while True:
                limit = SECONDS if case >= first else 10 * SECONDS  # its start, too
                if not select.select([process.stdout], [], [], limit)[0]:
                    process.kill()
                    stopped = True
                    add(f"more than {SECONDS} s")
                    break
                data = process.stdout.read(1 << 16)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    number, _, finding = line.decode().partition(" ")
                    case = int(number)
                    if finding:
                        add(finding)
        if process.returncode and not stopped:  # a signal, or the system's own SIGKILL where memory ran out
            add(f"ended with {process.returncode}")
        elif not process.returncode:
            return findings
        first = case + 1
    return findings


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], *map(int, sys.argv[3:6]))
        return 0
    given = arguments().parse_args()
    found = 0
    for kind in given.kind or KINDS:
        findings = watch(kind, given.seed, given.first, given.cases)
        print(f"{kind}: {given.cases - given.first} cases, {len(findings)} findings", flush=True)
        found += len(findings)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
