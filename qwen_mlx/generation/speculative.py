"""Speculative decoding: a draft proposes tokens, the model checks all of them in one pass.

The model's own choice decides every token. Greedy: a proposal is accepted where it is the likeliest token, so that the
ids are those of plain greedy decoding, up to ties within the rounding of a pass over several tokens instead of one.
Sampling: a proposal x, drawn from the draft's q, is accepted with probability min(1, p(x) / q(x)), and its replacement
is drawn from max(p - q, 0), so that tokens have exactly the model's distribution p, whatever the draft.
Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

from ..backend import mx
from ..errors import QwenMLXError
from .engine import NOT_FINITE, GenerationStats, Rows, Token
from .sampling import processed_logits, rule_out
from .settings import Draft, Proposal
from .structured import allowed as allowed_by

WINDOW = 8  # rounds that are judged together
PROBE = 16  # rounds at most without a plain step to compare with
PAUSE, LONGEST_PAUSE = 32, 1024  # tokens
SHORT = 2  # tokens proposed after a rejection: they cost a CPU hardly more than none


class Pace:
    """Decides by the clock whether drafting pays. The last 8 rounds that had a proposal make tokens at some speed,
    draft and check included; a plain step makes one in the median of its last 8 times, of which one at least is made in
    every 16 rounds. Where rounds are slower, drafting pauses for 32 tokens, and for twice as many each time again.
    """

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=WINDOW)
        self._rounds: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._since_plain = 0
        self._pause = PAUSE
        self._sizes: set[int] = set()

    @property
    def wants_plain(self) -> bool:
        """True where the next step should be a plain one, to compare with."""
        return self._since_plain >= (PROBE if self._plain else 2)

    def plain(self, seconds: float) -> None:
        """Counts a step without a proposal."""
        self._plain.append(seconds)
        self._since_plain = 0

    def round(self, proposed: int, tokens: int, seconds: float) -> None:
        """Counts a round that checked `proposed` tokens and made `tokens`."""
        self._since_plain += 1
        if proposed in self._sizes:
            self._rounds.append((tokens, seconds))
        self._sizes.add(proposed)  # the first of each size may compile kernels

    def pause(self) -> int:
        """Tokens to decode plainly now, 0 while drafting pays."""
        if len(self._rounds) < WINDOW or not self._plain:
            return 0
        tokens, seconds = (sum(column) for column in zip(*self._rounds))
        if tokens * statistics.median(self._plain) >= seconds:
            self._pause = PAUSE
            return 0
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self._rounds.clear()
        return pause


def drafted_steps(
    rows: Rows, draft: Draft, ids: list[int], stats: GenerationStats, clock: Callable[[], float] = time.perf_counter
) -> Iterator[Token]:
    """The tokens of engine.plain_steps, faster where the draft guesses well.

    ids: the text so far, which grows. stats: gets drafted_tokens, accepted_tokens and paused_tokens. clock: seconds,
    for Pace. After a proposal that was accepted completely, num_draft_tokens are proposed, else 2.
    """
    settings, pace = rows.settings, Pace()
    most, left = settings.num_draft_tokens or draft.num_draft_tokens, settings.max_tokens
    count = min(SHORT, most)
    tokens = rows.step(ahead=False)
    while True:
        for token in tokens:
            ids.append(token.id)
            left -= 1
            yield token
        pause = pace.pause()
        for remaining in range(pause, 0, -1):
            begin = clock()
            (token,) = rows.step(ahead=remaining > 1)
            pace.plain(clock() - begin)
            stats.paused_tokens += 1
            ids.append(token.id)
            left -= 1
            yield token
        count = min(SHORT, most) if pause else count
        begin = clock()
        proposal = Proposal([])
        if left > 1 and not pace.wants_plain:  # nothing is proposed beyond max_tokens
            proposal = draft.propose(ids, min(count, left - 1), settings.sampling, rows.next_key())
        if not proposal.ids:
            tokens = rows.step(ahead=False)
            pace.plain(clock() - begin)
            continue
        tokens = verify(rows, ids[-1], proposal)
        proposed, accepted = len(proposal.ids), len(tokens) - 1
        pace.round(proposed, len(tokens), clock() - begin)
        stats.drafted_tokens += proposed
        stats.accepted_tokens += accepted
        count = most if accepted == proposed else min(SHORT, most)


def verify(rows: Rows, last: int, proposal: Proposal) -> list[Token]:
    """The proposals that are accepted, and one token more, by one pass over `last`, the row's newest token, and them.

    Raises QwenMLXError if the logits are not finite.
    """
    state, settings, sampling = rows.state, rows.settings, rows.settings.sampling
    vocab_size = rows.model.config.vocab_size
    # A draft may have tokens for which the model has no row. Such a proposal is judged, and rejected, but not read.
    length = next((i for i, token in enumerate(proposal.ids) if token >= vocab_size), len(proposal.ids))
    inputs = mx.array([[last, *proposal.ids[:length]]], mx.int32)
    logits = rows.fused(inputs, state.cache, logits_to_keep=0)[0].astype(mx.float32)
    if not mx.isfinite(logits.sum()).item():
        raise QwenMLXError(NOT_FINITE)
    ids: list[int] = []
    seen, (matcher,) = state.seen, state.matchers
    for i, proposed in zip(range(length + 1), [*proposal.ids, None]):
        allowed = logits[i : i + 1]
        if matcher is not None:
            matcher.accept(ids[-1] if ids else last)
            allowed = allowed_by(allowed, [matcher.mask()])
        if state.generated[0] + i < settings.min_tokens:
            allowed = rule_out(allowed, settings.eos_token_ids)
        allowed = processed_logits(
            allowed,
            sampling,
            seen,
            n_prompt=state.n_prompt,
            eos_token_ids=settings.eos_token_ids,
            xtc_key=rows.next_key(),  # before the choice, so that accepted tokens and replacements are alike
        )
        if sampling.greedy:
            token = int(mx.argmax(allowed))
        else:
            q = proposal.distributions[i] if proposal.distributions and proposed is not None else None
            token = accept_or_draw(allowed, proposed, q, rows.next_key())
        ids.append(token)
        if token != proposed:
            break
        if seen is not None:
            seen = mx.concatenate([seen, mx.array([[token]], mx.int32)], axis=1)
    for layer in state.cache:
        layer.trim(length + 1 - len(ids))
    tokens = rows.accept(ids, logits[: len(ids)])
    if matcher is not None:
        tokens[-1].error, tokens[-1].closing = matcher.error, matcher.closing
    return tokens


def accept_or_draw(logits: mx.array, proposed: int | None, q: mx.array | None, key: mx.array) -> int:
    """A token with the distribution softmax(logits), (1, V): `proposed` if it is accepted, else its replacement.

    q: (1, V') the distribution that `proposed` was drawn from; None if it was certain.
    """
    accept, draw = mx.random.split(key)
    if proposed is None:
        return int(mx.random.categorical(logits, key=draw))
    p = mx.softmax(logits, axis=-1)
    size = p.shape[-1]
    if q is None:
        q = (mx.arange(size) == proposed)[None].astype(mx.float32)
    elif q.shape[-1] < size:  # the vocabulary is the same, but embeddings may have rows of padding
        q = mx.pad(q, [(0, 0), (0, size - q.shape[-1])])
    if proposed < size and (mx.random.uniform(key=accept) * q[0, proposed] < p[0, proposed]).item():
        return proposed
    rest = mx.maximum(p - q[:, :size], 0)
    # Nothing is left only where p and q agree up to rounding: then p itself is the answer.
    rest = mx.where(rest.sum() > 0, rest, p)
    return int(mx.random.categorical(mx.log(rest), key=draw))
