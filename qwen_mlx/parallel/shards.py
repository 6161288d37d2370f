"""The part of a model that each of several ranks loads: tensor parallelism as in Megatron-LM (Shoeybi et al. 2019,
arXiv:1909.08053).

Heads, the MLP's inner width and the vocabulary are cut; the matrices that read a cut width (o_proj, down_proj) are cut
by columns, so that each rank's product is a term of a sum. Every rank has all norms. Nothing here needs MLX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import QwenMLXError
from ..model.config import ModelConfig

ALIGNMENT = 256  # columns: the longest block or group of any packed format
ALL = slice(None)
Cut = Callable[[str], tuple[slice, slice]]  # a parameter's Hugging Face name to the rows and columns that are read


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`, and the `config` of the model that they share.

    Key/value heads are copied where there are fewer than ranks. The MLP is cut between blocks of a packed format, so
    that ranks may differ by one block; the vocabulary's last part may be shorter.
    Raises QwenMLXError, naming the counts that work, for a number of ranks that cannot share the heads.
    """

    rank: int
    size: int
    config: ModelConfig

    def __post_init__(self) -> None:
        if not _divides(self.config, self.size):
            counts = [n for n in range(2, self.config.num_attention_heads + 1) if _divides(self.config, n)]
            fix = f"start {_either(counts)} ranks, or one" if counts else "start one"
            raise QwenMLXError(
                f"{self.size} ranks cannot share this model's {self.config.num_attention_heads} heads and "
                f"{self.config.num_key_value_heads} key/value heads evenly; {fix}."
            )

    @property
    def heads(self) -> slice:
        """The query heads."""
        n = self.config.num_attention_heads // self.size
        return slice(self.rank * n, (self.rank + 1) * n)

    @property
    def kv_heads(self) -> slice:
        """The key/value heads that `heads` read."""
        n = max(1, self.config.num_key_value_heads // self.size)
        start = self.rank * self.config.num_key_value_heads // self.size
        return slice(start, start + n)

    @property
    def mlp(self) -> slice:
        """The part of the MLP's inner width."""
        unit, count = _mlp_units(self.config)
        return slice(unit * (count * self.rank // self.size), unit * (count * (self.rank + 1) // self.size))

    @property
    def vocabulary(self) -> slice:
        """The rows of the embedding and of the head."""
        n = _vocabulary_rows(self.config, self.size)
        return slice(self.rank * n, min((self.rank + 1) * n, self.config.vocab_size))

    @property
    def local(self) -> ModelConfig:
        """The configuration of a model of this rank's parts alone."""
        sizes = {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}
        sizes |= {"intermediate_size": self.mlp, "vocab_size": self.vocabulary}
        return replace(self.config, **{name: part.stop - part.start for name, part in sizes.items()})

    def cut(self, name: str) -> tuple[slice, slice]:
        """The rows and columns of the parameter `name` (Hugging Face's) that this rank loads."""
        module, _, kind = name.rpartition(".")
        module = module.rpartition(".")[2]
        dim = self.config.head_dim
        heads, kv = (slice(part.start * dim, part.stop * dim) for part in (self.heads, self.kv_heads))
        rows = {"q_proj": heads, "k_proj": kv, "v_proj": kv, "gate_proj": self.mlp, "up_proj": self.mlp}
        rows |= {"embed_tokens": self.vocabulary, "lm_head": self.vocabulary}
        columns = {"o_proj": heads, "down_proj": self.mlp} if kind == "weight" else {}
        return rows.get(module, ALL), columns.get(module, ALL)


def rank_bytes(
    config: ModelConfig, size: int, bits: Callable[[str], float], context: int = 0, itemsize: int = 2
) -> int:
    """Bytes that the fullest of `size` ranks holds: its weights, and keys and values of `context` tokens.

    bits: of one weight of the matrix `name` (4.5 for Q4_K, scales included); norms, biases and the cache take
    `itemsize` bytes an element. Raises QwenMLXError as Shard does.
    """
    most = 0
    for rank in range(size):
        shard = Shard(rank, size, config)
        total = 2 * config.num_hidden_layers * shard.local.num_key_value_heads * config.head_dim * context * itemsize
        for name, shape in config.parameter_shapes().items():
            sizes = [len(range(*part.indices(n))) for part, n in zip(shard.cut(name), shape)]
            each = bits(name) / 8 if len(shape) == 2 else itemsize
            total += round(math.prod(sizes) * each)
        most = max(most, total)
    return most


def _divides(config: ModelConfig, size: int) -> bool:
    """True if all ranks get equally many heads, and these read key/value heads of their own or a single one."""
    kv = config.num_key_value_heads
    heads_divide = config.num_attention_heads % size == 0 and (kv % size == 0 or size % kv == 0)
    last_has_rows = (size - 1) * _vocabulary_rows(config, size) < config.vocab_size
    return heads_divide and last_has_rows and _mlp_units(config)[1] >= size


def _mlp_units(config: ModelConfig) -> tuple[int, int]:
    """The MLP's width as (columns of a unit that is never cut, units): every packed format's blocks divide a unit."""
    unit = math.gcd(config.intermediate_size, ALIGNMENT)
    return unit, config.intermediate_size // unit


def _vocabulary_rows(config: ModelConfig, size: int) -> int:
    return -(-config.vocab_size // size)


def _either(counts: list[int]) -> str:
    *most, last = map(str, counts)
    return f"{', '.join(most)} or {last}" if most else last
