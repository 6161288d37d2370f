"""embed(): a vector of each text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ..backend import mx
from ..errors import QwenMLXError, check_integer, refuses_wrong_arguments
from .encoder import Encoder, Text

BATCH_SIZE = 16


@refuses_wrong_arguments
def embed(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    prompt: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    dimensions: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> np.ndarray:
    """Vectors of texts, float32 (texts, hidden_size or dimensions).

        vectors = embed(encoder, ["What is MLX?", "An array framework."])

    encoder: of load_encoder().
    prompt: put before each text; a name among the model's own prompts stands for that one; None: the model's default.
    pooling: "last", "mean", "first" or "max" over the tokens; None: as the model's modules.json says, else "last".
    normalize: to length 1; None: as modules.json says, else True.
    dimensions: only the first ones, normalised again where `normalize` (Matryoshka representations).
    batch_size: texts computed together.

    Raises QwenMLXError for a wrong argument, an empty text and one beyond the model's context.
    """
    settings = encoder.settings if pooling is None else replace(encoder.settings, pooling=pooling)
    if isinstance(texts, str):
        raise QwenMLXError("texts is one text, expected a list of them.")
    name = settings.default_prompt if prompt is None else prompt
    before = settings.prompts.get(name or "", name or "")
    unit = settings.normalize if normalize is None else normalize
    size = encoder.dense[-1].linear.weight.shape[0] if encoder.dense else encoder.config.hidden_size
    if dimensions is not None:
        check_integer("dimensions", dimensions, 1, size, f"1 to {size}")
    rows: dict[int, np.ndarray] = {}
    for numbers, hidden, lengths in batches(encoder, [before + text for text in texts], batch_size):
        vectors = _POOL[settings.pooling](hidden.astype(mx.float32), lengths)
        for projection in encoder.dense:
            vectors = projection(vectors.astype(projection.linear.weight.dtype)).astype(mx.float32)
        vectors = vectors[:, :dimensions]
        if unit:
            vectors = vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        rows |= dict(zip(numbers, np.array(vectors)))
    return np.stack([rows[i] for i in range(len(texts))]) if rows else np.empty((0, dimensions or size), np.float32)


def batches(encoder: Encoder, texts: Sequence[Text], batch_size: int) -> Iterator[tuple[list[int], mx.array, mx.array]]:
    """Texts computed together: their numbers, hidden states (B, L, hidden_size) and lengths int32 (B,).

    A causal model's texts are padded on the right, which no token before sees; a bidirectional one's are as long as one
    another.
    """
    check_integer("batch_size", batch_size, 1, 2**31, "a positive integer")
    ids = [encoder.token_ids(text) for text in texts]
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    while order:
        take = order[:batch_size]
        if not encoder.config.is_causal:
            take = [i for i in take if len(ids[i]) == len(ids[take[0]])]
        order = order[len(take) :]
        longest = len(ids[take[-1]])
        padded = mx.array([ids[i] + [0] * (longest - len(ids[i])) for i in take])
        hidden = encoder.hidden(padded)
        mx.eval(hidden)
        yield take, hidden, mx.array([len(ids[i]) for i in take], mx.int32)


def at(hidden: mx.array, positions: mx.array) -> mx.array:
    """Hidden states (B, hidden_size) of one position (B,) of each row."""
    return mx.take_along_axis(hidden, positions[:, None, None], axis=1)[:, 0]


def _padded_with(value: float, hidden: mx.array, lengths: mx.array) -> mx.array:
    """Hidden states with `value` in place of those beyond each row's length."""
    within = mx.arange(hidden.shape[1])[None] < lengths[:, None]
    return mx.where(within[..., None], hidden, value)


# By POOLINGS' names: vectors (B, hidden_size) of hidden states (B, L, hidden_size) and lengths (B,).
_POOL = {
    "last": lambda hidden, lengths: at(hidden, lengths - 1),
    "mean": lambda hidden, lengths: _padded_with(0, hidden, lengths).sum(axis=1) / lengths[:, None],
    "first": lambda hidden, lengths: hidden[:, 0],
    "max": lambda hidden, lengths: _padded_with(-mx.inf, hidden, lengths).max(axis=1),
}
