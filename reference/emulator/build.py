"""Compiles the runtime once and every kernel text once, with g++, into shared objects named by what they contain."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import CompileError, Unavailable, UninitialisedRead
from .source import ATTRIBUTES, Source, preamble
from .translate import translate

HERE = Path(__file__).parent
RECORD = 64  # bytes of runtime/state.h's Cell
# A kernel's text may be hostile: no more than 4 GB and two minutes for compiling it.
LIMITED = ["/bin/sh", "-c", 'ulimit -v 4194304; ulimit -t 120; exec "$@"', "sh"]
COMMON = [
    "-std=gnu++20",
    "-O1",
    "-march=native",
    "-fPIC",
    "-g1",
    "-gdwarf-4",  # binutils 2.40 names the wrong file for the first function of a version 5 table
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-stack-protector",
    "-fstack-clash-protection",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fsingle-precision-constant",
    "-fexcess-precision=16",
    "-fsanitize=shift-exponent,integer-divide-by-zero,signed-integer-overflow,bounds,alignment,float-cast-overflow,"
    "unreachable,return",
    "-fsanitize-coverage=trace-pc",
    "-Wno-attributes",
    "-Wno-literal-suffix",
    "-Wuninitialized",
    "-Wmaybe-uninitialized",
]

# The kernel's arguments that are attributes, from the runtime's Thread.
_UINT3 = "metal::uint3(t->{0}[0], t->{0}[1], t->{0}[2])"
_ATTRIBUTE_VALUES = {
    "dispatch_quadgroups_per_threadgroup": "(t->full_threads_per_threadgroup[0] * t->full_threads_per_threadgroup[1] * "
    "t->full_threads_per_threadgroup[2] + 3) / 4",
    "dispatch_simdgroups_per_threadgroup": "(t->full_threads_per_threadgroup[0] * t->full_threads_per_threadgroup[1] * "
    "t->full_threads_per_threadgroup[2] + 31) / 32",
    "dispatch_threads_per_threadgroup": _UINT3.format("full_threads_per_threadgroup"),
    "grid_origin": "metal::uint3(0, 0, 0)",
    "grid_size": _UINT3.format("threads_per_grid"),
    "quadgroup_index_in_threadgroup": "t->index_in_threadgroup / 4",
    "quadgroups_per_threadgroup": "(t->threads_per_threadgroup[0] * t->threads_per_threadgroup[1] * "
    "t->threads_per_threadgroup[2] + 3) / 4",
    "simdgroup_index_in_threadgroup": "t->simdgroup",
    "simdgroups_per_threadgroup": "t->simdgroups",
    "thread_execution_width": "32",
    "thread_index_in_quadgroup": "t->index_in_simdgroup % 4",
    "thread_index_in_simdgroup": "t->index_in_simdgroup",
    "thread_index_in_threadgroup": "t->index_in_threadgroup",
    "thread_position_in_grid": _UINT3.format("position_in_grid"),
    "thread_position_in_threadgroup": _UINT3.format("position_in_threadgroup"),
    "threadgroup_position_in_grid": _UINT3.format("threadgroup_position"),
    "threadgroups_per_grid": _UINT3.format("threadgroups_per_grid"),
    "threads_per_grid": _UINT3.format("threads_per_grid"),
    "threads_per_simdgroup": "32",
    "threads_per_threadgroup": _UINT3.format("threads_per_threadgroup"),
}
assert list(_ATTRIBUTE_VALUES) == list(ATTRIBUTES)


@functools.cache
def folder() -> Path:
    """The folder of compiled objects: METAL_EMULATOR_CACHE, or a temporary one that ends with this process."""
    if cache := os.environ.get("METAL_EMULATOR_CACHE"):
        Path(cache).mkdir(parents=True, exist_ok=True)
        return Path(cache)
    path = tempfile.mkdtemp(prefix="metal-emulator-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@functools.cache
def compiler() -> str:
    """The path of g++. Raises Unavailable where the emulator cannot run."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(
            f"The Metal emulator runs on Linux x86-64, this is {platform.system()} {platform.machine()}: run the "
            "kernels on the GPU instead."
        )
    path = shutil.which(os.environ.get("METAL_EMULATOR_CXX", "g++"))
    if path is None:
        raise Unavailable("The Metal emulator needs g++ 12 or newer, found none: install it or set METAL_EMULATOR_CXX.")
    version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.split(".")[0]) < 12:
        raise Unavailable(f"The Metal emulator needs g++ 12 or newer, {path} is {version}: set METAL_EMULATOR_CXX.")
    return path


def unavailable() -> str:
    """Why the emulator cannot run on this machine, "" if it can."""
    try:
        compiler()
    except Unavailable as error:
        return str(error)
    return ""


@functools.cache
def runtime() -> ctypes.CDLL:
    """The runtime, loaded."""
    sources = sorted((HERE / "runtime").iterdir())
    path = _cached("runtime", "".join(source.read_text() for source in sources), ".so")
    if not path.exists():
        main = str(HERE / "runtime" / "runtime.cpp")
        _run([compiler(), "-std=gnu++20", "-O2", "-g1", "-fPIC", "-shared", main, "-lrt"], path)
    library = ctypes.CDLL(str(path))
    library.emulator_place.restype = ctypes.c_void_p
    library.emulator_place.argtypes = [
        ctypes.c_int,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_int,
    ]
    library.emulator_unwritten.restype = ctypes.c_int64
    library.emulator_available.restype = ctypes.c_size_t
    if library.emulator_init():
        raise Unavailable("The Metal emulator reserves 8 TB of address space, which was refused: raise `ulimit -v`.")
    return library


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. suspect: the compiler's words on a local variable that may be read before it is set, or "";
    with_lines: compiles it again, to the same code with a table of lines, which takes a third longer."""

    library: ctypes.CDLL
    suspect: str
    with_lines: Callable[[], Path]


@functools.lru_cache(maxsize=1024)
def kernel(
    source: Source, instance: str, checked: bool, contract: bool, fill: str = "pattern", optimised: bool = True
) -> Kernel:
    """The compiled kernel. instance: the template arguments; fill: what unset local variables hold, pattern or zero.
    optimised: g++ may give an unset variable the value that it gets elsewhere, whatever the fill.

    Raises CompileError, or UninitialisedRead for a local variable that is certainly not set.
    """
    flags = [*_flags(checked, contract), f"-ftrivial-auto-var-init={fill}", *["-O0"] * (not optimised)]
    text = unit(source, instance)

    def compiled(*more: str) -> Path:
        path = _cached("kernel", "\n".join([text, *flags, *more, _preamble_text(), runtime()._name]), ".so")
        warnings = path.with_suffix(".txt")
        if not warnings.exists():  # written last
            unit_path = path.with_suffix(".cpp")
            _write(unit_path, text)
            include = ["-include", str(_precompiled(checked, contract))]
            # No default libraries: the link must not add the sanitizers' own runtimes.
            command = [compiler(), *flags, *more, *include, "-shared", "-nodefaultlibs", str(unit_path)]
            _write(warnings, _run([*command, runtime()._name, "-lm", "-lgcc"], path))
        return path

    path = compiled("-g0")
    files, warnings = "|".join(map(re.escape, source.files)), path.with_suffix(".txt").read_text()
    said = re.findall(rf"({files}):(\d+):\d+: warning: (.*) \[-W(maybe-)?uninitialized\]", warnings)
    for part, line, what, maybe in said:
        if not maybe:
            raise UninitialisedRead(f"{part} line {line}: {what}.")
    suspect = f"{said[0][0]} line {said[0][1]}: {said[0][2]}" if said else ""
    return Kernel(ctypes.CDLL(str(path)), suspect, compiled)


def unit(source: Source, instance: str) -> str:
    """The translation unit: the kernel's text, with lines counted by part, and a function that calls it."""
    text = f'#line 1 "header"\n{source.header}'
    text += ("" if source.header and not source.header.endswith("\n") else '#line 1 "signature"\n') + source.signature
    text += f'#line 1 "body"\n{source.body}\n#line 1 "tail"\n{source.tail}'
    arguments = []
    for index, buffer in enumerate(source.buffers):
        kind = buffer.declaration.rsplit(" [[", 1)[0].rsplit(" ", 1)[0].strip()
        pointer = kind.replace("&", "*")
        arguments.append(f"{'*' if kind.endswith('&') else ''}({pointer})b[{index}]")
    arguments += [_ATTRIBUTE_VALUES[name] for name in source.attributes]
    entry = (
        '\nextern "C" void emulator_entry(void* const* b, const emulator::Thread* t) {\n'
        f"  {source.function}{instance}({', '.join(arguments)});\n}}\n"
    )
    return translate(text + entry)


def line_of(path: Path, address: int, files: Sequence[str]) -> tuple[str, int]:
    """The file, one of Source.files, and line of a code address of a compiled kernel; ("", 0) outside of them."""
    command = ["addr2line", "-i", "-e", str(path), hex(address)]
    for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
        if match := re.search(rf"(?:^|/)({'|'.join(map(re.escape, files))}):(\d+)", line):
            return match.group(1), int(match.group(2))
    return "", 0


def _flags(checked: bool, contract: bool) -> list[str]:
    # Expensive optimizations are what makes fma at -O1.
    flags = [*COMMON, *(("-ffp-contract=fast", "-fexpensive-optimizations") if contract else ("-ffp-contract=off",))]
    return [*flags, "-fsanitize=thread"] if checked else flags


@functools.cache
def _preamble_text() -> str:
    shim = (HERE / "shim" / "metal_stdlib").read_text()
    return re.sub(r"\bSWIZZLES_([234])$", _swizzles, shim, flags=re.MULTILINE) + "\n" + translate(preamble())


def _swizzles(match: re.Match[str]) -> str:
    """A union's members for every choice of two to four of a vector's names."""
    n = int(match[1])
    return " ".join(
        f"swizzle<T, {n}, {', '.join(map(str, chosen))}> {''.join(letters[i] for i in chosen)};"
        for letters in ("xyzw", "rgba")
        for length in (2, 3, 4)
        for chosen in itertools.product(range(n), repeat=length)
    )


@functools.cache
def _precompiled(checked: bool, contract: bool) -> Path:
    """The standard library and MLX's preamble, compiled once for each set of options."""
    flags = _flags(checked, contract)
    path = _cached("preamble", _preamble_text() + " ".join(flags), ".h")
    if not Path(f"{path}.gch").exists():
        _write(path, _preamble_text())
        _run(
            [compiler(), *flags, "-ftrivial-auto-var-init=pattern", "-x", "c++-header", str(path)], Path(f"{path}.gch")
        )
    return path


def _cached(stem: str, content: str, suffix: str) -> Path:
    key = hashlib.sha256((content + compiler()).encode()).hexdigest()[:24]
    return folder() / f"{stem}-{key}{suffix}"


def _temporary(output: Path) -> Path:
    """A new file beside `output`, which it then replaces: nobody sees half of one, other processes neither."""
    with tempfile.NamedTemporaryFile(dir=output.parent, suffix=output.suffix, delete=False) as file:
        return Path(file.name)


def _write(output: Path, text: str) -> None:
    temporary = _temporary(output)
    temporary.write_text(text)
    temporary.replace(output)


def _run(command: list[str], output: Path) -> str:
    """Compiles, to a temporary name first. Returns the warnings."""
    temporary = _temporary(output)
    environment = {**os.environ, "LC_ALL": "C"}
    result = subprocess.run([*LIMITED, *command, "-o", str(temporary)], capture_output=True, text=True, env=environment)
    if result.returncode:
        temporary.unlink(missing_ok=True)
        lines = [line for line in result.stderr.splitlines() if re.search(r"\berror:", line)]
        raise CompileError("\n".join(lines[:8]) or result.stderr or "the compiler took more than two minutes")
    temporary.replace(output)
    return result.stderr
