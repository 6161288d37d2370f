"""The command `convert`: a GGUF, or a folder of safetensors, becomes an MLX model folder."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import QwenMLXError
from .command import Parser, program, stop

if TYPE_CHECKING:
    from ..conversion.convert import Progress
    from ..conversion.quantize import Form, Stored
    from ..loading.parameters import Parameter

FLOATS = ("bfloat16", "float16", "float32")


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = Parser(
        prog=program("convert"),
        description="Convert a GGUF (or a folder of safetensors, or a hub id) to an MLX model folder, which qwen_mlx "
        "and mlx-lm load. The error of every tensor is printed and written to conversion.json.",
    )
    p.add_argument("source", help=".gguf file (the first part, if split), folder, or hub id")
    p.add_argument("output", nargs="?", help="folder to write; it appears complete or not at all")
    p.add_argument("--check", action="store_true", help="validate the model and list its tensors; write nothing")
    p.add_argument(
        "--dtype",
        choices=FLOATS,
        default="bfloat16",
        help="of what MLX cannot hold packed (default bfloat16, which costs 1.7e-3 in relative L2; float32 is exact)",
    )
    p.add_argument(
        "--scales",
        choices=("auto", *FLOATS),
        default="auto",
        help="of packed tensors. auto is exact: float16 for Q4_0 to Q8_0, float32 for K-quants, where float16 costs "
        "7e-4 and bfloat16 6e-3 in relative L2. mlx-lm computes in float32 with auto and float32 and in bfloat16 with "
        "--scales bfloat16 --dtype bfloat16",
    )
    bits: dict[str, Any] = {"type": int, "choices": (2, 3, 4, 5, 6, 8)}
    p.add_argument("--requantize", **bits, help="pack the types that MLX cannot express (Q6_K, Q3_K, ...); else dense")
    p.add_argument("--quantize", **bits, help="pack every matrix, whatever its type")
    p.add_argument("--group-size", type=int, choices=(32, 64, 128), help="of both (default 64)")
    p.add_argument("--dense", action="store_true", help="unpack every matrix, as transformers needs")
    p.add_argument("--force", action="store_true", help="replace an existing model folder")
    p.add_argument("--allow-nan", action="store_true", help="convert values and scales that are not finite")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes raise QwenMLXError."""
    arguments = vars(parser().parse_args(argv))
    source, output, check_only = arguments.pop("source"), arguments.pop("output"), arguments.pop("check")
    if not check_only and output is None:
        raise QwenMLXError("no output folder; give SOURCE and OUTPUT, or --check SOURCE.")
    if check_only and output is not None:
        raise QwenMLXError(f"--check writes nothing, so {output!r} is not needed; leave it out.")
    settle_group_size(arguments, "quantize", "requantize")
    stop_once()
    from ..conversion.convert import check, convert

    if check_only:
        with bar("Checking") as progress:
            rows = check(source, progress)
        _print_check(rows, source)
        return 0
    with bar("Converting") as progress:
        report = convert(source, output, **arguments, progress=progress)
    print_report(report)
    group_size = arguments["group_size"]
    undivided = [row.name for row in report if len(row.shape) == 2 and row.shape[1] % group_size]
    if undivided and (arguments["quantize"] or arguments["requantize"]):
        print(f"{len(undivided)} matrices have rows that --group-size {group_size} does not divide: not quantized")
    print_use(output)
    return 0


def settle_group_size(arguments: dict[str, Any], *options: str) -> None:
    """Puts the default of --group-size where it is not given. Raises QwenMLXError where it is, and none of the options
    that it belongs to."""
    if arguments["group_size"] is None:
        arguments["group_size"] = 64
    elif not any(arguments[option] for option in options):
        raise QwenMLXError(f"--group-size goes with {' or '.join(f'--{option} BITS' for option in options)}.")


def print_use(output: str) -> None:
    """The command that generates with what was written."""
    print(f"{output}: {program('generate')} --model {shlex.quote(output)} --prompt ...")


def stop_once() -> None:
    """Lets Ctrl-C end the command once: a second one must not leave an unfinished folder."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # nohup ignores it
        signal.signal(signal.SIGINT, stop)


@contextlib.contextmanager
def bar(label: str) -> Iterator[Progress]:
    """A progress bar of bytes and tensors on standard error, where that is a terminal."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=label, disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(tensors: int, all_tensors: int, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(f"{tensors}/{all_tensors} tensors", refresh=False)
            bar.update(done - bar.n)

        yield progress


def _print_check(rows: list[tuple[Parameter, Form, int]], source: str) -> None:
    table: list[tuple[str, ...]] = [("tensor", "type", "shape", "bytes", "in MLX", "verdict")]
    for tensor, form, bad in rows:
        shape = " x ".join(map(str, tensor.shape))
        verdict = f"{bad} values not finite" if bad else "ok"
        table.append((tensor.source_name, tensor.type_name, shape, f"{tensor.nbytes}", str(form), verdict))
    _print_table(table, right=(3,))
    damaged = [tensor.source_name for tensor, _, bad in rows if bad]
    print(f"{len(rows)} tensors, {sum(tensor.nbytes for tensor, _, _ in rows) / 1e6:.1f} MB, {len(damaged)} damaged")
    if damaged:
        raise QwenMLXError(
            f"{source}: tensor {damaged[0]!r} holds values that are not finite; download the file again, or convert it "
            "all the same with --allow-nan."
        )


def print_report(report: list[Stored]) -> None:
    """The error of every tensor that changed, and a line for each way of storing."""
    changed = [row for row in report if not row.exact]
    if changed:
        print(f"{len(changed)} of {len(report)} tensors are not exactly the source's; their errors over finite values:")
        table = [("tensor", "type", "stored as", "relative L2", "max abs", "not finite")]
        for row in changed:
            errors = f"{row.relative_l2:.2e}", f"{row.max_abs:.2e}", f"{row.not_finite}"
            table.append((row.name, row.source_type, row.stored_as, *errors))
        _print_table(table, right=(3, 4, 5))
        print()
    for form in dict.fromkeys(row.stored_as for row in report):
        rows = [row for row in report if row.stored_as == form]
        exact = sum(row.exact for row in rows)
        print(f"{form}: {len(rows)} tensors, {sum(row.nbytes for row in rows) / 1e6:.1f} MB, {exact} exact")


def _print_table(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
