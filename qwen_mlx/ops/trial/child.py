"""The process in which a trial's kernels run: a hang, an abort or a fault of the GPU ends it alone.

It reads a request as JSON from standard input and prints a line before and after each case, which begins with the
request's token, so that nothing that others print is taken for a result.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...backend import mx
from .. import dispatch, tunings
from ..matrix import Matrix
from .cases import Case, Data, Product, Spec, cases, fault, rows_tried

MOST_KERNELS = 20  # that a trial compiles: another cut of the largest product only where they are fewer
LAUNCHES = {"best_token": 2, "attention on a long cache": 2}  # kernels of a case, where they are several
Say = Callable[..., None]


def main() -> None:
    """Answers the request on standard input."""
    request = json.loads(sys.stdin.read())

    def say(**line: Any) -> None:
        print(f"{request['token']}{json.dumps(line)}", flush=True)

    if hasattr(signal, "alarm"):  # should whoever asked be gone
        signal.alarm(int(request["seconds"]) + 5)
    run(Spec.from_json(request["spec"]), frozenset(request["skip"]), say)


def run(spec: Spec, skip: frozenset[str], say: Say) -> None:
    """Tries the cases whose names are not in `skip`, which is shared with cases' parts."""
    wanted = [case for case in cases(spec) if not {case.name, case.part} & skip]
    if dispatch.executor() == "metal" and not {"cuts", "matvec"} & skip:
        say(start="cuts", part="matvec")
        say(done="cuts", choices=choose_cuts(spec, wanted))
    for case in wanted:
        say(start=case.name, part=case.part)
        say(done=case.name, **attempt(case, spec))
    say(end=True)


def attempt(case: Case, spec: Spec) -> dict[str, Any]:
    """The case's fault, or the seconds that its kernel takes and that plain MLX takes."""
    try:
        wrong = fault(case, spec)
        if wrong is not None:
            return {"fault": wrong}
        inputs = case.make(Data(spec, False, 17))
        # The second time is the better one of a machine that was asleep.
        pairs = [(seconds(case.kernel, inputs), seconds(case.plain, inputs, traced=False)) for _ in range(2)]
        return {
            "fault": None,
            "count": case.count,
            "kernel": min(p[0] for p in pairs),
            "plain": min(p[1] for p in pairs),
        }
    except (RuntimeError, ValueError) as error:  # MLX's, of a compiler or a launch
        return {"fault": first_line(str(error))}


def first_line(text: str) -> str:
    """A compiler's first error, or the first line of another message."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines or ["no message"])[0][:200]


def seconds(call: Callable[..., Sequence[mx.array]], inputs: Sequence[Any], traced: bool = True) -> float:
    """The time of a call among several that are queued together, without gradients.

    traced: as a graph that is built once, as a decoding step is; what stands in for a kernel is built at each call.
    """

    def each() -> list[mx.array]:
        return list(call(*inputs))

    run = dispatch.compiled(each) if traced else each
    size = sum(array.nbytes for x in inputs for array in _arrays(x))
    repeats = max(2, min(16, (256 << 20) // max(size, 1)))
    best = float("inf")
    with dispatch.no_grad():
        mx.eval(run())
        for _ in range(3):
            start = time.perf_counter()
            mx.eval([run() for _ in range(repeats)])
            best = min(best, time.perf_counter() - start)
    return best / repeats


def _arrays(x: Any) -> list[mx.array]:
    if isinstance(x, mx.array):
        return [x]
    if isinstance(x, Matrix):
        return list(x.arrays)
    return [array for item in x for array in _arrays(item)] if isinstance(x, tuple | list) else []


def choose_cuts(spec: Spec, wanted: Sequence[Case]) -> dict[str, tunings.Choice]:
    """The fastest cut of each product: rows and threads by the largest one, which alone is compiled in two ways; the
    number of threadgroups by each product that norms its vector."""
    products = [case for case in wanted if case.product is not None]
    if not products:
        return {}
    largest = max(products, key=lambda case: _elements(_of(case)))
    spare = MOST_KERNELS - sum(LAUNCHES.get(case.name.partition(",")[0], 1) for case in wanted)
    names = list(tunings.CANDIDATES)[: 1 + max(0, spare)]
    inputs = largest.make(Data(spec, False, 5))
    times = {name: _timed(largest, inputs, (name, tunings.DEFAULT[1])) for name in names}
    cut = min(times, key=lambda name: times[name])
    choices: dict[str, tunings.Choice] = {}
    for case in products:
        groups = tunings.DEFAULT[1]
        if _of(case).name != "matvec" and times[cut] < float("inf"):
            inputs = case.make(Data(spec, False, 5))
            groups = min(tunings.GROUPS, key=lambda n: _timed(case, inputs, (cut, n)))
        _choose(_of(case), (cut, groups))
        choices[_key(_of(case))] = cut, groups
    return choices


def _of(case: Case) -> Product:
    assert case.product is not None
    return case.product


def _elements(product: Product) -> int:
    return sum(m.rows * m.columns for m in product.matrices)


def _key(product: Product, tried: bool = False) -> str:
    rows = [rows_tried(m) if tried else m.rows for m in product.matrices]
    return tunings.key(product.kernel, [Matrix(m.packing, n, m.columns, ()) for m, n in zip(product.matrices, rows)])


def _choose(product: Product, choice: tunings.Choice) -> None:
    """Takes a choice for a product, which may have fewer rows here than in the model."""
    tunings.choose({_key(product): choice, _key(product, tried=True): choice})


def _timed(case: Case, inputs: Sequence[Any], choice: tunings.Choice) -> float:
    """Seconds with a choice; infinite where it cannot run."""
    _choose(_of(case), choice)
    try:
        return seconds(case.kernel, inputs)
    except (RuntimeError, ValueError):
        return float("inf")
