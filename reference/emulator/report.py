"""The runtime's findings in words."""

from __future__ import annotations

import ctypes
import enum
import functools
import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import build, errors
from .source import Source

_FIRST_THREADGROUP_SLOT = 32  # runtime/state.h's kFirstThreadgroupSlot


class Kind(enum.IntEnum):
    """runtime/state.h's Kind."""

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
    UNSUPPORTED = 12


_RETURNED = 3  # runtime/state.h's kDone
_STATES = {1: "waits at a barrier", 2: "waits at a simd operation", _RETURNED: "has returned"}


class Report(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "slot", "write", "other_write", "line", "other_line")),
        *((name, ctypes.c_int64) for name in ("offset", "size")),
        *((name, ctypes.c_uint64) for name in ("pc", "other_pc", "who", "other")),
        *((name, ctypes.c_char_p) for name in ("file", "other_file", "text")),
    )


class Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("flush", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("steps", ctypes.c_uint64),
        ("next", ctypes.c_uint64),
        ("report", Report),
    )


@dataclass(frozen=True)
class Data:
    """Contents of a buffer: bytes, where they start within 16, bytes of an element, and the address of element 0."""

    raw: np.ndarray
    item: int
    skew: int = 0
    origin: int = 0
    shape: tuple[int, ...] = ()


class Words:
    """Puts the runtime's report into a sentence. entry: the address of the kernel's entry."""

    def __init__(self, name: str, source: Source, data: Sequence[Data], kernel: build.Kernel, entry: int, call: Launch):
        self.name, self.source, self.data, self.kernel, self.entry, self.call = name, source, data, kernel, entry, call
        self.report = call.report

    def error(self) -> errors.EmulatorError:
        report = self.report
        kind = Kind(report.kind)
        who = self.thread(report.who)
        if kind == Kind.OUT_OF_BOUNDS:
            return errors.OutOfBounds(f"{self.where()}: {who} {self.access()}, {self.extent()}.")
        if kind == Kind.RACE:
            how = "wrote" if report.other_write else "read"
            place = f" at {self.line(report.other_pc)}" if report.other_pc else ""
            memory = "threadgroup" if self.in_threadgroup_memory() else "device"
            return errors.DataRace(
                f"{self.where()}: {who} {self.access()}, which {self.thread(report.other)} {how}{place} with no "
                f"barrier for {memory} memory between."
            )
        if kind == Kind.UNINITIALISED:
            return errors.UninitialisedRead(f"{self.where()}: {who} {self.access()}, which nothing has written.")
        if kind == Kind.READ_ONLY:
            what = self.access() if report.slot >= 0 else "writes a constant"
            return errors.ReadOnly(f"{self.where()}: {who} {what}, which is read-only.")
        if kind == Kind.DIVERGENCE:
            return self.divergence()
        if kind == Kind.MEMORY_LIMIT:
            return errors.ThreadgroupMemory(
                f"{self.where()}: {report.size} bytes of threadgroup memory, Metal allows 32768."
            )
        if kind == Kind.UNDEFINED:
            text = report.text.decode()
            error = errors.OutOfBounds if text.startswith("index") else errors.UndefinedBehaviour
            return error(f"{self.where(self.given())}: {who}: {text}.")
        if kind == Kind.RUNAWAY:
            return errors.Runaway(
                f"{self.where()}: {who} does not end: it stands still, or runs through more basic blocks than `steps`."
            )
        if kind == Kind.WILD:
            verb = "writes" if report.write else "reads"
            address = report.offset & (2**64 - 1)
            return errors.OutOfBounds(f"{self.where()}: {who} {verb} address {address:#x}, which is in no buffer.")
        if kind == Kind.FAULT:
            error = errors.OutOfBounds if report.text.startswith((b"touches", b"needs")) else errors.UndefinedBehaviour
            return error(f"{self.where()}: {who} {report.text.decode()}.")
        if kind == Kind.UNSUPPORTED:
            return errors.Unavailable(f"{self.where()}: {who} {report.text.decode()}.")
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
        if not pc:
            return "an unknown line"
        path = self.kernel.with_lines()
        address = pc - 1 - self.entry + _symbol_offset(path)
        return self.place(build.line_of(path, address, self.source.files))

    def place(self, place: tuple[str, int]) -> str:
        file, number = place
        line = self.source.line(file, number)
        if line is None:
            return file or "a line of the standard library"
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
