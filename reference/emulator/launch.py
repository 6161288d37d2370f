"""One call of a kernel: arrays into the emulator's memory, the threads, arrays out; the runtime's findings in words."""

from __future__ import annotations

import ctypes
import enum
import functools
import math
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import build, errors
from .source import Buffer, Source

_LOCK = threading.Lock()  # the runtime's memory is one
_ORDERS = {"forward": 0, "reverse": 1, "random": 2}
_MAX_BUFFERS = 31
_FIRST_THREADGROUP_SLOT = 40  # runtime.cpp's kFirstThreadgroupSlot


class _Kind(enum.IntEnum):
    """runtime.cpp's Kind."""

    OUT_OF_BOUNDS = 1
    RACE = 2
    UNINITIALISED = 3
    READ_ONLY = 4
    DIVERGENCE = 5
    MEMORY_LIMIT = 6
    UNDEFINED = 7
    RUNAWAY = 8
    WILD = 9
    FAULT = 10
    INACTIVE_LANE = 11


_RETURNED = 3  # runtime.cpp's kDone
_STATES = {1: "waits at a barrier", 2: "waits at a simd operation", _RETURNED: "has returned"}


@dataclass(frozen=True)
class Options:
    """How kernels run.

    checked: every access is classified, at a quarter of the speed or more; order: of the threads between two barriers,
    forward, reverse or random; seed: of random; contract: a * b + c may become fma, as Metal's compiler may decide;
    steps: basic blocks a thread may execute before it is called a runaway.
    """

    checked: bool = True
    order: str = "random"
    seed: int = 0
    contract: bool = False
    steps: int = 50_000_000

    def __post_init__(self) -> None:
        if self.order not in _ORDERS:
            raise ValueError(f"order is {self.order!r}, expected one of {', '.join(_ORDERS)}.")


class _Report(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "slot", "write", "other_write", "line", "other_line")),
        *((name, ctypes.c_int64) for name in ("offset", "size")),
        *((name, ctypes.c_uint64) for name in ("pc", "other_pc", "who", "other")),
        *((name, ctypes.c_char_p) for name in ("file", "other_file", "text")),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("steps", ctypes.c_uint64),
        ("report", _Report),
    )


@dataclass(frozen=True)
class _Data:
    """What lies in a buffer: bytes, where they start within 16, bytes of an element, and the address of element 0."""

    raw: np.ndarray
    item: int
    skew: int = 0
    origin: int = 0
    shape: tuple[int, ...] = ()


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
    _check_launch(name, source, grid, threadgroup)
    try:
        mx.eval(*inputs)
    except (RuntimeError, ValueError) as error:
        raise errors.Unavailable("The emulator needs values: it cannot run within mx.compile or mx.vmap.") from error
    inputs = [mx.contiguous(x) if contiguous and not _row_contiguous(x) else x for x in inputs]
    launch = _Call(name, source, inputs, grid, threadgroup, output_shapes, output_dtypes, init_value, options)
    kernel = build.kernel(source, instance, options.checked, options.contract)
    outputs = launch.run(kernel)
    if kernel.suspect and options.checked:
        # Whether the variable is read shows in the result: it is the same with another value in it, or it is not.
        zeroed = launch.run(build.kernel(source, instance, options.checked, options.contract, "zero"))
        if any(a.tobytes() != b.tobytes() for a, b in zip(outputs, zeroed)):
            raise errors.UninitialisedRead(f"kernel {name}, {kernel.suspect}, and the result depends on it.")
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

    def _run(self, kernel: build.Kernel, data: Sequence[_Data]) -> list[np.ndarray]:
        runtime = build.runtime()
        buffers = self.source.buffers
        pointers = (ctypes.c_void_p * 64)()
        for slot, (buffer, content) in enumerate(zip(buffers, data)):
            place = runtime.emulator_place(
                slot,
                content.raw.nbytes,
                content.skew,
                content.item,
                buffer.kind == "output",
                self.init_value is not None,
            )
            if place is None:
                raise errors.Unavailable(
                    f"kernel {self.name}: no memory for {buffer.name}, {content.raw.nbytes} bytes."
                )
            ctypes.memmove(place, content.raw.ctypes.data, content.raw.nbytes)
            pointers[slot] = place + content.origin
        entry = ctypes.cast(kernel.library.emulator_entry, ctypes.c_void_p)
        call = _Launch(
            entry,
            ctypes.addressof(pointers),
            (ctypes.c_uint32 * 3)(*self.grid),
            (ctypes.c_uint32 * 3)(*(min(t, g) for t, g in zip(self.threadgroup, self.grid))),
            _ORDERS[self.options.order],
            self.options.seed,
            self.options.steps,
        )
        runtime.emulator_launch(ctypes.byref(call))
        if call.report.kind:
            raise _Words(self.name, self.source, data, kernel.path, entry.value, call).error()
        results = []
        for slot, (buffer, content) in enumerate(zip(buffers, data)):
            if buffer.kind == "output":
                if self.options.checked and self.init_value is None:
                    _check_written(runtime, self.name, slot, buffer, content)
                ctypes.memmove(content.raw.ctypes.data, pointers[slot], content.raw.nbytes)
                results.append(content.raw)
        return results


def _check_launch(name: str, source: Source, grid: tuple[int, int, int], threadgroup: tuple[int, int, int]) -> None:
    for what, size in (("grid", grid), ("threadgroup", threadgroup)):
        if len(size) != 3 or any(not isinstance(n, int) or n < 1 for n in size):
            raise errors.InvalidLaunch(f"kernel {name}: {what} is {size}, expected three positive integers.")
    threads = math.prod(min(t, g) for t, g in zip(threadgroup, grid))
    if math.prod(threadgroup) > 1024:
        raise errors.InvalidLaunch(
            f"kernel {name}: threadgroup {threadgroup} has {math.prod(threadgroup)} threads, Metal allows at most 1024."
        )
    if math.prod(-(-g // t) for t, g in zip(threadgroup, grid)) * threads >= 2**32:
        raise errors.InvalidLaunch(f"kernel {name}: grid {grid} has 2^32 threads or more.")
    if len(source.buffers) > _MAX_BUFFERS:
        raise errors.InvalidLaunch(f"kernel {name} has {len(source.buffers)} buffers, Metal allows {_MAX_BUFFERS}.")


def _check_written(runtime: ctypes.CDLL, name: str, slot: int, buffer: Buffer, content: _Data) -> None:
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


def _content(
    buffer: Buffer, inputs: Sequence[mx.array], arrays: Sequence[np.ndarray], outputs: Sequence[_Data]
) -> _Data:
    if buffer.kind == "output":
        return outputs[buffer.source]
    array, x = arrays[buffer.source], inputs[buffer.source]
    if buffer.kind == "shape":
        return _Data(np.array(x.shape, np.int32), 4, shape=(x.ndim,))
    if buffer.kind == "strides":
        strides = [stride // x.itemsize for stride in _strides(x)]
        return _Data(np.array(strides, np.int64), 8, shape=(x.ndim,))
    if buffer.kind == "ndim":
        return _Data(np.array([x.ndim], np.int32), 4)
    # From the lowest to the highest byte that the array's own strides reach.
    reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides)] if array.size else []
    low = sum(r for r in reach if r < 0)
    length = sum(abs(r) for r in reach) + x.itemsize if array.size else 0
    address = array.ctypes.data + low
    raw = np.frombuffer((ctypes.c_char * length).from_address(address), np.uint8) if length else np.zeros(0, np.uint8)
    skew = (address - _allocator_skew()) % 16 // x.itemsize * x.itemsize
    return _Data(raw, x.itemsize, skew, -low, x.shape)


def _output(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> _Data:
    shape = tuple(shape)
    if init_value is None:
        raw = np.full(math.prod(shape) * dtype.size, 0xFF, np.uint8)
    else:
        filled = mx.full(shape, init_value, dtype)
        raw = np.frombuffer(bytes(memoryview(mx.contiguous(filled.reshape(-1).view(mx.uint8)))), np.uint8).copy()
    return _Data(raw, dtype.size, shape=shape)


def _to_mlx(raw: np.ndarray, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    if dtype == mx.bool_:
        return mx.array(raw.astype(bool)).reshape(shape)
    if not raw.size:
        return mx.zeros(shape, dtype)
    return mx.array(raw).view(dtype).reshape(shape)


class _Words:
    """Puts the runtime's report into a sentence."""

    def __init__(self, name: str, source: Source, data: Sequence[_Data], path: Path, entry: int, call: _Launch):
        self.name, self.source, self.data, self.path, self.call = name, source, data, path, call
        self.report = call.report
        self.base = entry - _symbol_offset(path)

    def error(self) -> errors.EmulatorError:
        report = self.report
        kind = _Kind(report.kind)
        who = self.thread(report.who)
        if kind == _Kind.OUT_OF_BOUNDS:
            return errors.OutOfBounds(f"{self.where()}: {who} {self.access()}, {self.extent()}.")
        if kind == _Kind.RACE:
            how = "wrote" if report.other_write else "read"
            place = f" at {self.line(report.other_pc)}" if report.other_pc else ""
            memory = "threadgroup" if self.in_threadgroup_memory() else "device"
            return errors.DataRace(
                f"{self.where()}: {who} {self.access()}, which {self.thread(report.other)} {how}{place} with no "
                f"barrier for {memory} memory between."
            )
        if kind == _Kind.UNINITIALISED:
            return errors.UninitialisedRead(f"{self.where()}: {who} {self.access()}, which nothing has written.")
        if kind == _Kind.READ_ONLY:
            what = self.access() if report.slot >= 0 else "writes a constant"
            return errors.ReadOnly(f"{self.where()}: {who} {what}, which is read-only.")
        if kind == _Kind.DIVERGENCE:
            return self.divergence()
        if kind == _Kind.MEMORY_LIMIT:
            return errors.ThreadgroupMemory(
                f"{self.where()}: {report.size} bytes of threadgroup memory, Metal allows 32768."
            )
        if kind == _Kind.UNDEFINED:
            text = report.text.decode()
            error = errors.OutOfBounds if text.startswith("index") else errors.UndefinedBehaviour
            return error(f"{self.where(self.given())}: {who}: {text}.")
        if kind == _Kind.RUNAWAY:
            return errors.Runaway(f"{self.where()}: {who} has run through more basic blocks than `steps` allows.")
        if kind == _Kind.WILD:
            verb = "writes" if report.write else "reads"
            address = report.offset & (2**64 - 1)
            return errors.OutOfBounds(f"{self.where()}: {who} {verb} address {address:#x}, which is in no buffer.")
        if kind == _Kind.FAULT:
            error = errors.UndefinedBehaviour if report.text.startswith(b"divides") else errors.OutOfBounds
            return error(f"kernel {self.name}: {who} {report.text.decode()}.")
        return errors.Divergence(
            f"{self.where(self.given())}: {who} reads lane {report.offset} of a simdgroup that has {report.size} "
            "threads."
        )

    def divergence(self) -> errors.EmulatorError:
        report = self.report
        sides = []
        for uid, state, file, line in (
            (report.who, report.write, report.file, report.line),
            (report.other, report.other_write, report.other_file, report.other_line),
        ):
            place = "" if state == _RETURNED else f" at {self.place((file.decode(), line))}"
            sides.append(f"{self.thread(uid)} {_STATES[state]}{place}")
        error = errors.Deadlock if _RETURNED in (report.write, report.other_write) else errors.Divergence
        return error(f"kernel {self.name}: {sides[0]}, while {sides[1]}; all threads of the group must come to it.")

    def in_threadgroup_memory(self) -> bool:
        return self.report.slot >= _FIRST_THREADGROUP_SLOT

    def given(self) -> tuple[str, int]:
        return (self.report.file or b"").decode(), self.report.line

    def where(self, place: tuple[str, int] | None = None) -> str:
        text = self.place(place) if place else self.line(self.report.pc)
        return f"kernel {self.name}, {text}"

    def line(self, pc: int) -> str:
        return self.place(build.line_of(self.path, pc - 1 - self.base)) if pc else "an unknown line"

    def place(self, place: tuple[str, int]) -> str:
        file, number = place
        text = {"header": self.source.header, "body": self.source.body}.get(file)
        if text is None or not 0 < number <= len(text.splitlines()):
            return file or "a line of the standard library"
        line = text.splitlines()[number - 1].strip()
        return f"{file} line {number} (`{line if len(line) <= 100 else line[:97] + '...'}`)"

    def thread(self, uid: int) -> str:
        sizes = list(self.call.threadgroup)
        counts = [-(-g // t) for g, t in zip(self.call.grid, sizes)]
        group, index = divmod(uid, math.prod(sizes))
        at = (group % counts[0], group // counts[0] % counts[1], group // (counts[0] * counts[1]))
        size = [min(t, g - p * t) for t, g, p in zip(sizes, self.call.grid, at)]
        inside = (index % size[0], index // size[0] % size[1], index // (size[0] * size[1]))
        return f"thread {inside} of threadgroup {at}"

    def access(self) -> str:
        report = self.report
        verb = "writes" if report.write else "reads"
        if self.in_threadgroup_memory():
            return f"{verb} {report.size} bytes at byte {report.offset} of a threadgroup variable"
        if report.slot >= len(self.data):  # so far outside that the buffer is not known
            return f"{verb} {report.size} bytes"
        buffer, content = self.source.buffers[report.slot], self.data[report.slot]
        offset = report.offset - content.origin
        part = f" + {offset % content.item} bytes" if offset % content.item else ""
        return f"{verb} {buffer.name}[{offset // content.item}]{part}"

    def extent(self) -> str:
        report = self.report
        if self.in_threadgroup_memory():
            return "outside of it"
        if report.slot >= len(self.data):
            return "at an address far outside every buffer"
        content = self.data[report.slot]
        return f"which has {content.raw.nbytes // content.item} elements (shape {content.shape})"


@functools.cache
def _symbol_offset(path: Path) -> int:
    """The offset of the entry within its file."""
    listing = subprocess.run(["nm", "-D", str(path)], capture_output=True, text=True, check=True).stdout
    return next(int(line.split()[0], 16) for line in listing.splitlines() if line.endswith(" emulator_entry"))
