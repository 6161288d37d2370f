"""score(): the scores of a classifier, a reranker or a reward model; step_scores(): of a process reward model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..backend import mx
from ..errors import QwenMLXError, refuses_wrong_arguments
from .embed import BATCH_SIZE, at, batches
from .encoder import Encoder, Text

STEP = "<extra_0>"  # after each step of a solution, for Qwen2.5-Math-PRM


@refuses_wrong_arguments
def score(encoder: Encoder, texts: Sequence[Text], *, batch_size: int = BATCH_SIZE) -> np.ndarray:
    """Scores before any softmax, float32 (texts, labels), as transformers' logits; encoder.settings.labels names them.

    encoder: of load_encoder(), with a classification or reward head. texts: texts, pairs of texts (a query and a
    document, for a reranker), or conversations. The last token decides, trailing padding tokens left out.
    Raises QwenMLXError for a model without a head or with one for each token, an empty text and one beyond the model's
    context.
    """
    _require_head(encoder)
    if encoder.settings.scores_tokens:
        raise QwenMLXError("the model scores single tokens and no whole text; take step_scores (score --steps TOKEN).")
    rows: dict[int, np.ndarray] = {}
    pad = encoder.settings.pad_token_id
    for numbers, hidden, lengths in batches(encoder, texts, batch_size):
        last = lengths - 1
        if pad is not None:
            last = mx.array([_last_but_padding(encoder.token_ids(texts[i]), pad) for i in numbers], mx.int32)
        rows |= dict(zip(numbers, np.array(encoder.scores(at(hidden, last)).astype(mx.float32))))
    return np.stack([rows[i] for i in range(len(texts))]) if rows else np.empty((0, 0), np.float32)


@refuses_wrong_arguments
def step_scores(
    encoder: Encoder, texts: Sequence[Text], *, step: str = STEP, batch_size: int = BATCH_SIZE
) -> list[np.ndarray]:
    """The probability that each step of a solution is right, float32 (steps,) for each text.

    encoder: a process reward model's, which has two labels. step: the token that ends a step.
    Raises QwenMLXError for a model without a head, a token that it lacks, and as score() does.
    """
    _require_head(encoder)
    token = encoder.tokenizer.special.get(step)
    if token is None:
        raise QwenMLXError(f"step is {step!r}, expected a token of the model's vocabulary such as {STEP!r}.")
    rows: dict[int, np.ndarray] = {}
    for numbers, hidden, _ in batches(encoder, texts, batch_size):
        right = mx.softmax(encoder.scores(hidden).astype(mx.float32), axis=-1)[..., 1]
        for row, i in enumerate(numbers):
            places = np.flatnonzero(np.array(encoder.token_ids(texts[i])) == token)
            rows[i] = np.array(right[row])[places]
    return [rows[i] for i in range(len(texts))]


def _require_head(encoder: Encoder) -> None:
    if not encoder.has_scores:
        raise QwenMLXError("the model has no classification or reward head, so it gives no scores; embed with it.")


def _last_but_padding(ids: list[int], pad: int) -> int:
    return max((i for i, token in enumerate(ids) if token != pad), default=0)
