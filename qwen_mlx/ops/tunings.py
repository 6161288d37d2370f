"""The ways in which the matrix-vector kernels cut their work, by device.

NVIDIA's were measured on an H200 (benchmarks/results/matvec_h200.json). None of their numbers runs on Metal, where each
product takes the candidate that the trial found fastest on that machine (trial/), and the first candidate before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..backend import mx
from .matrix import BLOCKS, Matrix

TILE_ROWS = 16
STAGE_WORDS = {"q4_k": 576, "q6_k": 848}  # of 16 rows' codes and scales in a stage; see the packings' headers for tiles
# Bytes of threadgroup memory: what a CUDA kernel can declare, and Apple's limit.
THREADGROUP_MEMORY = {"cuda": 48 << 10, "metal": 32 << 10}
ALL = 1 << 20  # threadgroups: one for each of its units


@dataclass(frozen=True)
class Tuning:
    """The way work is cut: `rows` a unit, `split` simdgroups a unit, `depth` chunks that a lane loads at once (tiles:
    stages that there is room for), `threads` a threadgroup, and at most `groups` threadgroups, which take several units
    in turn where there are more. ring: words that a stage of tiles takes in threadgroup memory."""

    rows: int
    split: int
    depth: int
    threads: int = 256
    groups: int = 1056
    ring: int = 0


@dataclass(frozen=True)
class Candidate:
    """A cut for Metal: rows a unit of packed and of dense matrices (pairs of rows need two at least), threads, and the
    simdgroups that share a row of LONG columns or more."""

    packed_rows: int
    dense_rows: int
    threads: int
    split: int


LONG = 8192


# Few rows leave registers to more simdgroups, more rows share the vector's elements.
CANDIDATES = {"two rows": Candidate(2, 1, 128, 4), "four rows": Candidate(4, 2, 256, 1)}
# Threadgroups of a product whose vector each of them norms anew; the number is none of the kernel's constants, so that
# trying another compiles nothing. A device has from 8 to 80 cores.
GROUPS = (64, 256, 1024)
DEFAULT = ("two rows", 256)
PACKS = 4  # of 16 bytes that a thread holds of the vector that it norms: more would spill

Choice = tuple[str, int]  # a name in CANDIDATES, and one of GROUPS
_chosen: dict[str, Choice] = {}


def key(name: str, matrices: Sequence[Matrix]) -> str:
    """The name of a product among the choices: "matvec_swiglu Q4_K 37888x3584"."""
    packings = ", ".join(str(matrix.packing) for matrix in matrices)
    return f"{name} {packings} {'+'.join(str(matrix.rows) for matrix in matrices)}x{matrices[0].columns}"


def choose(choices: Mapping[str, Choice]) -> None:
    """Takes these choices for products by `key`, from now on."""
    _chosen.update(choices)


def choice(name: str, matrices: Sequence[Matrix]) -> Choice:
    """The choice for a product on Metal."""
    return _chosen.get(key(name, matrices), DEFAULT)


def for_metal(name: str, matrices: Sequence[Matrix], dtype: mx.Dtype, normed: bool) -> Tuning:
    """A product by rows on Metal."""
    chosen, groups = choice(name, matrices)
    candidate, dense = CANDIDATES[chosen], matrices[0].packing.kind == "dense"
    rows = candidate.dense_rows if dense else candidate.packed_rows
    threads = candidate.threads
    if normed:
        threads = max(threads, -(-matrices[0].columns * dtype.size // (16 * PACKS * 32)) * 32)
    rows = rows if name == "matvec" else max(rows, 2)
    split = candidate.split if name == "matvec" and matrices[0].columns >= LONG else 1
    return Tuning(rows, split, 2 if dense else 1, threads // split * split, groups if normed else ALL)


def for_cuda(name: str, matrices: Sequence[Matrix]) -> Tuning:
    """A product by rows on NVIDIA: packed rows share the vector's elements, so more of them at once; a long row is
    shared by simdgroups."""
    columns = matrices[0].columns
    if matrices[0].packing.kind == "dense":
        if name == "matvec":
            return Tuning(1, 8 if columns >= 16384 else 2 if columns >= 4096 else 1, 4)
        wide = columns > 1024
        return Tuning(2, 2 if wide and name == "matvec_qkv" else 1, 2 if wide else 4, groups=528 if wide else 264)
    if name == "matvec_swiglu":
        return Tuning(4, 1, 1, groups=396)
    return Tuning(2, 4 if columns >= 8192 else 1, 1)


def for_tiles(name: str, matrices: Sequence[Matrix], normed: bool, device: str) -> Tuning:
    """A product by tiles: about 2000 simdgroups, each with as many of a row's stages, two at least where the vector is
    normed, which every threadgroup does anew; up to eight simdgroups to a threadgroup, as there is room. A third stage
    under way made most products slower."""
    columns = matrices[0].columns
    stages = -(-columns // 256)
    rounds = max(1 + normed, round(stages * matrices[0].rows / TILE_ROWS / 2000), -(-stages // 8))
    split = -(-stages // min(rounds, stages))
    ring, depth = max(map(_stage_words, matrices)) + (0 if normed else 128), 2
    # Besides: the vector with its gaps, the sums of each 16 of its elements, and the simdgroups' sums.
    room = THREADGROUP_MEMORY[device] - (columns * 5 // 2 if normed else 0) - 1024
    most = max(1, room // (4 * ring * depth))
    split = min(split, most)
    units = 1 if split > 2 else min(most // split, 6 if name == "matvec_swiglu" and split == 1 else 4 // split)
    return Tuning(TILE_ROWS, split, depth, 32 * split * units, groups=1 << 20, ring=ring)


def _stage_words(matrix: Matrix) -> int:
    """Words of codes and scales that a simdgroup copies in a stage; see the packings' headers for tiles."""
    packing = matrix.packing
    if packing.kind in BLOCKS:
        return STAGE_WORDS[packing.kind]
    return 512 + 8 * (256 // packing.group_size) * matrix.arrays[1].dtype.size
