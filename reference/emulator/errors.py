"""Errors that the emulator finds. Each is one sentence: kernel, line, thread, buffer, what was expected."""

from __future__ import annotations


class EmulatorError(Exception):
    """A defect of a kernel or of its launch; the subclasses name the kinds."""


class Unavailable(EmulatorError):
    """This machine cannot run the emulator, or the call cannot be emulated."""


class CompileError(EmulatorError):
    """The text does not compile; the message is the compiler's, with lines of the kernel's header and body."""


class InvalidLaunch(EmulatorError):
    """Grid, threadgroup, inputs or outputs that Metal or MLX refuse."""


class OutOfBounds(EmulatorError):
    """A read or write outside the buffer, the threadgroup array or the local array."""


class ReadOnly(EmulatorError):
    """A write to an input or a constant."""


class DataRace(EmulatorError):
    """Two threads access the same bytes, at least one writes, and no barrier for that memory lies between."""


class UninitialisedRead(EmulatorError):
    """A read of threadgroup memory, an output or a local variable that nothing has written."""


class UnwrittenOutput(EmulatorError):
    """An output has elements that no thread wrote."""


class Divergence(EmulatorError):
    """A barrier or simd operation that not all threads of the group reach, or a lane that is not there."""


class Deadlock(Divergence):
    """Threads wait at a barrier or simd operation for threads that have returned."""


class ThreadgroupMemory(EmulatorError):
    """More than 32 KiB of threadgroup memory."""


class UndefinedBehaviour(EmulatorError):
    """Signed overflow, division by zero, too long a shift, a misaligned pointer, a float no integer can hold."""


class Runaway(EmulatorError):
    """A thread that does not end."""
