"""The token loop on small models against transformers' generate, and its edges."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qwen_mlx import QwenMLXError, SamplingSettings, generate, load, stream_generate
from qwen_mlx.backend import mx
from qwen_mlx.generation.engine import default_prefill_step_size, generate_tokens
from qwen_mlx.generation.settings import GenerationSettings
from qwen_mlx.generation.text import TextStream, encode_prompt
from reference.lazy import torch
from reference.small_models import IM_END, IM_START, RandomModel, to_hf, write_gguf
from tests.helpers.cases import each

PROMPT = "hello world, hello"


@pytest.fixture(scope="module")
def weights():
    return RandomModel(3, max_position_embeddings=256)


@pytest.fixture(scope="module")
def small(weights, tmp_path_factory: pytest.TempPathFactory):
    return load(write_gguf(tmp_path_factory.mktemp("small") / "m.gguf", weights, T.Q8_0))


@pytest.fixture(scope="module")
def theirs(weights, small):
    return to_hf(weights)


def take(count: int, model, prompt: list[int], sampling: SamplingSettings | None = None, cache=None, **settings):
    """The first ids that the loop makes; greedy without `sampling`."""
    settings = GenerationSettings(sampling or SamplingSettings(), **settings)
    return [token.id for token in islice(generate_tokens(model, prompt, settings, cache=cache), count)]


def test_greedy_ids_equal_transformers_generate(small, theirs):
    model, tokenizer = small
    prompt = encode_prompt(tokenizer, PROMPT)
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=0)
    for chunk in (512, 7, 1):
        ids = take(60, model, prompt, prefill_step_size=chunk)
        assert ids == expected[0, len(prompt) :].tolist()


def test_repetition_penalty_equals_transformers_generate(small, theirs):
    model, tokenizer = small
    prompt = encode_prompt(tokenizer, PROMPT)
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, repetition_penalty=1.3, pad_token_id=0
        )
    ids = take(40, model, prompt, SamplingSettings(repetition_penalty=1.3))
    assert ids == expected[0, len(prompt) :].tolist()
    assert ids != take(40, model, prompt)


def test_no_repeat_ngram_and_min_tokens_equal_transformers_generate(theirs, tmp_path: Path):
    model, tokenizer = load(write_gguf(tmp_path / "m.gguf", theirs, T.F32))
    prompt = encode_prompt(tokenizer, PROMPT)
    plain = [chunk.token for chunk in stream_generate(model, tokenizer, prompt, max_tokens=40, temperature=0)]
    tokenizer.eos_token_ids = {plain[3]}  # what greedy says fourth ends the text
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": plain[3]}
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([prompt]), no_repeat_ngram_size=2, min_new_tokens=20, **settings)[
            0, len(prompt) :
        ].tolist()
    arguments = {"max_tokens": 40, "temperature": 0, "no_repeat_ngram_size": 2, "min_tokens": 20}
    ours = [chunk.token for chunk in stream_generate(model, tokenizer, prompt, **arguments)]
    assert ours == expected
    assert len(ours) >= 20
    assert ours != plain


def test_logprobs_are_those_of_the_model_s_own_logits(small):
    model, tokenizer = small
    prompt = encode_prompt(tokenizer, PROMPT)
    arguments = {"max_tokens": 12, "temperature": 1.5, "presence_penalty": 2.0, "seed": 4, "logprobs": 3}
    chunks = list(stream_generate(model, tokenizer, prompt, **arguments))
    ids = [chunk.token for chunk in chunks]
    assert ids == [
        chunk.token for chunk in stream_generate(model, tokenizer, prompt, **(arguments | {"logprobs": None}))
    ]
    logits = torch.from_numpy(np.array(model(mx.array([[*prompt, *ids]])))).double()
    expected = torch.log_softmax(logits[0, len(prompt) - 1 : -1], -1)
    for row, chunk in zip(expected, chunks):
        assert abs(chunk.logprob - row[chunk.token]) < 1e-4
        best = torch.topk(row, 3)
        assert [token for token, _ in chunk.top_logprobs] == best.indices.tolist()
        np.testing.assert_allclose([value for _, value in chunk.top_logprobs], best.values, atol=1e-4)


@each(
    ("arguments", "words"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logprobs": 101}, "logprobs is 101"),
        ({"logit_bias": {10**6: 1.0}}, "names token 1000000"),
        ({"temp": 0}, "There is no argument 'temp': did you mean 'temperature'"),
        ({"max_new_tokens": 5}, "did you mean 'max_tokens'"),
        ({"zzzzqqqq": 5}, "There is no argument 'zzzzqqqq': choose from cache, "),
    ],
)
def test_settings_beyond_the_basics_are_refused_before_any_work(small, arguments, words):
    model, tokenizer = small
    with pytest.raises(QwenMLXError, match=words):
        stream_generate(model, tokenizer, PROMPT, **arguments)


def test_a_prompt_is_a_message_a_list_of_messages_raw_text_or_ids(small):
    _, tokenizer = small
    ids = encode_prompt(tokenizer, "hello")
    assert ids[0] == IM_START
    assert ids == encode_prompt(tokenizer, [{"role": "user", "content": "hello"}])
    assert ids == encode_prompt(tokenizer, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", raw=True)
    assert encode_prompt(tokenizer, [1, 2, 3]) == encode_prompt(tokenizer, np.array([1, 2, 3])) == [1, 2, 3]
    assert len(encode_prompt(tokenizer, "hello", system="h")) > len(ids)


def test_seed_repeats_and_another_differs(small):
    model, tokenizer = small
    texts = [
        generate(model, tokenizer, PROMPT, max_tokens=30, temperature=1.0, top_k=0, top_p=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_chunks_join_to_the_text_and_carry_statistics(small):
    model, tokenizer = small
    chunks = list(stream_generate(model, tokenizer, PROMPT, max_tokens=25, temperature=0))
    ids = take(25, model, encode_prompt(tokenizer, PROMPT))
    assert [chunk.token for chunk in chunks] == ids
    assert "".join(chunk.text for chunk in chunks) == tokenizer.decode(ids)
    assert [chunk.finish_reason for chunk in chunks] == [None] * 24 + ["length"]
    stats = chunks[-1].stats
    assert (stats.prompt_tokens, stats.generated_tokens) == (len(encode_prompt(tokenizer, PROMPT)), 25)
    assert stats.prompt_seconds > 0
    assert stats.generation_seconds > 0


def test_stop_string_ends_the_text_before_it_wherever_tokens_break(small):
    model, tokenizer = small
    text = generate(model, tokenizer, PROMPT, max_tokens=40, temperature=0)
    for start in range(3, len(text) - 3, 5):
        stop = text[start : start + 3]
        chunks = list(stream_generate(model, tokenizer, PROMPT, max_tokens=40, temperature=0, stop=["\0never", stop]))
        assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
        assert chunks[-1].finish_reason == "stop"


class Pieces:
    """A tokenizer whose token i is the i-th of some pieces of text."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def detokenizer(self, skip_special_tokens: bool) -> Pieces:
        return self

    def add(self, token: int) -> str:
        return self._pieces[token]

    def finish(self) -> str:
        return ""


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("abc", max_size=4), min_size=1, max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
    st.booleans(),
)
def test_the_first_stop_string_of_all_ends_the_text(pieces: list[str], stop: list[str], ended: bool):
    """A text is cut where the earliest of them begins, once one is complete; nothing else of it is lost, and what may
    begin one is not given out before."""
    end = len(pieces)
    settings = GenerationSettings(stop=tuple(stop), max_tokens=end + ended, eos_token_ids=(end,))
    stream, text, given_out, why = TextStream(Pieces(pieces), settings), "", "", None
    for token in range(end + ended):
        text += pieces[token] if token < end else ""
        starts = [text.find(s) for s in stop if s in text]
        last = token == end - 1 + ended
        new, why = stream.add(token)
        given_out += new
        if starts:
            assert (given_out, why) == (text[: min(starts)], "stop")
            return
        assert why == (("stop" if ended else "length") if last else None)
        begun = [n for n in range(1, len(text) + 1) if any(s.startswith(text[-n:]) for s in stop)]
        assert given_out == (text if last else text[: len(text) - max(begun, default=0)])


def test_one_stop_string_and_numpy_s_numbers_are_taken(small):
    model, tokenizer = small
    text = generate(model, tokenizer, PROMPT, max_tokens=40, temperature=0)
    arguments = {
        "max_tokens": np.int64(40),
        "temperature": np.float32(0),
        "min_tokens": np.uint8(2),
        "top_k": np.int32(9),
    }
    arguments |= {"seed": np.uint64(3), "prefill_step_size": np.int16(7), "logprobs": np.int8(1)}
    assert generate(model, tokenizer, PROMPT, stop=text[9:12], **arguments) == text[: text.index(text[9:12])]


def test_the_device_decides_how_much_of_a_prompt_is_read_in_one_pass(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    assert default_prefill_step_size() == 512
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    for name, memory, expected in (("memory_size", 8, 512), ("memory_size", 64, 2048), ("total_memory", 139, 2048)):
        monkeypatch.setattr(mx, "device_info", lambda found={name: memory << 30}: found)
        assert default_prefill_step_size() == expected


def test_text_held_back_for_a_stop_string_is_not_lost(small):
    model, tokenizer = small
    text = generate(model, tokenizer, PROMPT, max_tokens=40, temperature=0)
    assert generate(model, tokenizer, PROMPT, max_tokens=40, temperature=0, stop=[text[-4:] + "\0"]) == text


@pytest.mark.parametrize("end", [IM_END, IM_END - 2], ids=["im_end", "endoftext"])
def test_both_end_tokens_stop(tmp_path: Path, end: int):
    """The head is made to answer with the end token always."""
    spoilt = RandomModel(max_position_embeddings=256)
    weights = spoilt.state_dict()
    weights["lm_head.weight"][:] = 0
    weights["lm_head.weight"][end] = 1
    weights["model.norm.weight"][:] = 0.01
    np.abs(weights["model.embed_tokens.weight"], out=weights["model.embed_tokens.weight"])
    model, tokenizer = load(write_gguf(tmp_path / "m.gguf", spoilt))
    sign = float(model(mx.array([encode_prompt(tokenizer, PROMPT)]))[0, -1, end].item())
    if sign < 0:
        model.lm_head.weight = -model.lm_head.weight
    chunks = list(stream_generate(model, tokenizer, PROMPT, max_tokens=9, temperature=0))
    assert [(chunk.text, chunk.token, chunk.finish_reason) for chunk in chunks] == [("", end, "stop")]


def test_context_ends_the_text(small):
    model, tokenizer = small
    ids = [5] * 250
    chunks = list(stream_generate(model, tokenizer, ids, max_tokens=100, min_tokens=50, temperature=0))
    assert len(chunks) == 6
    assert chunks[-1].finish_reason == "length"


def test_tokens_of_a_cache_take_room_in_the_context_too(small):
    model, tokenizer = small
    cache, ids = model.make_cache(), [7] * 5
    mx.eval(model(mx.array([[5] * 251]), cache))
    with pytest.raises(QwenMLXError, match="prompt has 256 tokens and the model's context 256"):
        stream_generate(model, tokenizer, ids, cache=cache)
    for layer in cache:
        layer.trim(3)
    chunks = list(stream_generate(model, tokenizer, ids, max_tokens=9, temperature=0, cache=cache))
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"]


def test_cache_is_continued(small):
    model, tokenizer = small
    cache = model.make_cache()
    prompt = encode_prompt(tokenizer, PROMPT)
    whole = take(8, model, prompt)
    model(mx.array([prompt[:-4]]), cache)
    assert take(8, model, prompt[-4:], cache=cache) == whole


@each(
    ("prompt", "arguments", "words"),
    [
        ("", {}, "empty"),
        ("", {"raw": True}, "no tokens"),
        ([], {}, "no tokens"),
        ("x", {"max_tokens": 0}, "max_tokens"),
        ("x", {"max_tokens": 2.5}, "max_tokens"),
        ("x", {"prefill_step_size": 0}, "prefill_step_size"),
        ("x", {"seed": -1}, "seed"),
        ("x", {"seed": 2**64}, "seed"),
        ("x", {"seed": "a"}, "seed"),
        ("x", {"stop": [5]}, "stop"),
        ("x", {"stop": None}, "stop"),
        (None, {}, "NoneType"),
        (b"hi", {}, "bytes"),
        ({"role": "user", "content": "x"}, {}, "dict"),
        ([{"role": "user", "content": 5}], {}, "content"),
        ("x", {"temperature": -1}, "temperature"),
        ("x", {"top_p": 0}, "top_p"),
        ("x", {"stop": [""]}, "stop"),
        ("x", {"stop": ""}, "stop"),
        ("x", {"stop": {"text"}}, "stop"),
        ("x", {"raw": True, "system": "s"}, "system"),
        ([5] * 256, {}, "256 tokens and the model's context 256"),
        ([5, 263], {}, "token id 263"),
        ([-1], {}, "token id -1"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(small, prompt, arguments, words):
    model, tokenizer = small
    with pytest.raises(QwenMLXError, match=words):
        stream_generate(model, tokenizer, prompt, **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_not_token_0(weights, tmp_path: Path, value: float):
    model, tokenizer = load(write_gguf(tmp_path / "m.gguf", weights))
    model.lm_head.weight[7, 3] = value
    with pytest.raises(QwenMLXError, match="not finite"):
        generate(model, tokenizer, PROMPT, max_tokens=3)


def test_verbose_prints_the_text_as_mlx_lm_does_and_then_its_cost(small, capsys):
    model, tokenizer = small
    text = generate(model, tokenizer, PROMPT, max_tokens=5, temperature=0, verbose=True)
    written = capsys.readouterr().out
    assert written.startswith(f"{text}\nprompt: ")
    assert "generation: 5 tokens, " in written
    assert text == generate(model, tokenizer, PROMPT, max_tokens=5, temperature=0)
    assert capsys.readouterr().out == ""
