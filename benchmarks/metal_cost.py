"""The cost of the decoding kernels for an Apple GPU, counted on any machine: instructions, cycles and registers.

Each kernel's Metal text for a 7B model, as MLX would compile it, goes through clang (as C++ for OpenCL) and LLVM. The
instructions of the innermost loop that reads most of the weights are counted, for each weight that the loop reads;
of a kernel without such a loop all, for each number that a thread writes. Beside them stand MLX's own kernels, whose
code Apple's compiler left in the macOS wheel as LLVM's; pip downloads it into the cache once.

Cycles: a SIMD's throughput of each instruction on Apple 7 and 8, measured by Philip Turner
(https://github.com/philipturner/metal-benchmarks, "Instruction throughputs"); see COSTS. Registers: LLVM's allocator
for AMD's RDNA 2, which has 32 lanes and 32-bit registers too, given 104 of them (the most with which an Apple GPU runs
512 threads a threadgroup) and 128 (all that it has). A proxy: Apple's own compiler is not to be had here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwen_mlx import ops
from qwen_mlx.backend import mx
from qwen_mlx.cli import command
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.ops import Matrix, Packing, dispatch, tunings
from reference.emulator.lint import SOURCE
from reference.emulator.source import Source, generate

from .arguments import Parser, require_module, to_write

HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 3584, 18944, 28, 4, 128, 152064  # Qwen2.5 7B
DTYPE, EPS = mx.bfloat16, 1e-6
PACKINGS = ("4 bits", "8 bits", "Q4_K", "Q6_K", "bfloat16")
CHUNKS = {"affine": 32, "q4_k": 64, "q6_k": 64, "dense": 8}  # weights of a row that a lane takes at once
LIMITS = (104, 128)
TARGET, CPU = "amdgcn-amd-amdhsa", "gfx1030"
CLANG = (
    *("-x", "clcpp", "-cl-std=clc++2021", "-target", TARGET, f"-mcpu={CPU}", "-nogpulib", "-cl-no-stdinc"),
    *("-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space", "-cl-single-precision-constant"),
    # Metal's safe mathematics contracts within an expression.
    *("-O3", "-Xclang", "-disable-llvm-passes", "-ffp-contract=on", "-fno-exceptions", "-Wno-everything"),
    *("-S", "-emit-llvm", "-o", "-", "-"),
)
SHIM = Path(__file__).with_suffix(".h")
MISSING = "clang is not installed: apt install clang, brew install llvm, or set CLANG to one that knows AMD's GPUs."

# Cycles of a SIMD. A comparison is one with the selection or the branch that follows it. A load of up to 16 bytes is
# one instruction, whose address is a base and an index.
COSTS: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("add", "sub", "and", "or", "xor", "select", "umin", "umax", "smin", "smax"), ("integer", 1.0)),
    **dict.fromkeys(("mul", "shl", "lshr", "ashr"), ("integer", 4.0)),
    **dict.fromkeys(("fadd", "fsub", "fmul", "fma", "fmuladd", "minnum", "maxnum", "fmin", "fmax"), ("float", 1.0)),
    **dict.fromkeys(("uitofp", "sitofp", "fptoui", "fptosi", "convert", "rint", "exp", "exp2"), ("float", 4.0)),
    **dict.fromkeys(("fptrunc", "fpext"), ("float", 2.0)),  # bfloat16's; float16 is an operand like any other
    **dict.fromkeys(("fdiv", "sqrt", "rsqrt", "recip"), ("float", 8.0)),
    **dict.fromkeys(("udiv", "sdiv", "urem", "srem"), ("integer", 32.0)),
    "fshl": ("integer", 8.0),
    "shuffle": ("shuffle", 1.0),
    **dict.fromkeys(("simd_sum", "simd_max"), ("shuffle", 10.0)),  # five shuffles and what joins them
}
SIZES = {"i8": 1, "i16": 2, "half": 2, "bfloat": 2, "i32": 4, "float": 4, "i64": 8, "double": 8}


@dataclass(frozen=True)
class Cost:
    """Counts for each number of `of`, and what the whole kernel takes; registers and text are unknown of MLX's.

    registers: by the limit that the allocator was given, None where it had to spill."""

    kernel: str
    of: str
    loads: float  # of 16 bytes
    integer: float
    floats: float
    shuffles: float
    cycles: float
    threads: int = 0
    rows: int = 0
    registers: Mapping[int, int | None] | None = None
    text: int = 0


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded and not made: its kernel, template values and threads of a threadgroup."""

    name: str
    source: Source
    template: Mapping[str, Any]
    threads: int


# The kernels of a token


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it operations launch nothing on an Apple GPU; the list collects their launches."""
    launches: list[Launch] = []

    def metal_kernel(name: str, input_names: Any, output_names: Any, source: str, header: str) -> Callable[..., Any]:
        def launch(
            inputs: Any, template: Any, grid: Any, threadgroup: Any, output_shapes: Any, output_dtypes: Any
        ) -> list[mx.array]:
            text = generate(name, input_names, output_names, header, source, False, inputs, output_dtypes, template)
            launches.append(Launch(name.removeprefix("qwen_"), text, dict(template), threadgroup[0]))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

        return launch

    before, mx.fast.metal_kernel = mx.fast.metal_kernel, metal_kernel
    try:
        with ops.forced("metal"), ops.no_grad():
            yield launches
    finally:
        mx.fast.metal_kernel = before
        dispatch._compiled.cache_clear()


def matrix(packing: str, rows: int, columns: int) -> Matrix:
    """A matrix that is never evaluated."""
    words = lambda share: mx.zeros((rows, columns // share), mx.uint32)  # noqa: E731
    if packing == "bfloat16":
        return Matrix(Packing("dense"), rows, columns, (mx.zeros((rows, columns), DTYPE),))
    if packing == "Q4_K":
        return Matrix(Packing("q4_k", 4, 32), rows, columns, (mx.zeros((rows, columns // 256, 36), mx.uint32),))
    if packing == "Q6_K":
        arrays = (words(8), words(16), words(64), mx.zeros((rows, columns // 256), mx.float16))
        return Matrix(Packing("q6_k", 6, 16), rows, columns, arrays)
    bits = int(packing.split()[0])
    scales = mx.zeros((rows, columns // 64), DTYPE)
    return Matrix(Packing("affine", bits, 64), rows, columns, (words(32 // bits), scales, scales))


def layer(packing: str, room: int = 1024) -> list[Launch]:
    """The launches of a layer, for one token on a cache of `room` tokens."""
    x, norm = mx.zeros((1, 1, HIDDEN), DTYPE), (mx.zeros((HIDDEN,), DTYPE), EPS)
    rows, position = (HEADS + 2 * KV_HEADS) * HEAD_DIM, mx.zeros((2,), mx.int32)
    recent, table = mx.zeros((1, 2 * KV_HEADS, 16, HEAD_DIM), DTYPE), mx.zeros((HEAD_DIM // 2, 2))
    kv, q = mx.zeros((1, 2 * KV_HEADS, room, HEAD_DIM), DTYPE), mx.zeros((1, HEADS, 1, HEAD_DIM), DTYPE)
    with recorded() as launches:
        ops.matvec_qkv(
            x, [matrix(packing, rows, HIDDEN)], mx.zeros((rows,), DTYPE), norm, table, recent, position, HEADS
        )
        ops.decode_attention(q, kv, recent, position, HEAD_DIM**-0.5)
        ops.matvec(x, matrix(packing, HIDDEN, HEADS * HEAD_DIM), residual=x)
        ops.matvec_swiglu(x, matrix(packing, 2 * WIDTH, HIDDEN), norm)
        ops.matvec(mx.zeros((1, 1, WIDTH), DTYPE), matrix(packing, HIDDEN, WIDTH), residual=x)
    return launches


def others() -> list[Launch]:
    """The launches of a token outside of its layers, attention on a long cache, and those of a prompt."""
    x, weight = mx.zeros((1, 4, HIDDEN), DTYPE), mx.zeros((HIDDEN,), DTYPE)
    qkv, table = mx.zeros((1, 4, (HEADS + 2 * KV_HEADS) * HEAD_DIM), DTYPE), mx.zeros((1, 4, HEAD_DIM // 2, 2))
    long = [launch for launch in layer("bfloat16", 8192) if "attention" in launch.name or launch.name == "combine"]
    with recorded() as launches:
        ops.best_token(mx.zeros((1, VOCABULARY), DTYPE))
        ops.rms_norm(x, weight, EPS)
        ops.add_rms_norm(x, x, weight, EPS)
        ops.qkv_rope(qkv, None, table, HEADS, KV_HEADS)
        ops.swiglu_joined(mx.zeros((1, 4, 2 * WIDTH), DTYPE))
    return [*long, *launches]


def numbers(launch: Launch) -> tuple[int, str]:
    """The count of numbers that a thread reads in a round of the kernel's loop (or writes), and their name."""
    values = launch.template
    if launch.name.startswith("matvec"):
        kind = next(kind for kind in CHUNKS if kind in launch.name)
        return values["R"] * values["DEPTH"] * CHUNKS[kind], "weight"
    if launch.name.startswith("decode_attention"):
        return 2 * values["DEPTH"] * (16 // DTYPE.size), "key or value"
    if "rms_norm" in launch.name:
        return values["N"] * -(-values["D"] // (values["N"] * values["THREADS"])), "element"
    return {"qkv_rope": 2 * values.get("N", 1), "swiglu": values.get("N", 1)}.get(launch.name, 1), "element"


# Compiling


def clang() -> str:
    """The compiler's path. Raises QwenMLXError without one."""
    own = os.environ.get("CLANG")
    names = [own] if own else ["clang", *(f"clang-{number}" for number in range(22, 15, -1))]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise QwenMLXError(MISSING)
    return found


def translation_unit(text: str) -> str:
    """A kernel's text as C++ for OpenCL: template values are local, and attributes AMD's."""
    match = SOURCE.match(text)
    assert match is not None
    names = [item.split() for item in (match["template"] or "").split(", ") if item]
    body = [
        f"typedef {value} {name};" if kind == "typename" else f"constexpr {kind} {name} = {value};"
        for (kind, name), value in zip(names, (match["values"] or "").split(", "))
    ]
    parameters = []
    for parameter in re.split(r",\n", match["parameters"]):
        declared = parameter.split(" [[")
        kind, name = declared[0].strip().rsplit(" ", 1)
        if "buffer(" in declared[1]:
            parameters.append(f"{kind} {name}")
        else:
            body.append(f"const auto {name} = attribute_{name}();")
    return (
        f"{SHIM.read_text(encoding='utf-8')}\n{match['header']}\n"
        f"__kernel void counted({', '.join(parameters)}) {{\n{' '.join(body)}\n{match['body']}\n}}\n"
    )


def optimized(text: str, unroll: bool = False) -> str:
    """LLVM's text after its passes; loops are unrolled where their source asks for it, or wherever it pays."""
    from llvmlite import binding as llvm

    module = llvm.parse_assembly(text)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_unrolling, options.slp_vectorization, options.loop_vectorization = unroll, False, False
    builder = llvm.create_pass_builder(_machine(), options)
    builder.getModulePassManager().run(module, builder)
    return str(module)


def _machine() -> Any:
    from llvmlite import binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(TARGET).create_target_machine(cpu=CPU, opt=3)


def compiled(text: str) -> str:
    """A kernel's text as optimized LLVM code. Raises QwenMLXError where clang refuses it."""
    run = subprocess.run([clang(), *CLANG], input=translation_unit(text), capture_output=True, text=True)
    if run.returncode:
        error = next((line for line in run.stderr.splitlines() if "error:" in line), run.stderr.strip()[-200:])
        raise QwenMLXError(f"clang ({clang()}) refuses a kernel: {error}.")
    return optimized(run.stdout)


def registers(code: str, threads: int, limit: int) -> int | None:
    """Registers of a thread where the allocator has `limit` of them, None if it spills."""
    from llvmlite import binding as llvm

    size = f'"amdgpu-flat-work-group-size"="{threads},{threads}" "amdgpu-num-vgpr"="{limit}"'
    code = code.replace('"amdgpu-flat-work-group-size"="1,256"', size)
    assembly = _machine().emit_assembly(llvm.parse_assembly(code))
    used, spilled = (int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
    return None if spilled else used


# Counting


def count(code: str, function: str) -> Counter[str]:
    """Loads of 16 bytes, instructions by kind, and cycles: of the innermost loop that loads most from the GPU's memory,
    or of the whole function if no loop does."""
    start = re.search(rf"^define .*@{re.escape(function)}\(", code, re.MULTILINE)
    assert start is not None, function
    blocks = _blocks(code[start.start() : code.index("\n}\n", start.start())])
    found = _loops(blocks)
    inner = [body for head, body in found.items() if not any(other != head and other in body for other in found)]
    counts = [_total(line for block in body for line in blocks[block]) for body in inner]
    best = max(counts, key=lambda total: (total["loads"], total["cycles"]), default=Counter())
    return best if best["loads"] else _total(line for lines in blocks.values() for line in lines)


def _blocks(function: str) -> dict[str, list[str]]:
    """The lines of each of a function's blocks, by label; "" for the first."""
    blocks: dict[str, list[str]] = {"": []}
    label = ""
    for line in function.splitlines()[1:]:
        if match := re.match(r'("?[-\w.$]+"?):', line):
            label = match[1]
            blocks[label] = []
        elif line.startswith("  "):
            blocks[label].append(line.strip())
    return {label: lines for label, lines in blocks.items() if lines}


def _loops(blocks: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    """The natural loops: the blocks of each by its head (Aho, Lam, Sethi and Ullman, Compilers, section 9.6)."""
    after = {block: re.findall(r'label %("?[-\w.$]+"?)', lines[-1]) for block, lines in blocks.items()}
    before = {block: [b for b in after if block in after[b]] for block in blocks}
    entry = next(iter(blocks))
    path, done, loops = [(entry, iter(after[entry]))], set[str](), dict[str, set[str]]()
    while path:
        block, following = path[-1]
        head = next(following, None)
        if head is None:
            done.add(path.pop()[0])
        elif any(head == on for on, _ in path):
            body, todo = loops.setdefault(head, {head}), [block]
            while todo:
                if (member := todo.pop()) not in body:
                    body.add(member)
                    todo += before[member]
        elif head not in done:
            path.append((head, iter(after[head])))
    return loops


def _total(lines: Iterator[str]) -> Counter[str]:
    total: Counter[str] = Counter()
    for line in lines:
        kind, amount, cycles = _priced(line)
        total[kind] += amount
        total["cycles"] += cycles
    return total


def _priced(line: str) -> tuple[str, float, float]:
    """An instruction's kind, how many it makes, and its cycles."""
    name = re.sub(r"^%\S+ = ", "", line).removeprefix("tail ").split()[0]
    if name == "load" and (match := re.search(r"load (?:<(\d+) x )?(\w+)>?, ptr (?:addrspace\((\d)\))?", line)):
        loads = int(match[1] or 1) * SIZES.get(match[2], 8) / 16
        return "loads" if match[3] == "1" else "other loads", loads, loads
    if name == "call":
        known = re.search(r'asm sideeffect "; (\w+)"|@(?:llvm|air)\.(?:simd_(?=shuffle)|fast_|precise_)?(\w+)', line)
        name = "" if known is None else known[1] or known[2]
        name = "shuffle" if name.startswith("shuffle") else name
    if name == "br":
        name = "add" if "br i1" in line else ""
    # The upper half of a register is an operand, and float16 is one beside float32.
    if (name == "lshr" and line.endswith(", 16")) or (name == "fpext" and " half " in line):
        name = ""
    kind, cycles = COSTS.get(name, ("free", 0.0))
    return kind, 1, cycles


def cost(launch: Launch) -> Cost:
    """The cost of a launch."""
    code = compiled(launch.source.text)
    each, of = numbers(launch)
    limits = {limit: registers(code, launch.threads, limit) for limit in LIMITS}
    rows = launch.template.get("R", 0)
    return _cost(launch.name, of, count(code, "counted"), each, launch.threads, rows, limits, len(launch.source.text))


def _cost(name: str, of: str, total: Counter[str], each: int, *more: Any) -> Cost:
    kinds = [round(total[kind] / each, 3) for kind in ("loads", "integer", "float", "shuffle", "cycles")]
    return Cost(name, of, *kinds, *more)


# MLX's own kernels

# name in the wheel: weights of a round of its loop (as its source says), and the name of a number
THEIRS = {
    "affine_qmv_fast_bfloat16_t_gs_64_b_4_batch_0_pr_0_hgs_0_r_4": (64, "weight"),
    "affine_qmv_fast_bfloat16_t_gs_64_b_8_batch_0_pr_0_hgs_0_r_4": (32, "weight"),
    "gemv_bfloat16_bm8_bn1_sm1_sn32_tm4_tn4_nc0_axpby0": (16, "weight"),
    "sdpa_vector_bfloat16_t_128_128": (8, "key or value"),
}


def theirs(cache: Path) -> list[Cost]:
    """The costs of MLX's own kernels. Raises QwenMLXError where pip cannot download them."""
    from llvmlite import binding as llvm

    library = _library(cache)
    costs = []
    for name, (each, of) in THEIRS.items():
        code = str(llvm.parse_bitcode(_bitcode(library, name)))
        for _ in range(3):  # the inner loops first: those around them are then short enough
            code = optimized(code, unroll=True)
        costs.append(_cost(name, of, count(code, name), each))
    return costs


def _library(cache: Path) -> bytes:
    """MLX's library of compiled kernels, of the installed version."""
    cache.mkdir(parents=True, exist_ok=True)
    wheel = f"mlx_metal-{version('mlx')}-py3-none-macosx_15_0_arm64.whl"
    if not (cache / wheel).exists():
        options = ("--platform", "macosx_15_0_arm64", "--only-binary=:all:", "--no-deps", "-qq", "--dest", cache)
        pip = [sys.executable, "-m", "pip", "download", *options, f"mlx-metal=={version('mlx')}"]
        if subprocess.run(pip).returncode or not (cache / wheel).exists():
            raise QwenMLXError(f"pip cannot download {wheel}: see its message, or leave MLX out with --only-ours.")
    with zipfile.ZipFile(cache / wheel) as archive:
        return archive.read("mlx/lib/mlx.metallib")


def _bitcode(library: bytes, name: str) -> bytes:
    """A function's code. The library has a header of offsets, a list of functions as tagged fields, and their code,
    each in a wrapper that says where it lies (https://github.com/zhuowei/MetalShaderTools)."""
    listed, _, _, _, _, _, codes, _ = struct.unpack_from("<8Q", library, 24)
    at = listed + 4
    for _ in range(struct.unpack_from("<I", library, listed)[0]):
        fields, end, tag = at + 4, at + struct.unpack_from("<I", library, at)[0], b""
        entry: dict[bytes, bytes] = {}
        while fields < end and (tag := library[fields : fields + 4]) != b"ENDT":
            size = struct.unpack_from("<H", library, fields + 4)[0]
            entry[tag] = library[fields + 6 : fields + 6 + size]
            fields += 6 + size
        if entry[b"NAME"].rstrip(b"\0").decode() == name:
            start = codes + struct.unpack_from("<3Q", entry[b"OFFT"])[2]
            offset, length = struct.unpack_from("<2I", library, start + 8)
            return library[start + offset : start + offset + length]
        at = end
    raise QwenMLXError(f"MLX {version('mlx')} has no kernel {name}: benchmarks/metal_cost.py names another version's.")


# The command


def main() -> None:
    """Prints the tables."""
    parser = Parser("metal_cost", __doc__)
    parser.add_argument("--packing", choices=PACKINGS, action="append", help="only this one (again for more)")
    parser.add_argument(
        "--cut", choices=tunings.CANDIDATES, help="the trial's candidate (default: each kernel's first)"
    )
    parser.add_argument("--only-ours", action="store_true", help="without MLX's kernels, which pip downloads")
    parser.add_argument("--output", type=to_write, help="write the costs as JSON")
    arguments = parser.parse_args()
    require_module("llvmlite", "pip install -e '.[cpu]'")
    clang()
    if arguments.cut:
        tunings.DEFAULT = arguments.cut, tunings.DEFAULT[1]
    costs: dict[str, list[Cost]] = {}
    for packing in arguments.packing or PACKINGS:
        launches = layer(packing)
        costs[packing] = show(packing, map(cost, launches))
        print(f"  text that MLX hashes for a layer: {sum(len(launch.source.text) for launch in launches):,} bytes")
    costs["others"] = show("others", map(cost, others()))
    if not arguments.only_ours:
        cache = Path(os.environ.get("QWEN_MLX_CACHE") or Path.home() / ".cache/qwen_mlx") / "mlx_metal"
        costs["MLX"] = show("MLX's own", theirs(cache))
    if arguments.output:
        arguments.output.write_text(json.dumps({k: list(map(asdict, v)) for k, v in costs.items()}, indent=1) + "\n")


def show(title: str, costs: Iterator[Cost] | list[Cost]) -> list[Cost]:
    """Prints a table and returns its rows."""
    limits = "  ".join(f"in {limit}" for limit in LIMITS)
    print(f"{title}\n  {'kernel':42} rows threads  loads integer float shuffle cycles  of a  registers {limits}")
    rows = []
    for c in costs:
        rows.append(c)
        used = "".join(f"{'spills' if n is None else n:>8}" for n in (c.registers or {}).values())
        counts = f"{c.loads:6.2f} {c.integer:7.2f} {c.floats:5.2f} {c.shuffles:7.2f} {c.cycles:6.2f}"
        print(f"  {c.kernel[:42]:42} {c.rows or '':>4} {c.threads or '':>7} {counts}  {c.of:12} {used}", flush=True)
    return rows


if __name__ == "__main__":
    command.run(main)
