"""Sampling functions against transformers' processors and warpers, value by value, and at the edges."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwen_mlx import QwenMLXError, SamplingSettings, load, stream_generate
from qwen_mlx.backend import mx
from qwen_mlx.generation.sampling import (
    count_penalties,
    log_probabilities,
    min_p,
    no_repeat_ngrams,
    penalized,
    processed_logits,
    repetition_penalty,
    rule_out,
    sample,
    top_k_candidates,
    top_p,
    typical_p,
    xtc,
)
from reference.lazy import mlx_lm, mlx_lm_sample_utils, torch, transformers
from reference.small_models import RandomModel, save_folder
from tests.helpers.cases import each

RNG = np.random.default_rng(3)
LOGITS = (RNG.standard_normal((4, 500)) * 4).astype(np.float32)
IDS = RNG.integers(0, 500, (4, 30))


def same(ours: mx.array, theirs: torch.Tensor) -> None:
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=1e-6, atol=0)


@each("p", [0.05, 0.5, 0.8, 0.95, 0.9999])
def test_top_p(p: float):
    same(top_p(mx.array(LOGITS), p), transformers.TopPLogitsWarper(p)(None, torch.from_numpy(LOGITS)))


@each("p", [0.001, 0.05, 0.3, 0.99])
def test_min_p(p: float):
    same(min_p(mx.array(LOGITS), p), transformers.MinPLogitsWarper(p)(None, torch.from_numpy(LOGITS)))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 6), st.integers(1, 64), st.integers(0, 20))
def test_top_p_of_equal_tokens_keeps_the_fewest_that_reach_p(log2: int, kept: int, others: int):
    """Probabilities of 2^-n, whose sums are exact, so that p is reached and not passed; `others` are ruled out."""
    n = 2**log2
    kept = min(kept, n)
    logits = mx.array([[1.5] * n + [-math.inf] * others])
    assert int((top_p(logits, kept / n) == 1.5).sum()) == kept
    if kept < n:
        assert int((top_p(logits, (kept + 0.5) / n) == 1.5).sum()) == kept + 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-8, 8), min_size=1, max_size=40), st.floats(0.01, 1))
def test_top_p_and_min_p_are_their_definitions(values: list[int], p: float):
    """Logits of which many are equal: of tokens alike only their number is defined."""
    logits = mx.array([values], mx.float32) / 2
    exact = np.exp(np.array(values) / 2)
    falling = np.sort(exact / exact.sum())[::-1]
    before = np.cumsum(falling) - falling
    assume(np.abs(before - p).min() > 1e-5)
    left = np.array(top_p(logits, p))[0]
    assert (
        sorted(left[left > -math.inf], reverse=True) == sorted(np.array(values) / 2, reverse=True)[: (before < p).sum()]
    )
    assume(np.abs(exact - p * exact.max()).min() > 1e-5 * exact.max())
    np.testing.assert_array_equal(np.array(min_p(logits, p))[0] > -math.inf, exact > p * exact.max())


@each("p", [1e-3, 0.05, 0.3, 1.0])
def test_min_p_keeps_a_token_exactly_at_the_limit(p: float):
    limit = np.float32(math.log(p))
    logits = np.array([[0, limit, np.nextafter(limit, np.float32(-9)), 0]], np.float32)
    assert (np.array(min_p(mx.array(logits), p))[0] > -math.inf).tolist() == [True, True, False, True]


@pytest.mark.parametrize("penalty", [0.5, 1.05, 1.3])
def test_repetition_penalty(penalty: float):
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.from_numpy(IDS), torch.from_numpy(LOGITS.copy())
    )
    same(repetition_penalty(mx.array(LOGITS), mx.array(IDS), penalty), theirs)


@each("p", [0.01, 0.2, 0.5, 0.9, 0.9999])
def test_typical_p(p: float):
    logits = np.concatenate([LOGITS, [[5.0] * 500, [9.0] + [-np.inf] * 499]]).astype(np.float32)
    # transformers' -inf * 0 is NaN, which its nansum leaves out.
    same(typical_p(mx.array(logits), p), transformers.TypicalLogitsWarper(p)(None, torch.from_numpy(logits)))


@each("n", [1, 2, 3, 5, 31])
def test_no_repeat_ngram(n: int):
    ids = np.random.default_rng(n).integers(0, 3, (4, 30))  # few tokens, so that runs repeat
    theirs = transformers.NoRepeatNGramLogitsProcessor(n)(torch.from_numpy(ids), torch.from_numpy(LOGITS.copy()))
    assert n > 5 or torch.isinf(theirs).any()
    same(no_repeat_ngrams(mx.array(LOGITS), mx.array(ids), n), theirs)


def test_presence_and_frequency_penalties_by_their_definition():
    counts = np.zeros(LOGITS.shape)
    for row, ids in enumerate(IDS):
        np.add.at(counts[row], ids, 1)
    expected = LOGITS - 0.7 * (counts > 0) - 0.3 * counts
    found = count_penalties(mx.array(LOGITS), mx.array(IDS), 0.7, 0.3)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-6, atol=1e-6)
    assert counts.max() > 1


def test_presence_and_frequency_look_at_what_was_generated_alone():
    settings = SamplingSettings(presence_penalty=1.0)
    ids = mx.array([[3, 4, 5]])
    found = np.array(penalized(mx.array(LOGITS[:1]), settings, ids, n_prompt=2))
    assert (np.flatnonzero(found[0] != LOGITS[0]) == [5]).all()


@each("threshold", [0.01, 0.05, 0.2, 0.5])
def test_xtc_is_mlx_lm_s(threshold: float):
    from mlx_lm.sample_utils import apply_xtc

    keep = mx.zeros(LOGITS.shape, mx.bool_)
    keep[:, 7] = True
    theirs = apply_xtc(mx.array(LOGITS), 1.0, threshold, [7])
    found = xtc(mx.array(LOGITS), threshold, 1.0, keep, mx.random.key(1))
    assert mx.array_equal(found, theirs)
    never = xtc(mx.array(LOGITS), threshold, 0.0, keep, mx.random.key(1))
    assert mx.array_equal(never, mx.array(LOGITS))


def test_xtc_is_applied_as_often_as_asked():
    logits = mx.array(np.tile([[3.0, 2.9, -5.0]], (4000, 1)).astype(np.float32))
    out = xtc(logits, 0.1, 0.3, mx.zeros(logits.shape, mx.bool_), mx.random.key(5))
    share = float((out[:, 0] == -mx.inf).mean())
    assert abs(share - 0.3) < 0.03  # 4 standard errors


def test_xtc_never_excludes_an_end_token():
    settings = SamplingSettings(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.1, top_k=3)
    logits = mx.array(np.tile([[4.0, 3.9, 3.0, -9.0]], (400, 1)).astype(np.float32))
    drawn = set(sample(logits, settings, key=mx.random.key(2)).tolist())
    assert 0 not in drawn
    drawn = set(sample(logits, settings, key=mx.random.key(2), eos_token_ids=(0,)).tolist())
    assert 0 in drawn


def test_bias_rules_out_and_draws_to():
    settings = SamplingSettings(logit_bias={5: 1000.0, 9: -math.inf})
    assert sample(mx.array(LOGITS), settings).tolist() == [5] * 4
    assert np.isneginf(np.array(processed_logits(mx.array(LOGITS), settings))[:, 9]).all()
    assert SamplingSettings(logit_bias={5: 1}).logit_bias == ((5, 1.0),)


def test_ruled_out_tokens_are_not_drawn():
    best = int(LOGITS[0].argmax())
    assert sample(rule_out(mx.array(LOGITS[:1]), (best,)), SamplingSettings()).item() != best


@pytest.mark.parametrize("n", [0, 1, 7])
def test_log_probabilities_are_torch_s(n: int):
    logits = (np.random.default_rng(1).standard_normal((2, 151_936)) * 3).astype(np.float32)
    tokens = [5, 150_000]
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    chosen, ids, values = log_probabilities(mx.array(logits), mx.array(tokens), n)
    np.testing.assert_allclose(np.array(chosen), expected[[0, 1], tokens].numpy(), rtol=0, atol=3e-6)
    best = torch.topk(expected, max(n, 1), dim=-1)
    assert ids.shape == values.shape == (2, n)
    if n:
        assert (np.array(ids) == best.indices.numpy()).all()
        np.testing.assert_allclose(np.array(values), best.values.numpy(), rtol=0, atol=3e-6)


@each(
    ("settings", "message"),
    [
        ({"typical_p": 0}, "typical_p"),
        ({"presence_penalty": 1e9}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"xtc_probability": 1.5}, "xtc_probability"),
        ({"xtc_threshold": 0.6}, "xtc_threshold"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": {3: math.inf}}, "logit_bias"),
    ],
)
def test_impossible_settings_beyond_the_basics(settings, message):
    with pytest.raises(QwenMLXError, match=message):
        SamplingSettings(**settings)


@each("k", [1, 2, 20, 499, 500])
def test_top_k(k: int):
    values, ids = top_k_candidates(mx.array(LOGITS), k)
    ours = np.full(LOGITS.shape, -np.inf, np.float32)
    np.put_along_axis(ours, np.array(ids).astype(np.int64), np.array(values), -1)
    same(mx.array(ours), transformers.TopKLogitsWarper(k)(None, torch.from_numpy(LOGITS)))
    assert (np.diff(np.array(values)) <= 0).all()


@each("width", [4096, 151_936, 152_064])
@each("k", [1, 20, 63])
def test_top_k_of_a_whole_vocabulary(width: int, k: int):
    logits = (np.random.default_rng(k).standard_normal((2, width)) * 4).astype(np.float32)
    logits[1, 100:160] += 50  # all of them in neighbouring runs
    values, ids = top_k_candidates(mx.array(logits), k)
    best = torch.topk(torch.from_numpy(logits), k, dim=-1)
    assert (np.array(ids) == best.indices.numpy()).all()
    assert (np.array(values) == best.values.numpy()).all()


def test_draws_follow_the_probabilities_of_the_chain():
    """20,000 draws of the whole chain against transformers' probabilities: chi-squared below its 99.99 % quantile."""
    logits = np.tile(LOGITS[:1], (20000, 1))
    settings = SamplingSettings(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02)
    drawn = np.array(sample(mx.array(logits), settings, key=mx.random.key(11)))
    theirs = torch.from_numpy(LOGITS[:1] / np.float32(1.3))
    for warper in (
        transformers.TopKLogitsWarper(12),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.02),
    ):
        theirs = warper(None, theirs)
    expected = torch.softmax(theirs, -1)[0].numpy() * 20000
    counts = np.bincount(drawn, minlength=500)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert 5 < kept.sum() <= 12
    assert statistic < 40  # the quantile for 11 degrees of freedom is 37.4


def test_greedy_is_argmax_and_ignores_the_rest():
    np.testing.assert_array_equal(np.array(sample(mx.array(LOGITS), SamplingSettings())), LOGITS.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_tiny_temperature_is_greedy_not_nan(temperature: float):
    drawn = sample(mx.array(LOGITS), SamplingSettings(temperature=temperature), key=mx.random.key(0))
    np.testing.assert_array_equal(np.array(drawn), LOGITS.argmax(-1))


def test_one_key_one_draw():
    settings = SamplingSettings(temperature=1.0)
    first, again, other = (np.array(sample(mx.array(LOGITS), settings, key=mx.random.key(k))) for k in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_bfloat16_logits_are_sampled_in_float32():
    ids = sample(
        mx.array(LOGITS).astype(mx.bfloat16), SamplingSettings(temperature=0.7, top_p=0.8), key=mx.random.key(0)
    )
    assert ids.shape == (4,)


@each(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", True),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, value: object):
    with pytest.raises(QwenMLXError, match=name):
        SamplingSettings(**{name: value})


LIMITS = {  # what is allowed just so, and what is beyond
    "temperature": ((0, 1e6), (-1e-9, 1e6 + 1)),
    "top_k": ((0, 10**9), (-1,)),
    "top_p": ((1e-9, 1), (0, 1.001)),
    "min_p": ((0, 1), (-1e-9, 1.001)),
    "repetition_penalty": ((0.01, 100), (0.0099, 100.1)),
    "typical_p": ((1e-9, 1), (0, 1.001)),
    "presence_penalty": ((-100, 100), (-100.1, 100.1)),
    "frequency_penalty": ((-100, 100), (-100.1, 100.1)),
    "no_repeat_ngram_size": ((0, 10**9), (-1,)),
    "xtc_probability": ((0, 1), (-1e-9, 1.001)),
    "xtc_threshold": ((0, 0.5), (-1e-9, 0.501)),
}


@each("name", LIMITS)
def test_a_setting_may_be_at_its_limits_and_not_beyond(name: str):
    allowed, beyond = LIMITS[name]
    for value in allowed:
        assert getattr(SamplingSettings(**{name: value}), name) == value
    for value in beyond:
        with pytest.raises(QwenMLXError, match=rf"^{name} is "):
            SamplingSettings(**{name: value})


def test_override():
    own = SamplingSettings(0.7, 20, 0.8, 0.0, 1.05, source="the file")
    assert own.override(temperature=None) is own
    assert own.override(temperature=0.3) == SamplingSettings(
        0.3, 20, 0.8, 0.0, 1.05, source="temperature given, the rest the file"
    )
    assert own.override(temperature=0) == SamplingSettings(source="greedy, as given")
    assert own.override(temperature=0, repetition_penalty=1.2).repetition_penalty == 1.2


def test_defaults_of_deepseek_s_distillations(tmp_path):
    from qwen_mlx.loading.sampling_defaults import gguf_defaults

    file = SimpleNamespace(path=tmp_path / "m.gguf", metadata={"general.name": "DeepSeek R1 Distill Qwen 1.5B"})
    assert (gguf_defaults(file).temperature, gguf_defaults(file).top_p) == (0.6, 0.95)


def test_samplers_and_logits_processors_of_mlx_lm_choose_as_there(tmp_path):
    """The same functions in both libraries, on the same model: greedy with penalties, and a sampler that is no draw."""
    path = save_folder(tmp_path / "m", RandomModel())
    model, tokenizer = load(path, dtype="float32", quantized=False)
    theirs, their_tokenizer = mlx_lm.load(str(path))
    ids = tokenizer.encode("hello hello hello")

    def second(logprobs):
        return mx.argsort(-logprobs, axis=-1)[:, 1]

    utils = mlx_lm_sample_utils
    processors = utils.make_logits_processors({7: 2.0}, repetition_penalty=1.5, repetition_context_size=20)
    for arguments in ({"sampler": second}, {"sampler": utils.make_sampler(0.0), "logits_processors": processors}):
        ours = [chunk.token for chunk in stream_generate(model, tokenizer, ids, max_tokens=12, **arguments)]
        other = [r.token for r in mlx_lm.stream_generate(theirs, their_tokenizer, ids, max_tokens=12, **arguments)]
        assert ours == other
    plain = [chunk.token for chunk in stream_generate(model, tokenizer, ids, max_tokens=12, temperature=0)]
    assert plain != ours


def test_a_logits_processor_sees_the_text_so_far_and_decides(tmp_path):
    model, tokenizer = load(save_folder(tmp_path / "m", RandomModel()), dtype="float32")
    ids, texts = tokenizer.encode("hello"), []

    def only_five(tokens, logits):
        texts.append(tokens.tolist())
        return mx.where(mx.arange(logits.shape[-1]) == 5, logits, -mx.inf)

    arguments = {"max_tokens": 3, "temperature": 1.0, "logits_processors": [only_five]}
    tokens = [chunk.token for chunk in stream_generate(model, tokenizer, ids, **arguments)]
    assert tokens == [5, 5, 5]
    assert texts[:3] == [ids, [*ids, 5], [*ids, 5, 5]]
    for arguments, words in (
        ({"sampler": 5}, "sampler is 5, expected a function"),
        ({"logits_processors": [5]}, "logits_processors is .5., expected a list of functions"),
        ({"sampler": only_five, "temperature": 0.5}, "temperature is given with a sampler"),
        ({"sampler": only_five, "draft_model": "prompt-lookup"}, "A draft does not go with sampler"),
    ):
        with pytest.raises(QwenMLXError, match=words):
            stream_generate(model, tokenizer, ids, **arguments)
    for arguments, words in (
        ({"sampler": lambda logprobs: None}, "sampler gave None, expected a token id from 0 to"),
        ({"sampler": lambda logprobs: mx.array([10**6])}, "sampler gave .*, expected a token id"),
        ({"logits_processors": [lambda tokens, logits: None]}, "A logits processor gave NoneType, expected"),
        ({"logits_processors": [lambda tokens, logits: logits[:, 1:]]}, "A logits processor gave .1, "),
    ):
        with pytest.raises(QwenMLXError, match=words):
            list(stream_generate(model, tokenizer, ids, **arguments))
