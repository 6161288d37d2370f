"""One model on several ranks of an mx.distributed group: machines, GPUs, or processes that mlx.launch starts.

Every rank runs the same program on its shard (shards.py). Two sums a layer, one for the embedding and one joining of
the logits is all that travels; each gives every rank the same bits. Rank 0 draws every token, and the others take it.
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
from .link import ENDING, Link

if TYPE_CHECKING:
    from ..model.qwen2 import Qwen2

SAMPLES, SAMPLE = 1024, 4096  # pieces of a model's file that its digest sees, and the bytes of each
MEASURED = (32, 4)  # of how many steps, and of how many chunks of a prompt, one has its communication measured
TEXT = 1 << 14  # bytes that a rank may tell the others through the group


def join(group: mx.distributed.Group) -> Link | None:
    """Connects the ranks of a group (once), so that the end of one is the end of all; None for a group of one."""
    link = Link.of_process
    if group.size() > 1 and link is None:
        link = Link.of_process = Link(group.rank(), group.size(), lambda text: exchange(group, text))
        before = sys.excepthook

        def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            before(kind, error, trace)
            link.leave(error)

        sys.excepthook = report
        atexit.register(link.leave)
    return link


@contextlib.contextmanager
def together() -> Iterator[mx.distributed.Group | None]:
    """The group of the ranks that a launcher started, or None for one rank. Inside, only rank 0 prints; its end, or any
    rank's error, ends all."""
    # Until the link's thread watches, this waits in C++, where no handler of Python's would run.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    try:
        group = mx.distributed.init()
        link = join(group)
    except RuntimeError as error:
        raise QwenMLXError(f"The ranks cannot connect to each other ({error}); check the host file.") from None
    for number in ENDING if link is None or link.rank == 0 else ENDING[1:]:  # other ranks ignore Ctrl-C
        signal.signal(number, handlers[number])
    if link is None:
        yield None
        return
    if link.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
    try:
        yield group
    except BaseException as error:
        link.leave(error)
        raise
    if not link.rank:
        sys.stdout.flush()
    link.leave(all_end=True)


def exchange(group: mx.distributed.Group, text: str) -> list[str]:
    """Every rank's text, in the order of ranks."""
    data = text.encode()
    if len(data) > TEXT:
        raise QwenMLXError(f"A rank has {len(data)} bytes to tell, expected at most {TEXT}.")
    row = np.zeros((1, TEXT), np.uint8)
    row[0, : len(data)] = np.frombuffer(data, np.uint8)
    rows = np.array(mx.distributed.all_gather(mx.array(row), group=group))
    return [bytes(row).rstrip(b"\0").decode() for row in rows]


def check_same(group: mx.distributed.Group, path: Path, settings: dict[str, str]) -> None:
    """Raises QwenMLXError, on every rank, naming the first rank whose package, MLX, settings or files differ from rank
    0's. Of each file the size, the first 16 MB and 1,024 pieces of 4 KB are compared, by SHA-256."""
    from .. import __version__

    mine = {
        "qwen_mlx": f"{__version__} ({_digest(sorted(Path(__file__).parents[1].rglob('*.py')))[:12]})",
        "MLX": mx.__version__,  # type: ignore[attr-defined]  # not in its stub
        **settings,
        f"the model's files at {path}": _digest(_model_files(path)),
    }
    ranks = [json.loads(text) for text in exchange(group, json.dumps(list(mine.items())))]
    for rank, found in enumerate(ranks):
        for (_, expected), (what, value) in zip(ranks[0], found):
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


class Ranks:
    """A group as the model's layers use it, and what its communication costs.

    One step of 32 and one chunk of a prompt of 4 is computed piece by piece, so that each transfer can be timed,
    waiting for slower ranks included; the others are taken to spend the same share of their time.
    """

    def __init__(self, group: mx.distributed.Group):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self._timed = False
        self._kind, self._mark = 0, 0.0
        self._calls, self._spent, self._whole = [0, 0], [0.0, 0.0], [0.0, 0.0]  # of steps; of chunks

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def seconds(self, prompt_seconds: float, generation_seconds: float) -> float:
        """How much of these was communication."""
        times = zip((generation_seconds, prompt_seconds), self._spent, self._whole)
        return sum(seconds * spent / whole for seconds, spent, whole in times if whole)

    @property
    def times_next(self) -> bool:
        """Whether the next step is to be timed."""
        return self._calls[0] % MEASURED[0] == 0

    def begin(self, chunk: bool) -> None:
        """A pass through the model begins, with one new token of each row or a chunk of a prompt."""
        self._kind, self._timed = int(chunk), self._calls[chunk] % MEASURED[chunk] == 0
        self._calls[chunk] += 1
        self._mark = time.perf_counter()

    def sum(self, x: mx.array) -> mx.array:
        """The sum of every rank's x, the same bits on all."""
        return self._time(mx.distributed.all_sum, x)

    def join(self, x: mx.array) -> mx.array:
        """Every rank's x (..., n), side by side: (..., size * n)."""
        parts = self._time(mx.distributed.all_gather, x[None])
        return mx.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], -1)

    def first(self, x: mx.array) -> mx.array:
        """Rank 0's x."""
        # Not zeros: what x comes from must be computed on every rank, because it waits for all of them.
        return mx.distributed.all_sum(x if self.rank == 0 else x * 0, group=self.group)

    def finish(self, *arrays: mx.array) -> None:
        """Waits for arrays that nobody wants any more: a process that ends while a sum is under way crashes in MLX's
        ring, whose buffers are gone by then (MLX 0.32.4)."""
        with contextlib.suppress(RuntimeError):  # another rank is gone: the link tells of it
            mx.eval(arrays)

    def _time(self, transfer: Callable[..., mx.array], x: mx.array) -> mx.array:
        if not self._timed:
            return transfer(x, group=self.group)
        mx.eval(x)
        start = time.perf_counter()
        result = transfer(x, group=self.group)
        mx.eval(result)
        now = time.perf_counter()
        self._spent[self._kind] += now - start
        self._whole[self._kind] += now - self._mark
        self._mark = now
        return result


class RowParallelLinear(nn.Module):
    """A projection of which each rank has some input columns: the products' sum, then the bias, once."""

    def __init__(self, part: nn.Module, ranks: Ranks):
        super().__init__()
        self.part, self._ranks = part, ranks
        if "bias" in part:
            self.bias = part.pop("bias")

    def __call__(self, x: mx.array) -> mx.array:
        y = self._ranks.sum(self.part(x))
        return y + self.bias if "bias" in self else y


class ParallelHead(nn.Module):
    """A head of which each rank has some rows, `most` or fewer: the logits of all, (..., vocab_size)."""

    def __init__(self, part: nn.Module, ranks: Ranks, rows: slice, vocab_size: int):
        super().__init__()
        self.part, self._ranks = part, ranks
        self._missing = -(-vocab_size // ranks.size) - (rows.stop - rows.start)
        self._vocab_size = vocab_size

    def __call__(self, x: mx.array) -> mx.array:
        return self.join(self.part(x))

    def join(self, y: mx.array) -> mx.array:
        """All ranks' logits, from this one's."""
        if self._missing:  # the last rank's part may be shorter
            y = mx.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, self._missing)])
        return self._ranks.join(y)[..., : self._vocab_size]


class ParallelEmbedding(ParallelHead):
    """An embedding of which each rank has some rows: the rank that has a token's row gives it, the others zeros."""

    def __init__(self, part: nn.Module, ranks: Ranks, rows: slice, vocab_size: int):
        super().__init__(part, ranks, rows, vocab_size)
        self._rows = rows

    def __call__(self, ids: mx.array) -> mx.array:
        self._ranks.begin(chunk=ids.shape[-1] > 1)
        return self.rows(ids)

    def rows(self, ids: mx.array) -> mx.array:
        """The embeddings of token ids, within a pass that has begun."""
        mine = (ids >= self._rows.start) & (ids < self._rows.stop)
        found = self.part(mx.where(mine, ids - self._rows.start, 0))
        return self._ranks.sum(mx.where(mine[..., None], found, mx.zeros_like(found)))

    def as_linear(self, x: mx.array) -> mx.array:
        return self.join(self.part.as_linear(x))


def share(model: Qwen2, shard: shards.Shard, group: mx.distributed.Group) -> None:
    """Makes a model of one shard's parts a part of the whole: what each of its layers lacks comes from the others."""
    ranks = model.ranks = Ranks(group)
    config = model.config = shard.config
    rows = shard.vocabulary
    for layer in model.model.layers:
        layer.self_attn["o_proj"] = RowParallelLinear(layer.self_attn.o_proj, ranks)
        layer.mlp["down_proj"] = RowParallelLinear(layer.mlp.down_proj, ranks)
    model.model["embed_tokens"] = ParallelEmbedding(model.model.embed_tokens, ranks, rows, config.vocab_size)
    if not config.tie_word_embeddings:
        model["lm_head"] = ParallelHead(model.lm_head, ranks, rows, config.vocab_size)
