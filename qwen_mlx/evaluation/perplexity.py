"""Perplexity of a model on a text, and its divergence from a reference model: the cost of a quantization.

Definitions. A text of tokens t[0], t[1], ... is read in windows of `context` tokens, one every `stride` tokens, each
with a cache of its own. Every token but t[0] is scored once, in the first window that predicts it, so that all but the
first window's have at least context - stride tokens before them. The negative log-likelihood of a token is
-ln p(t[i] | those before it in the window), in nats; the perplexity is exp of its mean. The divergence at the same
positions is KL(reference || model) = sum of p_ref (ln p_ref - ln p), in nats, over the tokens that both models have.
Standard errors are those of a mean of independent values (sd / sqrt(n)), the perplexity's by the delta method;
neighbouring tokens are not quite independent, so that they are a little too small.
Source of the windows: Hugging Face's guide "Perplexity of fixed-length models", with stride < context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..backend import mx
from ..errors import QwenMLXError, check_integer, refuses_wrong_arguments
from ..generation.engine import NOT_FINITE, chunk_length, prefill
from ..model.fused import FusedModel
from ..model.qwen2 import Qwen2

CONTEXT = 1024
ROWS = 64  # positions whose logits exist at a time: 39 MB for Qwen2.5's vocabulary in float32


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Divergence:
    """Comparison with the reference: its own perplexity, KL(reference || model) in nats a token, and the share of
    positions where both have the same likeliest token."""

    reference_perplexity: Estimate
    kl: Estimate
    agreement: Estimate


@dataclass(frozen=True)
class Evaluation:
    """Results of evaluate. tokens: read; scored: those with a prediction; nll: nats a token."""

    tokens: int
    scored: int
    context: int
    stride: int
    nll: Estimate
    perplexity: Estimate
    divergence: Divergence | None = None


def mean(values: np.ndarray) -> Estimate:
    """The mean of values (n,); of one value, the error is not a number."""
    error = values.std(ddof=1) / math.sqrt(values.size) if values.size > 1 else math.nan
    return Estimate(float(values.mean()), float(error))


def exponential(estimate: Estimate) -> Estimate:
    """exp of an estimate, by the delta method."""
    with np.errstate(over="ignore"):
        value = float(np.exp(estimate.value))
    return Estimate(value, value * estimate.error)


def windows(n_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first token that is scored) of each window."""
    scored = 1
    for start in range(0, n_tokens, stride):
        end = min(start + context, n_tokens)
        if scored < end:
            yield start, end, scored
        scored = end
        if end == n_tokens:
            return


def check_windows(model: Qwen2, context: int | None, stride: int | None, name: str = "The model") -> tuple[int, int]:
    """(context, stride), by default 1024 or all that the model has, and half of it. Raises QwenMLXError."""
    longest = model.config.context_length
    context = min(CONTEXT, longest) if context is None else context
    context = check_integer("context", context, 2, math.inf, "2 tokens or more")
    if context > longest:
        fix = model.config.suggest_yarn(context).replace("shorten it", "take a smaller one")
        raise QwenMLXError(f"context is {context}, but {name} has {longest}: {fix}.")
    stride = max(1, context // 2) if stride is None else stride
    return context, check_integer("stride", stride, 1, context - 1, f"1 to {context - 1}, less than the context")


@refuses_wrong_arguments
def evaluate(
    model: Qwen2,
    ids: Sequence[int],
    *,
    reference: Qwen2 | None = None,
    context: int | None = None,
    stride: int | None = None,
    prefill_step_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of `model` on the tokens `ids`, and with `reference` the divergence from it; definitions above.

    context, stride: tokens; see check_windows. prefill_step_size: tokens read in one pass; None chooses by the device.
    Memory beyond the models' hardly grows with the text: 64 positions' logits exist at a time. progress: called with
    (tokens scored, tokens to score).
    Raises QwenMLXError for impossible arguments, fewer than 2 tokens, or logits that are not finite.
    """
    context, stride = check_windows(model, context, stride)
    if reference is not None:
        check_windows(reference, context, stride, "the reference")
    models = [each for each in (model, reference) if each is not None]
    size = min(each.config.vocab_size for each in models)
    if len(ids) < 2:
        raise QwenMLXError(f"The text has {len(ids)} tokens, expected 2 or more: the first is not predicted.")
    bad = next((i for i in ids if not 0 <= i < size), None)
    if bad is not None:
        raise QwenMLXError(f"The text holds token id {bad}, expected 0 to {size - 1}.")
    scored = [np.zeros(len(ids) - 1) for _ in range(4)]  # each token's -ln p, the reference's, KL, agreement
    for start, end, first in windows(len(ids), context, stride):
        inputs = mx.array(list(ids[start : end - 1]), mx.int32)[None]
        targets = mx.array(list(ids[first:end]), mx.int32)
        hidden = [_hidden(each, inputs, end - first, prefill_step_size) for each in models]
        for row in range(0, end - first, ROWS):
            target = targets[row : row + ROWS]
            ours = _log_softmax(_head(model, hidden[0][row : row + ROWS]))
            losses = [_losses(ours, target)]
            if reference is not None:
                other = _log_softmax(_head(reference, hidden[1][row : row + ROWS]))
                losses += [_losses(other, target), *_divergence(_first(ours, size), _first(other, size))]
            mx.eval(losses)
            done = first - 1 + row
            for values, new in zip(scored, map(np.array, losses)):
                if not np.isfinite(new).all():
                    raise QwenMLXError(NOT_FINITE)
                values[done : done + new.size] = new
            if progress:
                progress(done + target.size, len(ids) - 1)
    nll, reference_nll, kl, agreement = map(mean, scored)
    divergence = Divergence(exponential(reference_nll), kl, agreement) if reference is not None else None
    return Evaluation(len(ids), len(ids) - 1, context, stride, nll, exponential(nll), divergence)


def _hidden(model: Qwen2, inputs: mx.array, keep: int, prefill_step_size: int | None) -> mx.array:
    """The last `keep` positions' states below the head, (keep, hidden_size)."""
    skip, chunks = inputs.shape[1] - keep, []
    for hidden in prefill(FusedModel.of(model), inputs, model.make_cache(), chunk_length(1, prefill_step_size)):
        chunks.append(hidden[0, skip:])
        mx.eval(chunks[-1])
        skip = max(0, skip - hidden.shape[1])
    return mx.concatenate(chunks)


def _head(model: Qwen2, hidden: mx.array) -> mx.array:
    return model.head(hidden).astype(mx.float32)


def _sum(values: mx.array) -> mx.array:
    """Sums over the vocabulary, (L, 1), in two levels: one float32 sum of 151,936 terms would lose the small ones."""
    length, size = values.shape
    return mx.pad(values, [(0, 0), (0, -size % 512)]).reshape(length, -1, 512).sum(axis=-1).sum(axis=-1, keepdims=True)


def _log_softmax(logits: mx.array) -> mx.array:
    """ln p (L, V)."""
    top = logits.max(axis=-1, keepdims=True)
    return logits - (top + mx.log(_sum(mx.exp(logits - top))))


def _first(logp: mx.array, size: int) -> mx.array:
    """ln p among the first `size` tokens: the two models' vocabularies may be padded differently."""
    return logp if logp.shape[1] == size else _log_softmax(logp[:, :size])


def _losses(logp: mx.array, targets: mx.array) -> mx.array:
    """-ln p of each target (L,)."""
    return -mx.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]


def _divergence(ours: mx.array, theirs: mx.array) -> tuple[mx.array, mx.array]:
    """KL(reference || model), and 1 where the likeliest tokens agree, (L,) each."""
    kl = _sum(mx.exp(theirs) * (theirs - ours))[:, 0]
    return kl, (ours.argmax(-1) == theirs.argmax(-1)).astype(mx.float32)
