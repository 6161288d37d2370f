"""One model on several ranks of an mx.distributed group: machines, GPUs, or processes that mlx.launch starts.

Every rank runs the same program on its shard (shards.py). What travels is two sums a layer, one for the embedding
and the gathered logits; each gives every rank the same bits. Rank 0 draws every token, and the others take it.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backend import mx, nn
from ..errors import QwenMLXError
from . import shards
from .control import ENDING, ControlChannel

if TYPE_CHECKING:
    from ..model.qwen2 import Qwen2

SAMPLES, SAMPLE = 1024, 4096  # pieces of a model's file that its digest covers, and the bytes of each
TIMED = (32, 4)  # one step of so many, and one chunk of a prompt of so many, has its communication timed
TEXT = 1 << 14  # bytes that a rank may tell the others through the group


def connect(group: mx.distributed.Group) -> ControlChannel | None:
    """Connects the ranks of a group (once), so that the end of one is the end of all; None for a group of one."""
    channel = ControlChannel.of_process
    if group.size() > 1 and channel is None:
        channel = ControlChannel(group.rank(), group.size(), lambda text: exchange(group, text))
        ControlChannel.of_process = channel
        print_error = sys.excepthook

        def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            print_error(kind, error, trace)
            channel.leave(error)

        sys.excepthook = report
        atexit.register(channel.leave)
    return channel


@contextlib.contextmanager
def together() -> Iterator[mx.distributed.Group | None]:
    """The group of the ranks that a launcher started, or None for one rank. Inside, only rank 0 prints; its end, or any
    rank's error, ends all."""
    # MLX waits in C++ for the other ranks, where no handler of Python's would run, until the channel's thread watches.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    try:
        group = mx.distributed.init()
        channel = connect(group)
    except RuntimeError as error:
        raise QwenMLXError(f"The ranks cannot connect to each other ({error}); check the host file.") from None
    for number in ENDING if channel is None or channel.rank == 0 else ENDING[1:]:  # other ranks ignore Ctrl-C
        signal.signal(number, handlers[number])
    if channel is None:
        yield None
        return
    if channel.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
    try:
        yield group
    except BaseException as error:
        channel.leave(error)
        raise
    if not channel.rank:
        sys.stdout.flush()
    channel.leave(all_end=True)


def exchange(group: mx.distributed.Group, text: str) -> list[str]:
    """Every rank's text, in the order of ranks."""
    data = text.encode()
    if len(data) > TEXT:
        raise QwenMLXError(f"A rank has {len(data)} bytes to tell, expected at most {TEXT}.")
    row = np.frombuffer(data.ljust(TEXT, b"\0"), np.uint8)
    rows = np.array(mx.distributed.all_gather(mx.array(row[None]), group=group))
    return [bytes(row).rstrip(b"\0").decode() for row in rows]


def check_same(group: mx.distributed.Group, path: Path, settings: dict[str, str]) -> None:
    """Raises QwenMLXError, on every rank, naming the first rank whose package, MLX, settings or files differ from rank
    0's. Files are compared by SHA-256 over the size, the first 16 MB and 1,024 pieces of 4 KB of each."""
    from .. import __version__

    mine = {
        "qwen_mlx": f"{__version__} ({_digest(sorted(Path(__file__).parents[1].rglob('*.py')))[:12]})",
        "MLX": mx.__version__,  # type: ignore[attr-defined]  # not in its stub
        **settings,
        f"the model's files at {path}": _digest(_model_files(path)),
    }
    ranks = [json.loads(text) for text in exchange(group, json.dumps(list(mine.items())))]
    for rank, settings_of_rank in enumerate(ranks):
        for (_, expected), (what, value) in zip(ranks[0], settings_of_rank):
            if value != expected:
                raise QwenMLXError(
                    f"Rank {rank} differs from rank 0 in {what}: {value} instead of {expected}; give every machine the "
                    "same packages and the same files."
                )


def _model_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors", ".jinja", ".txt"))
    stem, dash, _ = path.name.rpartition("-00001-of-")
    return sorted(path.parent.glob(f"{stem}-*-of-*.gguf")) if dash else [path]


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name if len(files) > 1 else ''} {size}\n".encode())
            digest.update(file.read(1 << 24))
            if size > 1 << 24:
                for i in range(SAMPLES):
                    file.seek(i * (size - SAMPLE) // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE))
    return digest.hexdigest()


class TensorParallelGroup:
    """A group as the model's layers use it, and what its communication costs.

    One step of 32 and one chunk of a prompt of 4 is computed piece by piece, so that each transfer can be timed,
    waiting for slower ranks included; the others are taken to spend the same share of their time.
    """

    def __init__(self, group: mx.distributed.Group):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self._chunk, self._timed, self._mark = False, False, 0.0  # the pass under way, and when its last piece ended
        # Passes, seconds of timed transfers and seconds of all timed work: of steps; of chunks.
        self._passes, self._communication, self._all = [0, 0], [0.0, 0.0], [0.0, 0.0]

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorParallelGroup:
        return self

    def communication_seconds(self, prompt_seconds: float, generation_seconds: float) -> float:
        """The part of these seconds that was communication."""
        times = zip((generation_seconds, prompt_seconds), self._communication, self._all)
        return sum(seconds * communication / total for seconds, communication, total in times if total)

    @property
    def next_step_timed(self) -> bool:
        """True if the next step is computed piece by piece."""
        return self._passes[0] % TIMED[0] == 0

    def begin_pass(self, chunk: bool) -> None:
        """Begins a pass through the model: one new token of each row, or a chunk of a prompt."""
        self._chunk, self._timed = chunk, self._passes[chunk] % TIMED[chunk] == 0
        self._passes[chunk] += 1
        self._mark = time.perf_counter()

    def all_sum(self, x: mx.array) -> mx.array:
        """The sum of every rank's x, the same bits on all."""
        return self._transfer(mx.distributed.all_sum, x)

    def all_gather(self, x: mx.array) -> mx.array:
        """Every rank's x (..., n), side by side: (..., size * n)."""
        rows = self._transfer(mx.distributed.all_gather, x[None])
        return mx.moveaxis(rows, 0, -2).reshape(*x.shape[:-1], -1)

    def from_first(self, x: mx.array) -> mx.array:
        """Rank 0's x."""
        # Not zeros: every rank must compute what x comes from, because that waits for all of them.
        return mx.distributed.all_sum(x if self.rank == 0 else x * 0, group=self.group)

    def wait(self, *arrays: mx.array) -> None:
        """Waits for arrays that nobody wants any more: MLX 0.32.4 crashes in its ring, whose buffers are gone by then,
        if a process ends while a sum is under way."""
        with contextlib.suppress(RuntimeError):  # another rank is gone, of which the control channel tells
            mx.eval(arrays)

    def _transfer(self, transfer: Callable[..., mx.array], x: mx.array) -> mx.array:
        if not self._timed:
            return transfer(x, group=self.group)
        mx.eval(x)
        start = time.perf_counter()
        result = transfer(x, group=self.group)
        mx.eval(result)
        end = time.perf_counter()
        self._communication[self._chunk] += end - start
        self._all[self._chunk] += end - self._mark
        self._mark = end
        return result


class RowParallelLinear(nn.Module):
    """A projection of which each rank has some input columns: the products' sum, then the bias, once."""

    def __init__(self, part: nn.Module, ranks: TensorParallelGroup):
        super().__init__()
        self.part, self._ranks = part, ranks
        if "bias" in part:
            self.bias = part.pop("bias")

    def __call__(self, x: mx.array) -> mx.array:
        y = self._ranks.all_sum(self.part(x))
        return y + self.bias if "bias" in self else y


class ParallelHead(nn.Module):
    """A head of which each rank has the rows `rows`: the logits of all, (..., vocab_size)."""

    def __init__(self, part: nn.Module, ranks: TensorParallelGroup, rows: slice, vocab_size: int):
        super().__init__()
        self.part, self._ranks, self._rows, self._vocab_size = part, ranks, rows, vocab_size

    def __call__(self, x: mx.array) -> mx.array:
        return self.gather(self.part(x))

    def gather(self, y: mx.array) -> mx.array:
        """All ranks' logits (..., vocab_size), from this one's."""
        missing = -(-self._vocab_size // self._ranks.size) - y.shape[-1]
        if missing:  # the last rank may have fewer rows
            y = mx.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, missing)])
        return self._ranks.all_gather(y)[..., : self._vocab_size]


class ParallelEmbedding(ParallelHead):
    """An embedding of which each rank has some rows: the rank that has a token's row gives it, the others zeros."""

    def __call__(self, ids: mx.array) -> mx.array:
        self._ranks.begin_pass(chunk=ids.shape[-1] > 1)
        return self.rows(ids)

    def rows(self, ids: mx.array) -> mx.array:
        """The embeddings of token ids, within a pass that has begun."""
        mine = (ids >= self._rows.start) & (ids < self._rows.stop)
        rows = self.part(mx.where(mine, ids - self._rows.start, 0))
        return self._ranks.all_sum(mx.where(mine[..., None], rows, mx.zeros_like(rows)))

    def as_linear(self, x: mx.array) -> mx.array:
        return self.gather(self.part.as_linear(x))


def share(model: Qwen2, shard: shards.Shard, group: mx.distributed.Group) -> None:
    """Connects a model that holds one shard with those of the other ranks: each of its layers gets from them what it
    lacks."""
    ranks = model.ranks = TensorParallelGroup(group)
    config = model.config = shard.config
    for layer in model.model.layers:
        layer.self_attn["o_proj"] = RowParallelLinear(layer.self_attn.o_proj, ranks)
        layer.mlp["down_proj"] = RowParallelLinear(layer.mlp.down_proj, ranks)
    vocabulary = (ranks, shard.vocabulary, config.vocab_size)
    model.model["embed_tokens"] = ParallelEmbedding(model.model.embed_tokens, *vocabulary)
    if not config.tie_word_embeddings:
        model["lm_head"] = ParallelHead(model.lm_head, *vocabulary)
