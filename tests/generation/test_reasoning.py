"""Thoughts and their budget, control tokens that are seen and that end a text, and texts that repeat themselves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mlx import QwenMLXError, batch_generate, load
from qwen_mlx.generation.prompt_cache import PromptCache
from qwen_mlx.generation.reasoning import ThoughtLimit
from qwen_mlx.generation.text import generate, repeated_tokens, stream_generate
from reference.small_models import MERGES, RandomModel, write_gguf
from tests.helpers.cases import each

PROMPT = "hello world, hello"


@pytest.fixture
def small(tmp_path):
    return load(write_gguf(tmp_path / "m.gguf", RandomModel(3, max_position_embeddings=256)))


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """One that no test but those of this fixture changes."""
    path = tmp_path_factory.mktemp("tokenizer") / "m.gguf"
    _, tokenizer = load(write_gguf(path, RandomModel(3, max_position_embeddings=256)))
    tokenizer.think_marks = ("assistant", "\u00a7\u00a7")
    return tokenizer


def greedy(small, count: int = 40, **options) -> list:
    model, tokenizer = small
    return list(stream_generate(model, tokenizer, PROMPT, temperature=0, max_tokens=count, **options))


def open_thought(small, closing: str) -> None:
    """Makes the prompt's own end the opening mark, and `closing` the closing one."""
    tokenizer = small[1]
    tokenizer.think_marks = ("assistant", closing)


def test_thought_and_answer_are_told_apart(small):
    plain = greedy(small)
    assert [chunk.answer for chunk in plain] == [chunk.text for chunk in plain]
    text = "".join(chunk.text for chunk in plain)
    closing = text[10:13]
    open_thought(small, closing)
    chunks = greedy(small)
    assert [chunk.token for chunk in chunks] == [chunk.token for chunk in plain]
    thought, answer = text.split(closing, 1)
    assert "".join(chunk.reasoning for chunk in chunks) == thought.strip()
    assert "".join(chunk.answer for chunk in chunks) == answer.lstrip()
    assert "".join(chunk.text for chunk in chunks) == text


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("cached", [False, True])
def test_a_budget_ends_a_thought(small, budget: int, cached: bool):
    """The tokens after the forced mark are those after a prompt that ends with it."""
    model, tokenizer = small
    plain = [chunk.token for chunk in greedy(small)]
    open_thought(small, "\u00a7\u00a7")
    closing = tokenizer.encode("\n\u00a7\u00a7\n\n")
    options = {"prompt_cache": PromptCache(model)} if cached else {}
    chunks = greedy(small, reasoning_budget=budget, **options)
    ids = [chunk.token for chunk in chunks]
    assert ids[: budget + len(closing)] == [*plain[:budget], *closing]
    prompt = [*tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}]), *plain[:budget], *closing]
    left = 40 - budget - len(closing)
    rest = stream_generate(model, tokenizer, prompt, temperature=0, max_tokens=left)
    assert ids[budget + len(closing) :] == [chunk.token for chunk in rest]
    assert "".join(chunk.answer for chunk in chunks) != ""
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].stats.generated_tokens == 40
    if cached:
        assert options["prompt_cache"].ids[: len(prompt)] == prompt


def test_a_budget_that_max_tokens_ends_first(small):
    open_thought(small, "\u00a7\u00a7")
    assert len(greedy(small, 8, reasoning_budget=7)) == 8
    assert len(greedy(small, 5, reasoning_budget=7)) == 5


def test_a_model_that_does_not_think_has_no_budget_to_keep(small):
    assert [c.token for c in greedy(small, reasoning_budget=3)] == [c.token for c in greedy(small)]


def test_a_budget_with_caches_drafts_and_penalties(small):
    """The tokens are the same whatever else is asked for; a penalty sees the mark like any other token."""
    open_thought(small, "\u00a7\u00a7")
    plain = [chunk.token for chunk in greedy(small, reasoning_budget=3)]
    for options in ({"cache": small[0].make_cache()}, {"draft_model": "prompt-lookup"}, {"logprobs": 1}):
        assert [chunk.token for chunk in greedy(small, reasoning_budget=3, **options)] == plain
    closing = small[1].encode("\n\u00a7\u00a7\n\n")
    ids = [chunk.token for chunk in greedy(small, reasoning_budget=3, repetition_penalty=1.3)]
    assert ids[3 : 3 + len(closing)] == closing
    with pytest.raises(QwenMLXError, match="reasoning_budget"):
        greedy(small, reasoning_budget=-1)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 9}], ids=str)
def test_rows_of_a_batch_have_the_budget_each(small, sampling: dict):
    """Prompts of other lengths, one of which opens no thought."""
    model, tokenizer = small
    open_thought(small, "\u00a7\u00a7")
    prompts = ["hello", "hello world, hello world, hello", tokenizer.encode("hello there")]
    options = {"max_tokens": 30, "reasoning_budget": 4}
    results = batch_generate(model, tokenizer, prompts, **options, **sampling)
    closing = tokenizer.encode("\n\u00a7\u00a7\n\n")
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        own = sampling | ({"seed": sampling["seed"] + number} if "seed" in sampling else {})
        chunks = list(stream_generate(model, tokenizer, prompt, **options, **own))
        assert result.token_ids == [chunk.token for chunk in chunks]
        assert (result.token_ids[4 : 4 + len(closing)] == closing) == (number < 2)


@settings(max_examples=60, deadline=None)
@given(budget=st.integers(0, 9), ids=st.lists(st.integers(0, 200), max_size=12))
def test_a_budget_allows_all_or_one(small_tokenizer, budget: int, ids: list[int]):
    """Whatever tokens come, the mark is written once, after `budget` of them, and nothing is forbidden before and
    after."""
    tokenizer = small_tokenizer
    closing = tokenizer.encode("\n\u00a7\u00a7\n\n")
    matcher = ThoughtLimit(tokenizer, tokenizer.encode("assistant"), budget).start(100)
    tokens = iter(ids)
    for place in range(len(ids) + len(closing)):
        allowed = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))
        at = place - budget
        if 0 <= at < len(closing):
            assert allowed.tolist() == [closing[at]]
            matcher.accept(closing[at])
        else:
            assert allowed.size >= tokenizer.vocab_size
            matcher.accept(next(tokens, 5))


def test_stop_token_ids_end_a_text(small):
    model, tokenizer = small
    plain = greedy(small)
    token = plain[6].token
    first = [chunk.token for chunk in plain].index(token)
    chunks = greedy(small, stop_token_ids=[token])
    assert [chunk.token for chunk in chunks] == [chunk.token for chunk in plain[: first + 1]]
    assert chunks[-1].finish_reason == "stop"
    text = generate(model, tokenizer, PROMPT, temperature=0, max_tokens=40, stop_token_ids=[token])
    assert text == "".join(chunk.text for chunk in plain[:first])
    for wrong in ([-1], "5", [10**6]):
        with pytest.raises(QwenMLXError, match="stop_token_ids"):
            greedy(small, stop_token_ids=wrong)


def test_control_tokens_can_be_seen_and_stopped_on(small, tmp_path):
    """The same model with one of the tokens that it makes as a control token."""
    names, plain = small[1].names, [chunk.token for chunk in greedy(small)]
    used = {*small[1].apply_chat_template([{"role": "user", "content": PROMPT}])}
    joined = {part for merge in MERGES for part in (*merge.split(), merge.replace(" ", ""))}
    token = next(i for i in plain if i not in used and names[i] not in joined)

    def edit(writer, tensors) -> None:
        fields = writer.kv_data[0]
        for key, value in (("tokens", "<|mine|>"), ("token_type", 3)):
            old = fields[f"tokenizer.ggml.{key}"].value
            fields[f"tokenizer.ggml.{key}"].value = [*old[:token], value, *old[token + 1 :]]

    other = load(write_gguf(tmp_path / "other.gguf", RandomModel(3, max_position_embeddings=256), edit=edit))
    hidden = greedy(other)
    assert [chunk.token for chunk in hidden] == plain
    assert "<|mine|>" not in "".join(chunk.text for chunk in hidden)
    assert "<|mine|>" in "".join(chunk.text for chunk in greedy(other, skip_special_tokens=False))
    chunks = greedy(other, stop="<|mine|>")
    assert (len(chunks), chunks[-1].finish_reason) == (plain.index(token) + 1, "stop")


@each(
    ("ids", "length"),
    [
        (list(range(200)), 0),
        ([*range(50), *[7] * 64], 1),
        ([*range(50), *[7] * 63], 0),
        ([*range(50), *[1, 2, 3] * 22], 3),
        ([*range(50), *list(range(100, 130)) * 4], 30),
        ([*range(50), *list(range(100, 130)) * 3], 0),
        ([5] * 10, 0),
        ([], 0),
    ],
)
def test_a_text_that_repeats_itself_is_noticed(ids: list[int], length: int):
    assert repeated_tokens(ids) == length


def test_a_repeated_text_is_said(small):
    chunks = greedy(small, 120, logit_bias={5: 1e6})
    assert {chunk.stats.repeated_tokens for chunk in chunks[-1:]} == {1}
    assert all(a.token == b.token for a, b in pairwise(chunks))
    answers = batch_generate(*small, [PROMPT] * 2, max_tokens=[120, 60], temperature=0, logit_bias={5: 1e6})
    assert [answer.repeated_tokens for answer in answers] == [1, 0]
    stop = small[1].decode([5]) * 80
    (answer,) = batch_generate(*small, [PROMPT], max_tokens=120, temperature=0, logit_bias={5: 1e6}, stop=stop)
    assert (answer.finish_reason, answer.repeated_tokens) == ("stop", 0)
