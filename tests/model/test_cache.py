"""Key/value caches: against a plain cache with an explicit mask, mlx-lm's rotating cache, and what was stored."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from qwen_mlx import load, ops, stream_generate
from qwen_mlx.backend import mx
from qwen_mlx.cli.generate import main
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.model.batch_cache import BatchKVCache, Padding
from qwen_mlx.model.cache import BLOCK, STEP, KVCache, QuantizedKVCache, RotatingKVCache, make_caches
from reference.lazy import mlx_lm_cache, torch
from reference.small_models import TOKENS, RandomModel, to_hf, write_gguf
from tests.helpers.attending import attend
from tests.helpers.cases import each

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 64, 0.125


def drawn(length: int, seed: int, batch: int = 1) -> tuple[mx.array, mx.array]:
    """q and kv of `length` tokens."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, length, HEADS, DIM)).astype(np.float32)
    kv = rng.standard_normal((batch, length, 2, KV_HEADS, DIM)).astype(np.float32)
    return mx.array(q), mx.array(kv)


def expected(q: mx.array, kv: mx.array, start: int, seen: np.ndarray) -> np.ndarray:
    """Attention of queries from `start` on, in float64, where `seen` (queries, keys) says so."""
    q, kv = np.array(q, np.float64)[:, start:], np.array(kv, np.float64)
    keys, values = (np.repeat(kv[:, :, i], HEADS // KV_HEADS, axis=2) for i in (0, 1))
    scores = np.where(seen[start:], SCALE * np.einsum("blhd,bshd->bhls", q, keys), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhls,bshd->blhd", weights / weights.sum(-1, keepdims=True), values)


def visible(length: int, max_size: int | None = None, sinks: int = 0, window: int | None = None) -> np.ndarray:
    """Which keys a query sees, written down from the definition."""
    return np.array(
        [
            [
                key <= query
                and (max_size is None or key < sinks or key > query - (max_size - sinks))
                and (window is None or key > query - window)
                for key in range(length)
            ]
            for query in range(length)
        ]
    )


def fed(cache: KVCache, q: mx.array, kv: mx.array, pieces: list[int], window: int | None = None) -> np.ndarray:
    """The cache's answers for tokens that come in `pieces`."""
    out, at = [], 0
    for size in pieces:
        out.append(attend(cache, q[:, at : at + size], kv[:, at : at + size], SCALE, window))
        at += size
    assert at == q.shape[1] == cache.offset
    return np.array(mx.concatenate(out, axis=1))


PIECES = [[40], [1] * 40, [7, 1, 1, 20, 1, 10], [12, 13, 15], [16] + [1] * 24, [39, 1]]


@each("pieces", PIECES, ids=str)
@each("window", [None, 5])
@each(("max_size", "sinks"), [(None, 0), (16, 4), (16, 0), (9, 8), (40, 4), (64, 4)])
def test_every_query_sees_what_the_definition_says(pieces, window, max_size, sinks):
    q, kv = drawn(40, 1, batch=2)
    cache = KVCache() if max_size is None else RotatingKVCache(max_size, sinks)
    out = fed(cache, q, kv, pieces, window)
    np.testing.assert_allclose(out, expected(q, kv, 0, visible(40, max_size, sinks, window)), atol=3e-6)


def test_rotating_as_mlx_lm_does():
    q, kv = drawn(60, 2)
    ours, peer = RotatingKVCache(16, 4), mlx_lm_cache.RotatingKVCache(16, keep=4)
    for at, size in [(0, 9), (9, 1)] + [(at, 1) for at in range(10, 60)]:
        new = kv[:, at : at + size]
        out = attend(ours, q[:, at : at + size], new, SCALE)
        keys, values = peer.update_and_fetch(new[:, :, 0].swapaxes(1, 2), new[:, :, 1].swapaxes(1, 2))
        mask = "causal" if size > 1 else None
        other = mx.fast.scaled_dot_product_attention(
            q[:, at : at + size].swapaxes(1, 2), keys, values, scale=SCALE, mask=mask
        )
        np.testing.assert_allclose(out, other.swapaxes(1, 2), atol=3e-6)
        assert set(map(bytes, np.array(keys[0, 0]))) == set(map(bytes, np.array(ours.state[0][0, 0])))


def test_rotating_memory_is_bounded():
    q, kv = drawn(1200, 3)
    cache = RotatingKVCache(300)
    fed(cache, q, kv, [500, 200] + [1] * 20 + [480])
    assert cache.size == 300
    assert cache.nbytes == 300 * 2 * KV_HEADS * DIM * 4


def test_rotating_takes_back_the_newest_token_exactly_and_no_more():
    q, kv = drawn(30, 4)
    wrong_q, wrong_kv = drawn(1, 5)
    cache = RotatingKVCache(16, 4)
    fed(cache, q[:, :12], kv[:, :12], [12])
    attend(cache, wrong_q, wrong_kv, SCALE)
    cache.trim(1)  # nothing is lost before it is full
    cache.trim(3)
    out = [attend(cache, q[:, 9:20], kv[:, 9:20], SCALE)]
    for at in range(20, 30):
        attend(cache, wrong_q, wrong_kv, SCALE)
        cache.trim(1)
        out.append(attend(cache, q[:, at : at + 1], kv[:, at : at + 1], SCALE))
    np.testing.assert_allclose(mx.concatenate(out, axis=1), expected(q, kv, 9, visible(30, 16, 4)), atol=3e-6)
    assert not cache.can_trim(2)
    with pytest.raises(QwenMLXError, match="Cannot trim 2 tokens from a rotating cache of 16 after 30"):
        cache.trim(2)
    cache.trim(1)
    with pytest.raises(QwenMLXError, match="Cannot trim 1 tokens"):
        cache.trim(1)


def stored(kv: mx.array, bits: int) -> np.ndarray:
    """Keys and values as codes of `bits` bits can hold them, by mx.quantize on each block and token."""
    keys, values = kv[:, :, 0], kv[:, :, 1]
    keys = keys.transpose(0, 2, 3, 1)  # each channel over the tokens of a block
    return np.stack(
        [
            np.array(mx.dequantize(*mx.quantize(part, BLOCK, bits), group_size=BLOCK, bits=bits)).transpose(order)
            for part, order in ((keys, (0, 3, 1, 2)), (values, (0, 1, 2, 3)))
        ],
        axis=2,
    )


@pytest.mark.heavy
@each("bits", [8, 4])
@each("pieces", [[300], [1] * 300, [70, 1, 1, 128, 60, 40], [127, 1, 172], [64, 64, 172]], ids=len)
def test_quantized_holds_old_blocks_in_bits_and_the_newest_in_floats(pieces, bits):
    q, kv = drawn(300, 6, batch=2)
    cache = QuantizedKVCache(bits)
    for window in (None,) if len(pieces) > 200 else (None, 90):
        cache = QuantizedKVCache(bits)
        out = fed(cache, q, kv, pieces, window)
        mixed = np.array(kv)
        mixed[:, : 3 * BLOCK] = stored(kv[:, : 3 * BLOCK], bits)
        keys, values = cache.state
        np.testing.assert_array_equal(keys.swapaxes(1, 2), mixed[:, :, 0])
        np.testing.assert_array_equal(values.swapaxes(1, 2), mixed[:, :, 1])
        error = abs(out - expected(q, kv, 0, visible(300, window=window))).max()
        assert error < {8: 0.02, 4: 0.3}[bits]
        last = expected(q, mx.array(mixed), 299, visible(300, window=window))
        if pieces[-1] == 1:
            np.testing.assert_allclose(out[:, 299:], last, atol=3e-6)


@each("left", [0, 1, 63, 64, 65, 192, 193, 255, 299, 300])
def test_quantized_is_trimmed_anywhere(left):
    q, kv = drawn(300, 7)
    cache, again = QuantizedKVCache(8), drawn(150, 8)
    fed(cache, q, kv, [300])
    before = [np.array(part) for part in cache.state]
    cache.trim(300 - left)
    if left:
        for part, old in zip(cache.state, before):
            np.testing.assert_array_equal(part, old[:, :, :left])
    out = attend(cache, *again, SCALE)
    whole = [mx.concatenate([first[:, :left], more], axis=1) for first, more in zip((q, kv), again)]
    np.testing.assert_allclose(out, expected(*whole, left, visible(left + 150)), atol=0.02)
    assert cache.offset == left + 150


def test_bytes_that_a_quantized_cache_saves():
    _, kv = drawn(4096, 9)
    plain = KVCache()
    plain.update(kv)
    for bits, share in ((8, 0.30), (4, 0.18)):
        cache = QuantizedKVCache(bits)
        cache.update(kv)
        assert cache.nbytes < share * plain.nbytes


def test_the_buffer_grows_rarely_and_is_made_once_where_its_size_is_said():
    _, kv = drawn(1, 10)
    cache, sizes = KVCache(), set()
    for _ in range(40 * STEP):
        cache.update(kv)
        sizes.add(cache.nbytes)
        mx.eval(cache.arrays)
    assert len(sizes) < 30
    assert cache.nbytes <= (1 + 1 / 16) * 40 * STEP * 2 * KV_HEADS * DIM * 4 + STEP * 2 * KV_HEADS * DIM * 4
    cache = KVCache()
    cache.reserve(1000)
    for _ in range(4):
        cache.update(mx.repeat(kv, 250, axis=1))
        assert cache.nbytes == 4 * STEP * 2 * KV_HEADS * DIM * 4


@each(
    ("arguments", "message"),
    [
        ({"bits": 3}, "bits are 3, expected 8 or 4"),
        ({"bits": True}, "bits are True"),
        ({"max_size": 4}, "max_size is 4, expected more than the 4 first tokens that it keeps"),
        ({"max_size": 0}, "max_size is 0"),
        ({"max_size": 8, "n_sinks": -1}, "n_sinks is -1"),
        ({"max_size": 512, "bits": 8}, "at most 512 tokens cannot be held in 8 bits"),
        ({"head_dim": 80, "bits": 8}, "heads have 80 elements, which no group"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused(arguments, message):
    with pytest.raises(QwenMLXError, match=message):
        make_caches(2, arguments.pop("head_dim", 64), **arguments)


def test_kinds():
    assert [type(cache) for cache in make_caches(2, 64)] == [KVCache, KVCache]
    assert type(make_caches(1, 64, max_size=9)[0]) is RotatingKVCache
    assert type(make_caches(1, 128, bits=4)[0]) is QuantizedKVCache
    with pytest.raises(ValueError, match="empty"):
        _ = QuantizedKVCache().state


@each("window", [None, 30])
@each("dtype", [mx.float32, mx.bfloat16])
def test_a_long_chunk_is_attended_to_in_slices(dtype, window, monkeypatch):
    """Whose last is shorter, or that hold one query each; padding masks are cut too."""
    attention = importlib.import_module("qwen_mlx.ops.attention")
    q, kv = drawn(50, 11, batch=2)
    wanted = expected(q, kv, 0, visible(50, window=window))
    for size in (1, 50 * 2 * HEADS * 7):
        monkeypatch.setattr(attention, "SCORES", size)
        for cache in (KVCache(), BatchKVCache(Padding([0, 0]))):
            out = attend(cache, q.astype(dtype), kv.astype(dtype), SCALE, window)
            assert out.dtype == dtype
            atol = 3e-6 if dtype == mx.float32 else 0.02
            np.testing.assert_allclose(out.astype(mx.float32), wanted, atol=atol)


@pytest.mark.heavy
def test_memory_of_a_chunk_does_not_follow_the_context():
    """The scores of 512 queries on 16,384 keys are 200 MB for these heads, and each is there three times: 800 MB."""
    q, kv = drawn(512, 12)
    cache, (_, long) = KVCache(), drawn(1, 13)
    cache.update(mx.repeat(long, 16384, axis=1))
    mx.eval(q, kv, cache.arrays)
    mx.reset_peak_memory()
    before = mx.get_active_memory()  # other tests' models among it
    mx.eval(ops.attention(q, *cache.state, SCALE, "causal"))
    assert mx.get_peak_memory() - before < 100e6  # 56 MB; 258 where slices do not wait for each other


@pytest.fixture(scope="module")
def weights():
    return RandomModel(3, hidden_size=128, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)


@pytest.fixture(scope="module")
def small(weights, tmp_path_factory: pytest.TempPathFactory):
    return load(write_gguf(tmp_path_factory.mktemp("cache") / "m.gguf", weights))


@pytest.fixture(scope="module")
def theirs(weights, small):
    return to_hf(weights)


@pytest.mark.parametrize("pieces", [[90], [1] * 90, [10, 1, 1, 30, 1, 47]], ids=len)
def test_rotating_model_equals_transformers_with_the_mask_written_out(small, theirs, pieces):
    model, _ = small
    ids = np.random.default_rng(1).integers(0, len(TOKENS), (1, 90))
    seen = torch.tensor(visible(90, 24, 4))
    with torch.no_grad():
        mask = torch.where(seen, 0.0, float("-inf"))[None, None]
        wanted = theirs(torch.tensor(ids), attention_mask=mask).logits.numpy()
    cache, out, at = model.make_cache(max_size=24), [], 0
    for size in pieces:
        out.append(model(mx.array(ids[:, at : at + size]), cache))
        at += size
    np.testing.assert_allclose(mx.concatenate(out, axis=1), wanted, atol=2e-4)


@each("kind", [{}, {"max_size": 512}, {"max_size": 50}, {"bits": 8}], ids=str)
def test_generation_continues_on_every_kind_of_cache(small, kind):
    """The token loop runs a step ahead and takes it back: what follows is as if all had been one prompt."""
    model, tokenizer = small
    prompt, more = [5, 9, 200, 31] * 30, [7, 8, 9]

    def answer(ids, count, cache):
        return [
            chunk.token
            for chunk in stream_generate(model, tokenizer, ids, max_tokens=count, cache=cache, temperature=0)
        ]

    cache = model.make_cache(**kind)
    first = answer(prompt, 9, cache)
    assert {layer.offset for layer in cache} == {len(prompt) + 8}
    second = answer([first[-1], *more], 20, cache)
    assert cache[0].size == min(len(prompt) + 9 + 3 + 19, kind.get("max_size", 10**6))
    assert second == answer([*prompt, *first, *more], 20, model.make_cache(**kind))
    assert (second == answer([*prompt, *first, *more], 20, None)) == (kind != {"max_size": 50})


@each(
    ("arguments", "message"),
    [
        (["--kv-bits", "8", "--max-kv-size", "99"], "at most 99 tokens cannot be held in 8 bits"),
        (["--max-kv-size", "4"], "--max-kv-size is 4, expected more than the 4 first tokens"),
        (["--max-kv-size", "99", "--draft-model", "prompt-lookup"], "RotatingKVCache cannot take back"),
        (["--kv-bits", "4", "--prompt-cache", "x"], "leave out --kv-bits"),
    ],
    ids=" ".join,
)
def test_command_line_refuses_before_the_model_is_read(tmp_path, arguments, message):
    (tmp_path / "m.gguf").write_bytes(b"not a model")
    with pytest.raises(QwenMLXError, match=message):
        main(["--model", str(tmp_path / "m.gguf"), "--prompt", "hello", *arguments])


@pytest.mark.parametrize("arguments", [["--kv-bits", "8"], ["--max-kv-size", "20"]], ids=" ".join)
def test_command_line_generates(arguments, theirs, tmp_path, capsys):
    path = write_gguf(tmp_path / "m.gguf", theirs)
    assert main(["--model", str(path), "--prompt", "hello", "--temp", "0", "--max-tokens", "30", *arguments]) == 0
    assert "generation: 30 tokens" in capsys.readouterr().err
