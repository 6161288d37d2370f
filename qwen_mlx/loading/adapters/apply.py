"""Adapters applied to a checkpoint: what becomes of each matrix, for load to keep beside it or to merge."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...errors import QwenMLXError
from ...gguf import blocks
from ...gguf.packing import Packing
from ..checkpoint import Checkpoint
from ..parameters import Delta, Parameter
from .change import EMBEDDING, HEAD, Change, Factors
from .read import Names, parse, read, resolve


def adapted(checkpoint: Checkpoint, names: Names) -> Checkpoint:
    """The checkpoint with adapters applied, in whatever order: each changes the base by its scale times its own change.

    names: PATH or PATH:SCALE, or several; see read.parse. Their low-rank changes are the result's `deltas`; parameters
    that they hold themselves replace the checkpoint's. Raises QwenMLXError (GGUFError for a GGUF) for what does not fit
    this model, naming it.
    """
    scales = parse(names)
    if not scales:
        return checkpoint
    with np.errstate(all="ignore"):  # what is not finite is refused
        return _adapted(checkpoint, scales)


def _adapted(checkpoint: Checkpoint, scales: Sequence[tuple[str, float]]) -> Checkpoint:
    paths = [resolve(name) for name, _ in scales]
    shapes = checkpoint.config.parameter_shapes()
    head = shapes | {HEAD: shapes[EMBEDDING]}
    changes = [_read(path, scale, shapes, head) for path, (_, scale) in zip(paths, scales)]
    checkpoint = _with_values(checkpoint, [change for change, _ in changes])
    names_of_matrices = dict.fromkeys(name for change, _ in changes for name in change.factors)
    deltas = {}
    for name in names_of_matrices:
        own = [(change.factors[name], scale) for change, scale in changes if name in change.factors]
        deltas[name] = _delta(checkpoint.parameters[name], own)
        if not all(np.isfinite(array).all() for array in deltas[name] if array is not None):
            paths_of_own = ", ".join(str(change.path) for change, _ in changes if name in change.factors)
            raise QwenMLXError(f"{paths_of_own}: the change of {name!r} is beyond float32; give a smaller scale.")
    text = "\n".join(f"{change.digest} {scale!r}" for change, scale in changes)
    return replace(checkpoint, deltas=deltas, adapter_digest=hashlib.sha256(text.encode()).hexdigest())


def _read(
    path: Path, scale: float, shapes: dict[str, tuple[int, ...]], head: dict[str, tuple[int, ...]]
) -> tuple[Change, float]:
    try:
        change = read(path, shapes, head)
    except QwenMLXError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        # Anyone may have written the files, and no check foresaw this fault.
        raise QwenMLXError(f"{path}: cannot be read; it is damaged or holds nonsense ({error!r:.300}).") from error
    if not change.factors and not change.values:
        raise QwenMLXError(f"{path}: changes nothing; it holds no tensors.")
    if change.values and scale != 1:
        raise QwenMLXError(
            f"{path}: holds {next(iter(change.values))!r} itself, which cannot be scaled; give it without {scale:g}."
        )
    return change, scale


def _with_values(checkpoint: Checkpoint, changes: Sequence[Change]) -> Checkpoint:
    """The checkpoint with the parameters that adapters hold themselves, and with a head of its own where the embedding
    and the head of a tied model no longer become the same."""
    parameters, owners = dict(checkpoint.parameters), dict[str, Path]()
    for change in changes:
        for name, parameter in change.values.items():
            if name in owners:
                raise QwenMLXError(f"{owners[name]} and {change.path} both hold {name!r}; leave one of them out.")
            owners[name], parameters[name] = change.path, parameter
    untied = [
        change
        for change in changes
        if any(name in (EMBEDDING, HEAD) for name in (*change.factors, *change.values))
        and not (change.ties and HEAD not in (*change.factors, *change.values))
    ]
    config = checkpoint.config
    if not config.tie_word_embeddings or not untied:
        return replace(checkpoint, parameters=parameters)
    tying = next((change for change in changes if change.ties and EMBEDDING in (*change.factors, *change.values)), None)
    if tying is not None:
        raise QwenMLXError(
            f"{tying.path} changes the embedding and the head as one, and {untied[0].path} one of them; leave one out."
        )
    if HEAD not in parameters:
        parameters[HEAD] = replace(checkpoint.parameters[EMBEDDING], name=HEAD)
    return replace(checkpoint, config=replace(config, tie_word_embeddings=False), parameters=parameters)


def _delta(base: Parameter, factors: Sequence[tuple[Factors, float]]) -> Delta:
    """W + the sum of scale (W_adapted - W), as row_scale W + b a. DoRA's W_adapted is m / |W + b a| (W + b a)."""
    all_a, all_b, row_scale = [], [], None
    for (a, b, magnitude), scale in factors:
        if magnitude is not None:
            growth = magnitude / _row_lengths(base, a, b)
            row_scale = np.ones(len(b), np.float32) if row_scale is None else row_scale
            row_scale = row_scale + np.float32(scale) * (growth - 1)
            b = growth[:, None] * b
        all_a.append(a)
        all_b.append(b * np.float32(scale))
    return Delta(np.concatenate(all_a), np.concatenate(all_b, axis=1), row_scale)


def _row_lengths(base: Parameter, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The Euclidean lengths of the rows of W + b a."""
    lengths = np.empty(base.rows, np.float32)

    def work(rows: slice) -> None:
        values = base.values(rows.start, rows.stop) + b[rows] @ a
        lengths[rows] = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64, casting="safe"))

    blocks.in_chunks(work, base.rows, base.width)
    base.release()
    return lengths


@dataclass(frozen=True, eq=False)
class MergedParameter(Parameter):
    """A matrix and what adapters make of it, as one, in float32; it has no packing."""

    base: Parameter
    delta: Delta

    def values(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        a, b, row_scale = self.delta
        values = self.base.values(start, stop)
        if row_scale is not None:
            values = values * row_scale[start:stop, None]
        merged: np.ndarray = values + b[start:stop] @ a
        return merged

    def part(self, rows: slice, columns: slice) -> Parameter:
        return merged(self.base.part(rows, columns), self.delta.part(rows, columns))

    def arrays(
        self, packing: Packing, start: int = 0, stop: int | None = None, finite: bool = True
    ) -> tuple[np.ndarray, ...]:
        raise ValueError(f"{self.name} is merged with an adapter, so that it is not packed.")

    def scale_dtype(self) -> str:
        raise ValueError(f"{self.name} is merged with an adapter, so that it is not packed.")


def merged(base: Parameter, delta: Delta) -> MergedParameter:
    """A matrix merged with its adapters."""
    layout = (base.stored, base.width, base.block_size, base.columns)
    name = f"{base.type_name} and an adapter"
    return MergedParameter(base.name, base.source_name, base.shape, name, (), *layout, base, delta)
