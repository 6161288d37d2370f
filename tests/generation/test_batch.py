"""Batches: every row gives what it gives alone, whatever is beside it, before it or after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_mlx import QwenMLXError, batch_generate, load, stream_generate
from qwen_mlx.backend import mx
from qwen_mlx.generation.text import GenerationChunk
from qwen_mlx.model.batch_cache import BatchKVCache, Padding, join, select
from qwen_mlx.model.cache import KVCache
from reference.emulator import emulate
from reference.lazy import torch
from reference.small_models import IM_END, TOKENS, RandomModel, save_folder, to_hf, write_gguf
from tests.helpers.attending import attend
from tests.helpers.cases import each

LENGTHS = (3, 90, 1, 41, 17, 150, 2, 64, 33, 5, 120, 18)


def prompts_of(lengths=LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, len(TOKENS) - 3, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def weights():
    return RandomModel(3, max_position_embeddings=256)


@pytest.fixture(scope="module")
def small(weights, tmp_path_factory: pytest.TempPathFactory):
    return load(write_gguf(tmp_path_factory.mktemp("batch") / "m.gguf", weights))


@pytest.fixture(scope="module")
def theirs(weights, small):
    return to_hf(weights)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory):
    """Its last two layers see five tokens."""
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    return load(save_folder(tmp_path_factory.mktemp("windowed") / "m", RandomModel(5, **window)))


_alone: dict[tuple, list[GenerationChunk]] = {}


def alone(model, tokenizer, ids: list[int], count: int) -> list[GenerationChunk]:
    """One prompt by the plain loop; once for all tests."""
    key = id(model), tuple(ids), count
    if key not in _alone:
        _alone[key] = list(stream_generate(model, tokenizer, ids, max_tokens=count, temperature=0))
    return _alone[key]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("batch_size", "prefill_step_size", "which"),
    [
        *((64, 2048, "small"), (5, 64, "small"), (4, 7, "small"), (1, 2048, "small")),
        *((5, 64, "windowed"), (4, 7, "windowed")),
    ],
)
def test_rows_equal_prompts_alone(batch_size, prefill_step_size, which, request):
    model, tokenizer = request.getfixturevalue(which)
    prompts = prompts_of()
    limits = [40 if i % 3 else 8 + 5 * i for i in range(len(prompts))]
    done = []
    results = batch_generate(
        model,
        tokenizer,
        prompts,
        max_tokens=limits,
        temperature=0,
        batch_size=batch_size,
        prefill_step_size=prefill_step_size,
        progress=lambda *counts: done.append(counts),
    )
    for ids, limit, result in zip(prompts, limits, results, strict=True):
        expected = alone(model, tokenizer, ids, limit)
        assert result.token_ids == [chunk.token for chunk in expected]
        assert result.text == "".join(chunk.text for chunk in expected)
        assert result.finish_reason == expected[-1].finish_reason
    stats = results[0].stats
    assert (stats.prompt_tokens, stats.prompts) == (sum(LENGTHS), len(LENGTHS))
    assert stats.generated_tokens == sum(len(result.token_ids) for result in results)
    assert done[-1] == (len(prompts), len(prompts))


@pytest.mark.parametrize(
    ("which", "arguments"), [("small", {}), ("windowed", {"logprobs": 2, "min_tokens": 3})], ids=["small", "windowed"]
)
def test_rows_on_emulated_kernels_equal_the_plain_ones(which, arguments, request):
    """Steps of the whole batch as one graph, rows that leave and join between them. tests/model checks accesses."""
    model, tokenizer = request.getfixturevalue(which)
    prompts, limits = prompts_of((3, 41, 1, 17, 2, 33)), [20, 6, 9, 20, 3, 12]
    arguments = {"max_tokens": limits, "temperature": 0, "batch_size": 4, **arguments}
    expected = batch_generate(model, tokenizer, prompts, **arguments)
    with emulate(checked=False):
        found = batch_generate(model, tokenizer, prompts, **arguments)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.token_ids, mine.text, mine.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-5)  # 3e-6 measured


def test_rows_equal_transformers_on_a_padded_batch(small, theirs):
    prompts, longest = prompts_of((4, 30, 11)), 30
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0)
    results = batch_generate(*small, prompts, max_tokens=30, temperature=0)
    for result, row in zip(results, expected[:, longest:].tolist()):
        assert result.token_ids == row[: len(result.token_ids)]
        assert len(result.token_ids) == 30 or result.token_ids[-1] == IM_END


FEATURES = {
    "repetition": {"repetition_penalty": 1.3},
    "counts": {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bias": {"logit_bias": {5: -3.0, 9: 4.0, IM_END: 2.0}},
    "minimum": {"min_tokens": 9, "logit_bias": {IM_END: 4.0}},
    "all": {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.7,
        "no_repeat_ngram_size": 3,
        "min_tokens": 5,
        "logit_bias": {IM_END: 5.0},
        "logprobs": 3,
    },
}


@pytest.mark.heavy
@each("case", FEATURES)
@each("batch_size", [3, 8])
def test_what_is_asked_for_is_done_to_each_row_by_its_own_tokens(small, case, batch_size):
    """Rows of very different lengths that come and go: each as alone, log-probabilities too."""
    model, tokenizer = small
    prompts, limits = prompts_of((20, 4, 9, 31, 6, 1, 60)), [30, 12, 25, 9, 30, 18, 11]
    arguments = {"temperature": 0, **FEATURES[case]}
    results = batch_generate(model, tokenizer, prompts, max_tokens=limits, batch_size=batch_size, **arguments)
    plain = 0
    for ids, limit, result in zip(prompts, limits, results):
        single = list(stream_generate(model, tokenizer, ids, max_tokens=limit, **arguments))
        assert result.token_ids == [chunk.token for chunk in single]
        plain += result.token_ids == [chunk.token for chunk in alone(model, tokenizer, ids, limit)]
        assert len(result.logprobs) == len(result.top_logprobs) == ("logprobs" in arguments) * len(single)
        np.testing.assert_allclose(result.logprobs, [c.logprob for c in single][: len(result.logprobs)], atol=1e-4)
        for ours, chunk in zip(result.top_logprobs, single):
            assert [token for token, _ in ours] == [token for token, _ in chunk.top_logprobs]
    assert plain < len(prompts) - 1, "the feature changes nothing here, so that nothing is tested"


def test_xtc_of_a_row_leaves_the_least_likely_choice(small):
    """Always applied and with a threshold of 0, it decides the token."""
    settings = {"temperature": 1.0, "top_k": 3, "top_p": 1.0, "repetition_penalty": 1.0, "logit_bias": {IM_END: -50.0}}
    settings |= {"xtc_probability": 1.0, "xtc_threshold": 0.0, "max_tokens": 9, "logprobs": 4}
    for result in batch_generate(*small, prompts_of((20, 4, 9)), **settings):
        likeliest = [[token for token, _ in top if token != IM_END] for top in result.top_logprobs]
        assert result.token_ids == [tokens[2] for tokens in likeliest]


def test_stop_strings_end_their_row_alone(small):
    model, tokenizer = small
    prompts = prompts_of((20, 4, 9))
    whole = batch_generate(model, tokenizer, prompts, max_tokens=40, temperature=0)
    text = whole[1].text
    others = whole[0].text + "\n" + whole[2].text
    stop = next(text[i : i + 3] for i in range(10, len(text)) if text[i : i + 3] not in others)
    results = batch_generate(model, tokenizer, prompts, max_tokens=40, temperature=0, stop=[stop])
    assert (results[1].text, results[1].finish_reason) == (text[: text.find(stop)], "stop")
    assert [results[i].text for i in (0, 2)] == [whole[i].text for i in (0, 2)]


def test_a_seed_repeats_a_batch(small):
    arguments = {"max_tokens": 20, "temperature": 1.0, "batch_size": 2}
    first, again, other = (
        [result.token_ids for result in batch_generate(*small, prompts_of((5, 9, 3)), seed=seed, **arguments)]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_rows_that_have_ended_leave_the_batch(small, monkeypatch):
    """No row is computed for long after its end, and no seat stays empty while prompts wait."""
    model, tokenizer = small
    sizes = []
    update = BatchKVCache.update

    def counted(self, kv):
        sizes.append(kv.shape[0] * kv.shape[1])
        return update(self, kv)

    monkeypatch.setattr(BatchKVCache, "update", counted)
    limits = [4, 30, 6, 30, 8, 30, 10, 30]
    results = batch_generate(model, tokenizer, prompts_of((6,) * 8), max_tokens=limits, temperature=0, batch_size=4)
    wanted = sum(len(result.token_ids) for result in results) + 6 * 8
    assert sum(sizes) / model.config.num_hidden_layers < 1.25 * wanted


@pytest.mark.parametrize("window", [None, 4])
def test_padding_is_never_seen(window):
    """Rows of a batch cache, joined and selected, against a cache of their own that has no padding."""
    rng = np.random.default_rng(1)

    def drawn(rows: int, length: int) -> tuple[mx.array, mx.array]:
        shapes = (rows, length, 4, 16), (rows, length, 2, 2, 16)
        return tuple(mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)

    parts = {name: drawn(2, length) for name, length in (("a", 9), ("b", 6), ("one", 1), ("more", 3))}
    pads = {"a": [4, 0], "b": [0, 5]}
    batches = {}
    for name in "ab":
        batches[name] = [BatchKVCache(Padding(pads[name]))]
        q, kv = parts[name]
        kv[0 if name == "a" else 1, : max(pads[name])] = 1e4  # what stands in the padding
        out = attend(batches[name][0], q, kv, 0.25, window)
        assert np.isfinite(np.array(out)).all()
    (joined,) = join(batches["a"], batches["b"])
    assert joined.positions.tolist() == [5, 9, 6, 1]
    step = [mx.concatenate([parts["one"][i], parts["one"][i] + 1]) for i in (0, 1)]
    first = attend(joined, *step, 0.25, window)
    (kept,) = select([joined], [3, 0])
    assert kept.positions.tolist() == [2, 6]
    assert kept.state[0].shape[2] == 6  # the longest row's own tokens
    second = attend(kept, *parts["more"], 0.25, window)
    for row, name, at, then in ((0, "a", 0, 1), (1, "a", 1, None), (2, "b", 0, None), (3, "b", 1, 0)):
        cache = KVCache()
        q, kv = (part[at : at + 1, pads[name][at] :] for part in parts[name])
        attend(cache, q, kv, 0.25, window)
        expected = attend(cache, *(part[row : row + 1] for part in step), 0.25, window)
        np.testing.assert_allclose(first[row : row + 1], expected, atol=2e-6)
        if then is not None:
            expected = attend(cache, *(part[then : then + 1] for part in parts["more"]), 0.25, window)
            np.testing.assert_allclose(second[then : then + 1], expected, atol=2e-6)


@each(
    ("prompts", "arguments", "message"),
    [
        ("one string", {}, "prompts is str, expected a list of prompts"),
        ([[1], []], {}, "Prompt 2 of 2: The prompt has no tokens"),
        ([[1], [2, 10**6]], {}, "Prompt 2 of 2: The prompt holds token id 1000000"),
        ([[1], [2] * 256], {}, "Prompt 2 of 2: The prompt has 256 tokens and the model's context 256"),
        ([[1], [2]], {"max_tokens": [1]}, "max_tokens has 1 values for 2 prompts"),
        ([[1], [2]], {"max_tokens": [1, 0]}, "Prompt 2 of 2: max_tokens is 0"),
        ([[1]], {"batch_size": 0}, "batch_size is 0"),
        ([[1]], {"prefill_step_size": True}, "prefill_step_size is True"),
        ([[1]], {"seed": -1}, "seed is -1"),
        ([[1]], {"stop": [""]}, "stop is"),
        ([[1]], {"top_p": 0}, "top_p is 0"),
        ([[1]], {"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9"),
        ([[1]], {"batchsize": 9}, "There is no argument 'batchsize': did you mean 'batch_size'"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_any_work(small, prompts, arguments, message):
    with pytest.raises(QwenMLXError, match=message):
        batch_generate(*small, prompts, **arguments)


def test_nothing_asked_nothing_done(small):
    assert batch_generate(*small, []) == []


def test_one_damaged_row_is_an_error_not_an_answer(small, monkeypatch):
    model, tokenizer = small
    table = mx.array(model.model.embed_tokens.weight)
    broken = mx.array(table)
    broken[7] = float("nan")
    monkeypatch.setitem(model.model.embed_tokens, "weight", broken)
    with pytest.raises(QwenMLXError, match="not finite"):
        batch_generate(model, tokenizer, [[1, 2], [7, 3], [5]], max_tokens=3)


def test_real_model_rows_equal_prompts_alone(real_gguf: Path):
    """Prompts of very different length, in float32, get the greedy tokens that each gets alone."""
    model, tokenizer = load(real_gguf, dtype="float32")
    source = Path(__file__).read_text(encoding="utf-8")[:600]
    prompts = ["Hi", f"{source}\nWhat does this test?", "Reverse a list in Python."]
    results = batch_generate(model, tokenizer, prompts, max_tokens=[9, 12, 16], temperature=0)
    for prompt, limit, result in zip(prompts, [9, 12, 16], results):
        single = stream_generate(model, tokenizer, prompt, max_tokens=limit, temperature=0)
        assert result.token_ids == [chunk.token for chunk in single]
