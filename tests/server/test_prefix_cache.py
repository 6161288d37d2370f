"""The prefix cache: what it gives is what was computed, and it stays within its bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mlx.backend import mx
from qwen_mlx.model.cache import KVCache
from qwen_mlx.server.prefix_cache import SMALLEST, PrefixCache

LAYERS, HEADS, DIM = 2, 2, 4
TOKEN = LAYERS * 2 * HEADS * DIM * 4  # bytes
IDS = st.lists(st.integers(0, 1), min_size=1, max_size=40)


def computed(ids: list[int]) -> list[KVCache]:
    """Caches in which a token's keys and values say which tokens came before it."""
    sums = np.cumsum([(i + 1) * (token + 2) for i, token in enumerate(ids)]).astype(np.float32)
    caches = []
    for layer in range(LAYERS):
        cache = KVCache()
        cache.fill(mx.array(np.broadcast_to(sums[None, None, :, None] + layer, (1, 2 * HEADS, len(ids), DIM))))
        cache.reserve(len(ids))
        caches.append(cache)
    return caches


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(IDS, max_size=12), room=st.integers(0, 200))
def test_what_comes_back_was_computed_from_the_same_tokens(texts: list[list[int]], room: int):
    cache = PrefixCache(room * TOKEN)
    for ids in texts:
        hit = cache.longest(ids)
        if hit is not None:
            length = hit[0].offset
            assert SMALLEST <= length < len(ids)
            for mine, right in zip(hit, computed(ids[:length])):
                np.testing.assert_array_equal(np.array(mine.state[0]), np.array(right.state[0]))
        cache.add(ids, computed(ids))
        assert cache.nbytes <= cache.max_bytes
        if SMALLEST < len(ids) <= room:
            again = cache.longest(ids)
            assert again is not None
            assert again[0].offset == len(ids) - 1, "what was added last is known"


def test_the_longest_unused_leaves_first():
    first, second, third = ([token] * 30 for token in (1, 2, 3))
    cache = PrefixCache(60 * TOKEN)
    for ids in (first, second):
        cache.add(ids, computed(ids))
    assert cache.longest(first) is not None
    cache.add(third, computed(third))
    assert cache.longest(second) is None
    assert cache.longest(first) is not None
    assert len(cache) == 2


def test_a_text_that_goes_on_takes_the_place_of_its_beginning():
    cache = PrefixCache(10**6)
    for length in (20, 30, 40, 35):
        cache.add(list(range(length)), computed(list(range(length))))
        assert len(cache) == 1
    assert cache.nbytes == 40 * TOKEN


def test_an_entry_is_not_changed_by_those_who_continue_it():
    ids = list(range(30))
    cache = PrefixCache(10**6)
    cache.add(ids, computed(ids))
    layer = cache.longest(ids)[0]
    layer.update(mx.ones((1, 5, 2, HEADS, DIM)))
    layer.trim(20)
    layer.update(mx.ones((1, 9, 2, HEADS, DIM)))
    right = np.array(computed(ids)[0].state[0][:, :, :29])
    np.testing.assert_array_equal(np.array(cache.longest(ids)[0].state[0]), right)


def test_layers_that_hold_less_than_the_ids_are_kept_as_far():
    cache = PrefixCache(10**6)
    cache.add(list(range(30)), computed(list(range(20))))
    assert cache.longest(list(range(30)))[0].offset == 20
