"""One call of a kernel: arrays into the emulator's memory, the threads, arrays out."""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_mlx.backend import mx

from . import build, errors
from .report import Data, Launch, Words
from .source import Buffer, Source

_LOCK = threading.Lock()  # the runtime's memory is one
_ORDERS = {"forward": 0, "reverse": 1, "random": 2}
_MAX_BUFFERS = 31


@dataclass(frozen=True)
class Options:
    """The way kernels run.

    checked: every access is classified, at a quarter of the speed or more; order: of the threads between two barriers,
    forward, reverse or random; seed: of random; contract: a * b + c may become fma, as Metal's compiler may decide;
    steps: basic blocks a thread may execute before it is called a runaway; unset_locals: run each kernel again with
    another value in local variables that nothing has set, not only where g++ warns of one; flush: subnormal numbers of
    float and bfloat are zero, as on Apple's GPUs, those of half are kept; max_threads: what a threadgroup may have, 384
    for a kernel that takes the most registers.
    """

    checked: bool = True
    order: str = "random"
    seed: int = 0
    contract: bool = False
    steps: int = 50_000_000
    unset_locals: bool = False
    flush: bool = False
    max_threads: int = 1024

    def __post_init__(self) -> None:
        if self.order not in _ORDERS:
            raise ValueError(f"order is {self.order!r}, expected one of {', '.join(_ORDERS)}.")


def run(
    name: str,
    source: Source,
    instance: str,
    inputs: Sequence[mx.array],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
    init_value: float | None,
    contiguous: bool,
    options: Options,
) -> list[mx.array]:
    """The outputs of one launch. Raises an EmulatorError for whatever is wrong with it."""
    _check_launch(name, source, grid, threadgroup, options.max_threads)
    _check_memory(name, output_shapes, output_dtypes, options.checked)
    try:
        mx.eval(*inputs)
    except (RuntimeError, ValueError) as error:
        raise errors.Unavailable("The emulator needs values: it cannot run within mx.compile or mx.vmap.") from error
    inputs = [mx.contiguous(x) if contiguous and not _row_contiguous(x) else x for x in inputs]
    launch = _Call(name, source, inputs, grid, threadgroup, output_shapes, output_dtypes, init_value, options)
    kernel = build.kernel(source, instance, options.checked, options.contract)
    outputs = launch.run(kernel)
    if (kernel.suspect or options.unset_locals) and options.checked:
        # The result shows if the variable is read: with another value in it, the result is another.
        optimised = not options.unset_locals

        def with_locals(fill: str) -> list[np.ndarray]:
            return launch.run(build.kernel(source, instance, options.checked, options.contract, fill, optimised))

        filled = outputs if optimised else with_locals("pattern")
        if any(a.tobytes() != b.tobytes() for a, b in zip(filled, with_locals("zero"))):
            what = kernel.suspect or "a local variable is read that nothing has set"
            raise errors.UninitialisedRead(f"kernel {name}, {what}, and the result depends on it.")
    return [_to_mlx(raw, tuple(shape), dtype) for raw, shape, dtype in zip(outputs, output_shapes, output_dtypes)]


@dataclass(frozen=True)
class _Call:
    """A launch, to be run on one or another compiled form of the kernel."""

    name: str
    source: Source
    inputs: Sequence[mx.array]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: Sequence[tuple[int, ...]]
    output_dtypes: Sequence[mx.Dtype]
    init_value: float | None
    options: Options

    def run(self, kernel: build.Kernel) -> list[np.ndarray]:
        """The outputs' bytes."""
        arrays = [_values(x) for x in self.inputs]
        outputs = [
            _output(shape, dtype, self.init_value) for shape, dtype in zip(self.output_shapes, self.output_dtypes)
        ]
        data = [_content(buffer, self.inputs, arrays, outputs) for buffer in self.source.buffers]
        with _LOCK:
            try:
                return self._run(kernel, data)
            finally:
                for slot in range(len(data)):
                    build.runtime().emulator_release(slot)

    def _run(self, kernel: build.Kernel, data: Sequence[Data]) -> list[np.ndarray]:
        runtime = build.runtime()
        buffers = self.source.buffers
        pointers = (ctypes.c_void_p * 64)()
        for slot, (buffer, content) in enumerate(zip(buffers, data)):
            place = runtime.emulator_place(
                slot,
                content.raw.nbytes,
                content.skew,
                content.item,
                buffer.kind == "output" and self.options.checked,
                self.init_value is not None,
            )
            if place is None:
                raise errors.Unavailable(
                    f"kernel {self.name}: no memory for {buffer.name}, {content.raw.nbytes} bytes."
                )
            ctypes.memmove(place, content.raw.ctypes.data, content.raw.nbytes)
            pointers[slot] = place + content.origin
        entry = ctypes.cast(kernel.library.emulator_entry, ctypes.c_void_p)
        call = Launch(
            entry,
            ctypes.addressof(pointers),
            (ctypes.c_uint32 * 3)(*self.grid),
            (ctypes.c_uint32 * 3)(*(min(t, g) for t, g in zip(self.threadgroup, self.grid))),
            _ORDERS[self.options.order],
            self.options.flush,
            self.options.seed,
            self.options.steps,
        )
        groups = math.prod(-(-g // t) for g, t in zip(call.grid, call.threadgroup))
        while call.next < groups and not call.report.kind:
            runtime.emulator_launch(ctypes.byref(call))
        if call.report.kind:
            raise Words(self.name, self.source, data, kernel, entry.value, call).error()
        results = []
        for slot, (buffer, content) in enumerate(zip(buffers, data)):
            if buffer.kind == "output":
                if self.options.checked and self.init_value is None:
                    _check_written(runtime, self.name, slot, buffer, content)
                ctypes.memmove(content.raw.ctypes.data, pointers[slot], content.raw.nbytes)
                results.append(content.raw)
        return results


def _check_launch(
    name: str, source: Source, grid: tuple[int, int, int], threadgroup: tuple[int, int, int], most: int
) -> None:
    for what, size in (("grid", grid), ("threadgroup", threadgroup)):
        if not isinstance(size, list | tuple) or len(size) != 3 or any(not isinstance(n, int) or n < 1 for n in size):
            raise errors.InvalidLaunch(f"kernel {name}: {what} is {size}, expected three positive integers.")
    threads = math.prod(min(t, g) for t, g in zip(threadgroup, grid))
    if (size := math.prod(threadgroup)) > most:
        raise errors.InvalidLaunch(
            f"kernel {name}: threadgroup {threadgroup} has {size} threads, Metal allows at most {most}."
        )
    if math.prod(-(-g // t) for t, g in zip(threadgroup, grid)) * threads >= 2**32:
        raise errors.InvalidLaunch(f"kernel {name}: grid {grid} has 2^32 threads or more.")
    if len(source.buffers) > _MAX_BUFFERS:
        raise errors.InvalidLaunch(f"kernel {name} has {len(source.buffers)} buffers, Metal allows {_MAX_BUFFERS}.")


def _check_memory(name: str, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[mx.Dtype], checked: bool) -> None:
    # Each output twice, here and in the runtime, and a record of its accesses for each element.
    needed = sum(math.prod(shape) * (2 * dtype.size + build.RECORD * checked) for shape, dtype in zip(shapes, dtypes))
    if needed > (available := build.runtime().emulator_available()):
        raise errors.Unavailable(
            f"kernel {name}: outputs {', '.join(str(shape) for shape in shapes)} need {needed:,} bytes of "
            f"memory under the emulator's checks, {available:,} are free: take a smaller case."
        )


def _check_written(runtime: ctypes.CDLL, name: str, slot: int, buffer: Buffer, content: Data) -> None:
    missing = ctypes.c_int64()
    first = runtime.emulator_unwritten(slot, ctypes.byref(missing))
    if first >= 0:
        size = content.raw.nbytes // content.item
        raise errors.UnwrittenOutput(
            f"kernel {name}: no thread wrote {buffer.name}[{first // content.item}] ({missing.value} of {size} "
            f"elements are unwritten, shape {content.shape}); write them all or give init_value."
        )


def _strides(x: mx.array) -> tuple[int, ...]:
    return memoryview(x).strides if x.ndim else ()


def _row_contiguous(x: mx.array) -> bool:
    expected = x.itemsize
    for size, stride in zip(reversed(x.shape), reversed(_strides(x))):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _values(x: mx.array) -> np.ndarray:
    """A view of the array's own memory, of integers where numpy has no such dtype."""
    return np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


@functools.cache
def _allocator_skew() -> int:
    return np.asarray(mx.zeros((1,))).ctypes.data % 16


def _content(buffer: Buffer, inputs: Sequence[mx.array], arrays: Sequence[np.ndarray], outputs: Sequence[Data]) -> Data:
    if buffer.kind == "output":
        return outputs[buffer.source]
    array, x = arrays[buffer.source], inputs[buffer.source]
    if buffer.kind == "shape":
        return Data(np.array(x.shape, np.int32), 4, shape=(x.ndim,))
    if buffer.kind == "strides":
        strides = [stride // x.itemsize for stride in _strides(x)]
        return Data(np.array(strides, np.int64), 8, shape=(x.ndim,))
    if buffer.kind == "ndim":
        return Data(np.array([x.ndim], np.int32), 4)
    # From the lowest to the highest byte that the array's own strides reach.
    reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides)] if array.size else []
    low = sum(r for r in reach if r < 0)
    length = sum(abs(r) for r in reach) + x.itemsize if array.size else 0
    address = array.ctypes.data + low
    raw = (
        np.frombuffer(memoryview((ctypes.c_char * length).from_address(address)), np.uint8)
        if length
        else np.zeros(0, np.uint8)
    )
    skew = (address - _allocator_skew()) % 16 // x.itemsize * x.itemsize
    return Data(raw, x.itemsize, skew, -low, x.shape)


def _output(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> Data:
    shape = tuple(shape)
    if init_value is None:
        raw = np.full(math.prod(shape) * dtype.size, 0xFF, np.uint8)
    else:
        filled = mx.broadcast_to(mx.array(init_value).astype(dtype), shape)  # mx.full may keep its own dtype
        raw = np.frombuffer(bytes(memoryview(mx.contiguous(filled.reshape(-1).view(mx.uint8)))), np.uint8).copy()
    return Data(raw, dtype.size, shape=shape)


def _to_mlx(raw: np.ndarray, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    if dtype == mx.bool_:
        return mx.array(raw.astype(bool)).reshape(shape)
    if not raw.size:
        return mx.zeros(shape, dtype)
    return mx.array(raw).view(dtype).reshape(shape)
