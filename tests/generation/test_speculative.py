"""Speculative decoding: greedy ids are plain greedy's, sampled tokens have the model's distribution, and it pays."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest

from qwen_mlx import QwenMLXError, SamplingSettings, load, stream_generate
from qwen_mlx.backend import mx
from qwen_mlx.cli.generate import main
from qwen_mlx.generation.drafts import ModelDraft, PromptLookup
from qwen_mlx.generation.engine import GenerationStats, Token, generate_tokens
from qwen_mlx.generation.prompt_cache import PromptCache
from qwen_mlx.generation.sampling import processed_logits
from qwen_mlx.generation.settings import GenerationSettings, Proposal
from qwen_mlx.generation.speculative import PAUSE, Pace, accept_or_draw, drafted_steps
from qwen_mlx.generation.text import encode_prompt, generate
from qwen_mlx.loading.load import load_draft
from qwen_mlx.model.fused import FusedModel
from qwen_mlx.text.tokenizer import check_vocabulary
from reference.small_models import END_OF_TEXT, TOKENS, RandomModel, write_gguf
from tests.helpers.cases import each

PROMPT = "hello world, hello"
GREEDY = SamplingSettings()
ALL = SamplingSettings(
    repetition_penalty=1.1,
    presence_penalty=0.7,
    frequency_penalty=0.2,
    no_repeat_ngram_size=3,
    logit_bias={5: 2.0, END_OF_TEXT: 3.0},
)
steady = count().__next__  # a clock by which every round takes as long as any other, so that drafting never pauses


def tokens_of(
    model, prompt: list[int], settings: GenerationSettings, stats=None, clock=steady, cache=None, cached_ids=()
) -> Iterator[Token]:
    """The loop's tokens, with a draft where the settings have one."""
    policy = {}
    if settings.draft_model is not None:
        named = {"draft": settings.draft_model, "ids": [*cached_ids, *prompt], "stats": stats or GenerationStats()}
        policy = {"policy": partial(drafted_steps, clock=clock, **named)}
    return generate_tokens(model, prompt, settings, cache=cache, cached_ids=cached_ids, **policy)


def take(number: int, *arguments, **named) -> list[int]:
    return [token.id for token in islice(tokens_of(*arguments, **named), number)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speculative")
    near, rng = RandomModel(3, max_position_embeddings=256), np.random.default_rng(0)  # a draft that is often right
    write_gguf(folder / "model.gguf", near)
    for values in near.state_dict().values():
        values *= (1 + 0.1 * rng.standard_normal(values.shape)).astype(np.float32)
    write_gguf(folder / "near.gguf", near)
    write_gguf(folder / "other.gguf", RandomModel(1, num_hidden_layers=1, max_position_embeddings=256))
    return folder


@pytest.fixture(scope="module")
def small(files: Path):
    return load(files / "model.gguf")


@pytest.fixture(scope="module")
def drafts(files: Path, small) -> dict[str, object]:
    models = {name: load_draft(files / f"{name}.gguf", small[1]) for name in ("near", "other")}
    return {"lookup": PromptLookup(), "itself": ModelDraft(small[0]), **models}


@pytest.mark.heavy
@each("name", ["lookup", "itself", "near", "other"])
@each("sampling", [GREEDY, SamplingSettings(repetition_penalty=1.1), ALL], ids=["plain", "penalty", "all"])
def test_greedy_ids_are_those_of_plain_greedy(small, drafts, name: str, sampling: SamplingSettings):
    model, tokenizer = small
    prompt = encode_prompt(tokenizer, PROMPT)
    settings = GenerationSettings(sampling)
    if sampling is ALL:
        settings = replace(settings, min_tokens=30, eos_token_ids=(END_OF_TEXT,))
    expected = take(80, model, prompt, settings)
    assert sampling is not ALL or END_OF_TEXT in expected[30:]
    for most in (1, 5, 32):
        stats = GenerationStats()
        drafted = replace(settings, draft_model=drafts[name], num_draft_tokens=most)
        assert take(80, model, prompt, drafted, stats) == expected
        assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
        assert stats.paused_tokens == 0
        if name != "lookup":  # what the draft has read is known, so that it is not read again
            held = drafts[name]._cache
            assert {layer.offset for layer in held.layers} == {len(held.ids)} != {0}
        if name == "itself" and sampling is not ALL:  # of which a draft leaves some out
            assert stats.acceptance_rate == 1
        if name in ("itself", "near"):
            assert stats.accepted_tokens > (3 if sampling is ALL else 10)


def test_log_probabilities_are_those_without_a_draft(small, drafts):
    """Also while drafting pauses, and of the tokens that a proposal was replaced with."""
    settings = {"max_tokens": 60, "temperature": 0, "logprobs": 2}
    plain, *drafted = (
        list(stream_generate(*small, PROMPT, draft_model=draft, **settings))
        for draft in (None, "prompt-lookup", drafts["near"], drafts["other"])
    )
    for chunks in drafted:
        assert [chunk.token for chunk in chunks] == [chunk.token for chunk in plain]
        np.testing.assert_allclose([c.logprob for c in chunks], [c.logprob for c in plain], atol=1e-4)
        assert [[i for i, _ in c.top_logprobs] for c in chunks] == [[i for i, _ in c.top_logprobs] for c in plain]


@pytest.mark.heavy
def test_text_statistics_and_both_caches_are_those_of_plain_generation(small, drafts):
    """Wherever a consumer stops, the caches hold what was read, so that a next turn starts there."""
    model, tokenizer = small
    plain = list(stream_generate(model, tokenizer, PROMPT, max_tokens=40, temperature=0))
    for stop in (1, 2, 9, 23, 40):
        prompt_cache, draft = PromptCache(model), drafts["near"]
        settings = {"max_tokens": 40, "temperature": 0, "prompt_cache": prompt_cache, "draft_model": draft}
        chunks = list(islice(stream_generate(model, tokenizer, PROMPT, **settings), stop))
        assert [(c.text, c.token, c.finish_reason) for c in chunks] == [
            (c.text, c.token, c.finish_reason) for c in plain[:stop]
        ]
        ids = [*encode_prompt(tokenizer, PROMPT), *(c.token for c in plain[:stop])]
        assert prompt_cache.ids in (ids, ids[:-1])
        assert {layer.offset for layer in prompt_cache.layers} == {len(prompt_cache.ids)}
        follow = [*ids, *tokenizer.encode(" and then")]
        expected = generate(model, tokenizer, follow, max_tokens=20, temperature=0)
        assert generate(model, tokenizer, follow, **(settings | {"max_tokens": 20})) == expected
    cache = model.make_cache()
    list(
        stream_generate(
            model, tokenizer, PROMPT, max_tokens=30, temperature=0, cache=cache, draft_model="prompt-lookup"
        )
    )
    assert {layer.offset for layer in cache} == {len(encode_prompt(tokenizer, PROMPT)) + 29}


@pytest.mark.heavy
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_cache_serves(tmp_path: Path, bits: int):
    """While its newest tokens are floats, the ids are the same; later, blocks are quantized at other moments."""
    wide = RandomModel(num_attention_heads=2, num_key_value_heads=1)
    model, tokenizer = load(write_gguf(tmp_path / "m.gguf", wide))
    prompt, made = encode_prompt(tokenizer, PROMPT), []
    for draft in (None, "prompt-lookup"):
        cache = model.make_cache(bits=bits)
        settings = {"max_tokens": 150, "min_tokens": 150, "temperature": 0, "cache": cache, "draft_model": draft}
        made.append([chunk.token for chunk in stream_generate(model, tokenizer, prompt, **settings)])
        assert {layer.offset for layer in cache} == {len(prompt) + 149}
    assert made[0][: 120 - len(prompt)] == made[1][: 120 - len(prompt)]


def test_prompt_lookup_continues_the_longest_and_latest_match():
    def propose(ids: list[int], most: int = 4) -> list[int]:
        lookup = PromptLookup()
        lookup.propose(ids[: len(ids) // 2], most, GREEDY, None)  # what it has read before does not matter
        lookup.propose([7, 7, *ids[1:]], most, GREEDY, None)
        found = lookup.propose(ids, most, GREEDY, None).ids
        assert found == PromptLookup().propose(ids, most, GREEDY, None).ids
        return found

    assert propose([1, 2, 3, 4, 5, 6, 1, 2]) == [3, 4, 5, 6]
    assert propose([1, 2, 3, 9, 1, 2, 5, 9, 1, 2]) == [5, 9, 1, 2]  # 9 1 2, then of 1 2 the latest
    assert propose([0, 1, 2, 3, 9, 1, 2, 5, 0, 1, 2]) == [3, 9, 1, 2]  # 0 1 2 wins over a later 1 2
    assert propose([1, 2, 1, 2, 1]) == [2, 1, 2, 1]  # a period goes on past the end
    assert propose([1, 2, 3, 4]) == propose([1]) == []


def excess(counts: Counter[int], p: np.ndarray) -> float:
    """Pearson's chi-square statistic, cells with an expectation under 5 joined, divided by the value that chance
    exceeds once in 10,000 (Wilson and Hilferty 1931)."""
    n = sum(counts.values())
    assert all(p[token] > 0 for token in counts), "a token that is ruled out was drawn"
    few = p * n < 5
    cells = [(counts[i], p[i] * n) for i in np.flatnonzero(~few)]
    cells.append((sum(counts[i] for i in np.flatnonzero(few)), p[few].sum() * n))
    df = sum(expected > 0 for _, expected in cells) - 1
    limit = df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3
    return sum((seen - expected) ** 2 / expected for seen, expected in cells if expected > 0) / limit


@pytest.mark.heavy
def test_a_replaced_proposal_leaves_the_distribution_as_it_is():
    """3,000 draws a draft among 12 tokens: a law that is off by 0.1 in total variation is seen 99 times in 100. The
    draft's own law, which keeping every proposal would give, is far beyond that."""
    rng, n, size = np.random.default_rng(3), 3000, 12

    def law(size: int) -> mx.array:
        return mx.softmax(mx.array(rng.normal(size=(1, size)).astype(np.float32) * 1.5), axis=-1)

    p = law(size)
    exact = np.array(p)[0].astype(np.float64)
    keys = mx.random.split(mx.random.key(11), n)
    # Embeddings of other sizes, as padding, are the last two.
    for q, certain in itertools.product((law(size), p, law(size - 2), law(size + 2)), (False, True)):
        proposed = mx.random.categorical(mx.log(q), num_samples=n, key=mx.random.key(5))[0].tolist()
        made = [accept_or_draw(mx.log(p), i, None if certain else q, key) for i, key in zip(proposed, keys)]
        assert excess(Counter(made), exact) < 1
        if q is not p and q.shape == p.shape:
            assert excess(Counter(proposed), exact) > 10


class Fixed:
    """Proposes the same tokens always, without a distribution."""

    num_draft_tokens = 2

    def __init__(self, ids: list[int]):
        self.ids = ids

    def propose(self, ids, count, sampling, key):
        return Proposal(self.ids[:count])


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_token_for_which_the_model_has_no_row_is_rejected_and_never_read(small, monkeypatch, temperature):
    """A draft's embedding may have more rows than the model's."""
    model, tokenizer = small
    beyond = model.config.vocab_size
    prompt, read = encode_prompt(tokenizer, PROMPT), []
    settings = GenerationSettings(SamplingSettings(temperature), seed=5)
    expected = take(40, model, prompt, settings)
    embed = FusedModel._embedded

    def recorded(self, ids, dtype):
        read.append(int(mx.max(ids)))
        return embed(self, ids, dtype)

    monkeypatch.setattr(FusedModel, "_embedded", recorded)
    for proposed in ([beyond], [expected[1], beyond, 3], [3, beyond + 7]):
        stats = GenerationStats()
        made = take(40, model, prompt, replace(settings, draft_model=Fixed(proposed)), stats)
        assert temperature or made == expected
        assert stats.drafted_tokens
    assert max(read) < beyond


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [pytest.param("certain", marks=pytest.mark.slow), "drawn, all settings"])
def test_sampled_tokens_have_the_models_distribution(small, drafts, kind: str):
    """The first three tokens of 800 answers, against the exact law that the model's logits give: one that is off by
    0.15 in total variation is seen 9 times in 10 at least."""
    model, tokenizer = small
    sampling = SamplingSettings(temperature=0.7, top_k=6, top_p=0.95, repetition_penalty=1.1)
    if kind == "drawn, all settings":
        sampling = replace(
            sampling, presence_penalty=1.0, no_repeat_ngram_size=3, logit_bias={5: 2.0}, xtc_probability=0.5
        )
    prompt = tokenizer.encode("hello hello hello, hello")

    def law(ids: list[int]) -> np.ndarray:
        """Exact, also of XTC, whose coin decides between two laws."""
        logits = model(mx.array([ids]), logits_to_keep=1)[:, -1]
        laws = []
        for odds in (0.0, 1.0):
            settings = replace(sampling, xtc_probability=odds)
            left = processed_logits(logits, settings, mx.array([ids]), n_prompt=len(prompt), xtc_key=mx.random.key(0))
            laws.append(np.array(mx.softmax(left, axis=-1))[0].astype(np.float64))
        return laws[0] + sampling.xtc_probability * (laws[1] - laws[0])

    first = law(prompt)
    second, third = np.zeros_like(first), np.zeros_like(first)
    for a in map(int, np.flatnonzero(first)):
        then = law([*prompt, a])
        second += first[a] * then
        for b in map(int, np.flatnonzero(then)):
            third += first[a] * then[b] * law([*prompt, a, b])
    likely = [int(np.argmax(law_)) for law_ in (second, third)]
    draft = Fixed(likely) if kind == "certain" else drafts["near"]
    cache, stats = model.make_cache(), GenerationStats()
    model(mx.array([prompt[:-1]]), cache)
    counts: list[Counter[int]] = [Counter(), Counter(), Counter()]
    for seed in range(800):
        settings = GenerationSettings(sampling, seed=seed, draft_model=draft)
        made = take(3, model, prompt[-1:], settings, stats, cache=cache, cached_ids=prompt[:-1])
        for layer in cache:
            layer.trim(layer.offset - len(prompt) + 1)
        for place, token in zip(counts, made):
            place[token] += 1
    assert 100 < stats.accepted_tokens < stats.drafted_tokens - 100
    for place, p in zip(counts, (first, second, third)):
        assert excess(place, p) < 1


def test_a_seed_repeats_and_another_differs(small, drafts):
    """While the clock says the same of drafting: plain steps draw other numbers than drafted ones."""
    model, tokenizer = small
    settings = GenerationSettings(SamplingSettings(temperature=1.0), draft_model=ModelDraft(drafts["near"].model))
    prompt = encode_prompt(tokenizer, PROMPT)
    texts = [take(30, model, prompt, replace(settings, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_drafting_pauses_while_it_is_slower_and_resumes_when_it_is_not():
    pace = Pace()
    assert not pace.wants_plain
    pace.plain(1.0)
    pauses = []
    for _ in range(3):
        while not (pause := pace.pause()):
            pace.round(4, 2, 2.1)  # two tokens in more than the time of two plain steps
        pauses.append(pause)
    assert pauses == [PAUSE, 2 * PAUSE, 4 * PAUSE]
    for _ in range(20):
        pace.round(4, 2, 1.9)
        assert pace.pause() == 0
    assert pace.wants_plain  # to compare with
    pace.plain(0.5)
    assert not pace.wants_plain
    for _ in range(8):  # plain steps have become as fast
        pace.plain(0.5)
    assert pace.pause() == PAUSE


class Useless:
    """A draft that proposes one wrong token, slowly."""

    num_draft_tokens = 4

    def __init__(self, clock: Clock, wrong: int):
        self.clock, self.wrong = clock, wrong

    def propose(self, ids, count, sampling, key):
        self.clock.now += 10
        return Proposal([self.wrong])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.mark.heavy
def test_a_slow_draft_is_switched_off_and_the_text_is_the_same(small):
    model, tokenizer = small
    prompt = encode_prompt(tokenizer, PROMPT)
    expected = take(120, model, prompt, GenerationSettings())
    wrong = next(i for i in range(model.config.vocab_size) if i not in expected)
    clock, stats = Clock(), GenerationStats()
    settings = GenerationSettings(draft_model=Useless(clock, wrong))
    assert take(120, model, prompt, settings, stats, clock) == expected
    assert stats.acceptance_rate == 0
    assert 80 < stats.paused_tokens < 119
    assert stats.drafted_tokens <= 3 * 9


class Scripted:
    """A draft that proposes the text to come, with a wrong token wherever its index is a multiple of 7."""

    num_draft_tokens = 5

    def __init__(self, clock: Clock, cost: float, text: list[int], wrong: int):
        self.clock, self.cost = clock, cost
        self.text = [wrong if i % 7 == 0 else token for i, token in enumerate(text)]

    def propose(self, ids, count, sampling, key):
        self.clock.now += self.cost
        return Proposal(self.text[len(ids) : len(ids) + count])


@pytest.mark.parametrize(
    ("cost", "counts"), [(0, (2, 6, 13, 14)), (100, (30, 44, 60))], ids=["in rounds", "around a pause"]
)
def test_an_end_token_is_ruled_out_for_min_tokens_and_no_longer(small, cost: float, counts: tuple[int, ...]):
    """Within a round of a draft, while drafting pauses and after it: an end token that is always the likeliest comes as
    soon as min_tokens allows it."""
    model, tokenizer = small
    prompt = encode_prompt(tokenizer, PROMPT)
    sampling = SamplingSettings(logit_bias={END_OF_TEXT: 1000.0})
    settings = GenerationSettings(sampling, min_tokens=counts[-1], eos_token_ids=(END_OF_TEXT,))
    never = take(counts[-1], model, prompt, settings)
    assert END_OF_TEXT not in never
    paused = set()
    for least in counts:
        clock, stats = Clock(), GenerationStats()
        draft = Scripted(clock, cost, [*prompt, *never[:least], *[END_OF_TEXT] * 9], never[0])
        drafted = replace(settings, min_tokens=least, draft_model=draft)
        assert take(least + 3, model, prompt, drafted, stats, clock) == [*never[:least], *[END_OF_TEXT] * 3]
        paused.add(stats.paused_tokens)
    assert paused == {0} if not cost else len(paused) > 1


def test_a_cache_holds_what_was_yielded_wherever_a_consumer_stops(small):
    model, tokenizer = small
    prompt = encode_prompt(tokenizer, PROMPT)
    expected = take(9, model, prompt, GenerationSettings())
    for stop in (1, 2, 3, 5, 8):
        cache = model.make_cache()
        settings = GenerationSettings(draft_model=Scripted(Clock(), 0, [*prompt, *expected], expected[0]))
        tokens = tokens_of(model, prompt, settings, cache=cache)
        assert [next(tokens).id for _ in range(stop)] == expected[:stop]
        tokens.close()
        assert {layer.offset for layer in cache} == {len(prompt) + stop - 1}
        assert take(9 - stop, model, [expected[stop - 1]], GenerationSettings(), cache=cache) == expected[stop:]


def test_nothing_is_proposed_beyond_the_last_token(small, drafts):
    model, tokenizer = small
    for most in (1, 2, 3, 7):
        cache = model.make_cache()
        chunks = list(
            stream_generate(
                model, tokenizer, PROMPT, max_tokens=most, temperature=0, cache=cache, draft_model=drafts["itself"]
            )
        )
        assert len(chunks) == most
        assert chunks[-1].stats.drafted_tokens <= most - 1


class Knowing(Fixed):
    """Proposes the text's own tokens, but a wrong one in some rounds; notes how many it is asked for."""

    def __init__(self, text: list[int], most: int, wrong_rounds: tuple[int, ...]):
        super().__init__(text)
        self.num_draft_tokens, self.wrong_rounds, self.asked = most, wrong_rounds, []

    def propose(self, ids, count, sampling, key):
        self.asked.append(count)
        right = self.ids[len(ids) : len(ids) + count]
        return Proposal([len(TOKENS) - 1 if len(self.asked) in self.wrong_rounds else right[0], *right[1:]])


@each(("most", "wrong_rounds", "asked"), [(5, (), [2, 5, 5]), (5, (2,), [2, 5, 2, 5]), (1, (), [1, 1, 1])])
def test_proposals_are_short_until_one_is_right(small, most: int, wrong_rounds: tuple[int, ...], asked: list[int]):
    model, tokenizer = small
    prompt = encode_prompt(tokenizer, PROMPT)
    expected = take(24, model, prompt, GenerationSettings())
    assert len(TOKENS) - 1 not in expected
    draft = Knowing([*prompt, *expected], most, wrong_rounds)
    take(24, model, prompt, GenerationSettings(max_tokens=24, draft_model=draft))
    assert draft.asked[: len(asked)] == asked


def test_a_draft_that_has_no_more_context_leaves_the_model_alone(files: Path, small, tmp_path: Path):
    model, tokenizer = small
    short = load_draft(write_gguf(tmp_path / "d.gguf", RandomModel(max_position_embeddings=32)), tokenizer)
    expected = generate(model, tokenizer, PROMPT, max_tokens=60, temperature=0)
    assert generate(model, tokenizer, PROMPT, max_tokens=60, temperature=0, draft_model=short) == expected


def test_logits_that_are_not_finite_are_refused(files: Path, drafts):
    model, tokenizer = load(files / "model.gguf")
    settings = GenerationSettings(draft_model=drafts["near"])
    tokens = tokens_of(model, encode_prompt(tokenizer, PROMPT), settings)
    next(tokens)
    model.model.norm.weight = model.model.norm.weight * math.nan
    with pytest.raises(QwenMLXError, match="not finite"):
        next(tokens)


def test_impossible_settings_are_refused_by_name(small, drafts):
    model, tokenizer = small

    def refused(match: str, **arguments) -> None:
        with pytest.raises(QwenMLXError, match=match):
            stream_generate(model, tokenizer, PROMPT, **arguments)

    refused("RotatingKVCache cannot take back", cache=model.make_cache(max_size=64), draft_model="prompt-lookup")
    rotating = PromptCache(model, lambda: model.make_cache(max_size=64))
    refused("RotatingKVCache cannot take back", prompt_cache=rotating, draft_model=drafts["near"])
    refused("draft_model is 'lookup', expected", draft_model="lookup")
    refused("draft_model is 5, expected", draft_model=5)
    refused("num_draft_tokens is given without a draft", num_draft_tokens=4)
    for value in (0, 33, -1, 2.0, True):
        refused(f"num_draft_tokens is {value!r}, expected 1 to 32", draft_model="prompt-lookup", num_draft_tokens=value)


def test_vocabularies_are_compared_by_token_and_padding_does_not_count():
    check_vocabulary(["a", "b", "", ""], ["a", "b", ""], "it")
    for other in (["a", "c", ""], ["a"], ["a", "b", "c"]):
        with pytest.raises(QwenMLXError, match="it has another vocabulary than the model: its token"):
            check_vocabulary(["a", "b", ""], other, "it")


def test_a_draft_with_another_vocabulary_is_refused_before_weights_are_read(files: Path, small, tmp_path: Path, capfd):
    def spoil(writer, tensors) -> None:
        entry = writer.kv_data[0]["tokenizer.ggml.tokens"]
        entry.value = [*TOKENS[:5], TOKENS[6], TOKENS[5], *TOKENS[7:]]

    path = write_gguf(tmp_path / "d.gguf", RandomModel(), edit=spoil)
    file = path.read_bytes()
    path.write_bytes(file[: len(file) - 1000] + bytes([255]) * 1000)  # not a number: reading the weights would say so
    with pytest.raises(QwenMLXError, match=r"d\.gguf has another vocabulary than the model: its token 5"):
        load_draft(path, small[1])
    # On the command line neither model's weights are read: those of the model are cut off here.
    damaged = tmp_path / "m.gguf"
    damaged.write_bytes((files / "model.gguf").read_bytes())
    with pytest.raises(QwenMLXError, match=r"--draft-model .*d\.gguf has another vocabulary"):
        main(["--model", str(damaged), "--draft-model", str(path), "--prompt", "x"])


def test_command_line(files: Path, capfd):
    model = ["--model", str(files / "model.gguf"), "--prompt", PROMPT, "--temp", "0", "--max-tokens", "40"]
    assert main(model) == 0
    plain = capfd.readouterr().out
    for draft in ("prompt-lookup", str(files / "near.gguf")):
        assert main([*model, "--draft-model", draft, "--num-draft-tokens", "3"]) == 0
        out, err = capfd.readouterr()
        assert out == plain
        assert " accepted (" in err
    for arguments, match in (
        (["--num-draft-tokens", "3"], "--num-draft-tokens needs --draft-model"),
        (["--draft-model", "prompt-lookup", "--num-draft-tokens", "0"], "--num-draft-tokens is 0, expected 1 to 32"),
    ):
        with pytest.raises(QwenMLXError, match=match):
            main([*model[:4], *arguments])


def test_real_model(real_gguf: Path):
    """Greedy text of the real file, with itself as the draft and from the prompt."""
    model, tokenizer = load(real_gguf)
    prompt = encode_prompt(tokenizer, "Repeat exactly:\ndef area(radius):\n    return 3.14159 * radius * radius\n")
    expected = take(24, model, prompt, GenerationSettings())
    for draft in (PromptLookup(), ModelDraft(model)):
        stats = GenerationStats()
        assert take(24, model, prompt, GenerationSettings(draft_model=draft), stats) == expected
        assert stats.accepted_tokens >= 8
