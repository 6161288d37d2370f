"""Structured output on small models: masks, answers, batches, drafts and refusals."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mlx import Chat, QwenMLXError, batch_generate, generate, load, stream_generate
from qwen_mlx.generation import closing, grammars
from qwen_mlx.generation.chat import ToolResult
from qwen_mlx.generation.engine import Rows
from qwen_mlx.generation.grammars import LARGEST
from qwen_mlx.generation.sampling import SamplingSettings
from qwen_mlx.generation.settings import GenerationSettings
from qwen_mlx.generation.structured import check_grammar, constraint, tool_call_constraint
from qwen_mlx.generation.tools import parse_tool_calls, tools_by_name
from reference.small_models import IM_END, RandomModel, write_gguf
from tests.helpers.cases import each

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cat", "dog", None, 3]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    return load(write_gguf(tmp_path_factory.mktemp("small") / "m.gguf", RandomModel(5)))


def tokens_of(mask: np.ndarray, size: int) -> set[int]:
    return {i for i in range(size) if mask[i // 32] >> i % 32 & 1}


def test_a_mask_allows_the_tokens_that_can_still_lead_to_a_match(small):
    """Against every string of the language."""
    tokenizer = small[1]
    strings = [f"{a}{n}{b}" for a in ("h", "hell", "hello") for n in range(3) for b in ("", "é", "ll")]
    matcher = constraint(tokenizer, regex="(h|hell|hello)[0-2](é|ll)?").start(99)
    texts = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if i not in tokenizer.special.values()}
    written = b""
    for token in tokenizer.encode("hello1é"):
        expected = {i for i, text in texts.items() for s in strings if s.encode().startswith(written + text)}
        ends = tokenizer.eos_token_ids if written.decode("utf-8", "replace") in strings else set()
        assert tokens_of(matcher.mask(), tokenizer.vocab_size) == expected | ends
        assert not matcher.finished
        matcher.accept(token)
        written += texts[token]
    assert tokens_of(matcher.mask(), tokenizer.vocab_size) == tokenizer.eos_token_ids
    assert matcher.finished
    matcher.accept(IM_END)
    assert tokens_of(matcher.mask(), tokenizer.vocab_size) == set(range(tokenizer.vocab_size)), (
        "a row goes on for nothing"
    )
    assert matcher.error is None


def test_matchers_of_one_constraint_do_not_share_a_state(small):
    made = constraint(small[1], choices=["hello", "he1"])
    first, second = made.start(9), made.start(9)
    before = tokens_of(second.mask(), 263)
    first.accept(small[1].encode("hello")[0])
    first.mask()
    assert tokens_of(second.mask(), 263) == before


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of values that are not long, so that an answer has room for them."""
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n},
            st.integers(-99, 99),
            st.integers(0, 50),
        ),
        st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
        st.builds(
            lambda v: {"enum": v}, st.lists(st.sampled_from(["a", 'b"', "ü", 1, None, False]), min_size=1, max_size=3)
        ),
        st.builds(lambda v: {"const": v}, st.sampled_from(["x\n", 0, True, [1, "y"], {"k": None}])),
    )

    def wider(inner: st.SearchStrategy) -> st.SearchStrategy:
        arrays = st.builds(lambda s, n: {"type": "array", "items": s, "maxItems": n}, inner, st.integers(0, 2))
        names = st.dictionaries(st.sampled_from(["a", "b c", "d"]), inner, max_size=2)
        objects = st.builds(
            lambda p, n: {"type": "object", "properties": p, "required": list(p)[:n], "additionalProperties": False},
            names,
            st.integers(0, 2),
        )
        return st.one_of(arrays, objects, st.builds(lambda s: {"anyOf": s}, st.lists(inner, min_size=1, max_size=2)))

    return st.recursive(leaves, wider, max_leaves=4)


@given(schema=schemas(), seed=st.integers(0, 99), temperature=st.sampled_from([0, 1.0, 3.0]))
@settings(max_examples=25, deadline=None)
def test_an_answer_parses_and_satisfies_its_schema(small, schema, seed, temperature):
    chunks = list(
        stream_generate(*small, "hello", schema=schema, seed=seed, temperature=temperature, max_tokens=200, top_k=0)
    )
    assert chunks[-1].finish_reason == "stop"
    value = json.loads("".join(chunk.text for chunk in chunks))
    jsonschema.validate(value, schema)


@each(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 2.0, "top_k": 5, "seed": 1},
        {"temperature": 2.0, "top_p": 0.3, "min_p": 0.2, "typical_p": 0.5, "seed": 2},
        {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.01, "seed": 3},
        {"temperature": 0, "repetition_penalty": 1.8, "presence_penalty": 2.0, "frequency_penalty": 1.0},
        {"temperature": 0, "draft_model": "prompt-lookup"},
        {"temperature": 1.5, "draft_model": "prompt-lookup", "seed": 4},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_sampler_and_draft_keeps_to_the_schema(small, settings):
    prompt = 'hello {"name": "hello", "kind": "cat", "tags": [true, true]} {"name": "'
    text = generate(*small, prompt, schema=PERSON, max_tokens=120, **settings)
    jsonschema.validate(json.loads(text), PERSON)


def test_drafts_do_not_change_a_greedy_answer(small):
    prompt = 'hello {"name": "hello", "kind": "cat", "tags": [true, true]} {"name": "'
    plain = generate(*small, prompt, schema=PERSON, max_tokens=120, temperature=0)
    for draft in ("prompt-lookup", small[0]):
        stats, text = None, ""
        chunks = stream_generate(*small, prompt, schema=PERSON, max_tokens=120, temperature=0, draft_model=draft)
        for chunk in chunks:
            stats, text = chunk.stats, text + chunk.text
        assert text == plain
        assert stats.drafted_tokens > 0


def test_rows_of_a_batch_keep_each_to_its_own(small):
    """Structured and free rows together, joining and leaving: each gets the tokens that it gets alone."""
    model, tokenizer = small
    kinds = [{"json_schema": PERSON}, None, {"regex": "[0-9]{3}hello"}, {"choices": ["hello", "he"]}, None]
    every = []
    for number, kind in enumerate(kinds):
        sampling = SamplingSettings(temperature=1.0 if number % 2 else 0.0)
        made = constraint(tokenizer, **kind) if kind else None
        ends = tuple(sorted(tokenizer.eos_token_ids))
        every.append(GenerationSettings(sampling, seed=number, eos_token_ids=ends, constraint=made))
    prompts = [tokenizer.encode("hello" * (n + 1)) for n in range(5)]

    def alone(prompt, one) -> list[int]:
        rows = Rows(model)
        rows.add([prompt], [one])
        return [rows.step()[0].id for _ in range(12)]

    expected = [alone(prompt, one) for prompt, one in zip(prompts, every)]
    rows = Rows(model)
    rows.add(prompts[:3], every[:3])
    got: dict[int, list[int]] = {n: [] for n in range(5)}
    active = [0, 1, 2]
    for step in range(16):
        if step == 2:
            rows.add(prompts[3:], every[3:])
            active += [3, 4]
        if step == 12:
            rows.keep([2, 3, 4])
            active = [2, 3, 4]
        for number, token in zip(active, rows.step()):
            got[number].append(token.id)
    for number, ids in enumerate(expected):
        assert got[number][:12] == ids, number


def test_a_batch_of_prompts(small):
    results = batch_generate(*small, ["hello", "he", "ll" * 9], schema=PERSON, max_tokens=120, temperature=1.0, seed=3)
    for result in results:
        jsonschema.validate(json.loads(result.text), PERSON)
        assert result.finish_reason == "stop"
    assert len({result.text for result in results}) > 1


@each(
    ("kind", "pattern"),
    [
        ({"regex": r"\d{3}-[a-f]+x"}, r"\d{3}-[a-f]+x"),
        ({"choices": ["yes", 'no "quoted"\n\\', "ünï"]}, r'yes|no "quoted"\n\\|ünï'),
        ({"grammar": 'start: "(" start ")" | "x"'}, r"\(*x\)*"),
        ({"json_object": True}, r"\{.*\}"),
    ],
)
def test_other_kinds(small, kind, pattern):
    limit = {} if "json_object" not in kind else {"logit_bias": {small[1].encode("}")[0]: 1e4}}
    made = constraint(small[1], **kind)
    texts = {generate(*small, "hello", schema=made, temperature=1.0, seed=n, max_tokens=300, **limit) for n in range(3)}
    for text in texts:
        assert re.fullmatch(pattern, text, re.DOTALL), text


@given(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_an_answer_is_one_of_any_choices(small, choices):
    text = generate(*small, "hello", schema=constraint(small[1], choices=choices), temperature=1.0, max_tokens=50)
    assert text in choices


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
        },
    },
}


def clock(seconds: int) -> str:
    """Waits.

    Args:
        seconds: The time.
    """
    return str(seconds)


@pytest.mark.heavy
@pytest.mark.parametrize("most", [1, 3])
def test_calls_of_tools_are_ones_that_run(small, most):
    """A random model calls tools in their own form, with arguments that their schemas allow."""
    tools = tools_by_name([TOOL, clock])
    made = tool_call_constraint(small[1], [TOOL, clock], most)
    calls = []
    for seed in range(2):
        text = generate(*small, "hello", schema=made, seed=seed, temperature=1.0, max_tokens=400)
        calls.append(parse_tool_calls(text, tools))
        assert text.startswith("<tool_call>")
        assert text.endswith("</tool_call>")
    assert all(call.error is None for answer in calls for call in answer)
    assert {len(answer) for answer in calls} <= set(range(1, most + 1))
    assert {call.name for answer in calls for call in answer} <= {"weather", "clock"}
    with pytest.raises(QwenMLXError, match="There is no tool to call"):
        tool_call_constraint(small[1], [])


@pytest.mark.parametrize("choice", ["required", "clock"])
def test_a_turn_of_a_chat_can_be_made_to_begin_with_a_call(small, choice):
    model, tokenizer = small
    plain, names = tokenizer.chat_template, "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    tokenizer.chat_templates["default"] = names + plain
    try:
        chat = Chat(model, tokenizer, tools=[clock, TOOL], tool_choice=choice, max_tokens=200, seed=3, temperature=1.0)
        events = list(chat.send("hello"))
        with pytest.raises(QwenMLXError, match="There is no tool 'clok': did you mean 'clock'"):
            Chat(model, tokenizer, tools=[clock], tool_choice="clok")
    finally:
        tokenizer.chat_templates["default"] = plain
    (result,) = (event for event in events if isinstance(event, ToolResult))
    assert result.call.error is None
    assert result.call.name in (["clock"] if choice == "clock" else ["clock", "weather"])
    assert not chat.messages[-1]["content"].startswith("<tool_call>"), "after the result the answer is free"


def test_text_that_is_not_normalized_is_written_as_it_is(small):
    """The tokenizer would make other characters of these: U+8C48, and an e with its accent."""
    for choice in ("\uf900", "e\u0301", "\x7f", "\U0001f600"):
        assert generate(*small, "hello", schema=constraint(small[1], choices=[choice]), max_tokens=9) == choice


def test_any_json_and_classes_of_pydantic(small):
    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return PERSON

    jsonschema.validate(json.loads(generate(*small, "x", schema=Model, max_tokens=120)), PERSON)
    jsonschema.validate(json.loads(generate(*small, "x", schema=json.dumps(PERSON), max_tokens=120)), PERSON)
    bias = {small[1].encode(letter)[0]: 1e3 for letter in '0"}]'}
    assert json.loads(generate(*small, "x", schema=True, max_tokens=90, logit_bias=bias, temperature=0)) is not None


def test_log_probabilities_are_the_model_s_own(small):
    made = constraint(small[1], choices=["hello"])
    (free, *_), (bound, *_) = (
        list(stream_generate(*small, "hello", schema=schema, logprobs=100, temperature=0, max_tokens=1))
        for schema in (None, made)
    )
    assert bound.token == small[1].encode("hello")[0]
    assert bound.top_logprobs == free.top_logprobs
    assert bound.logprob == pytest.approx(dict(free.top_logprobs).get(bound.token, bound.logprob), abs=1e-6)
    assert bound.logprob < free.logprob


NESTED = {
    "type": "array",
    "items": {"$ref": "#/$defs/node"},
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"s": {"type": "string"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["s", "next"],
            "additionalProperties": False,
        }
    },
}


@each("draft", [None, "prompt-lookup"])
@each("schema", [PERSON, NESTED, {"type": "string"}, True], ids=["person", "nested", "string", "any"])
def test_json_that_max_tokens_ends_is_complete_and_says_so(small, schema, draft):
    """A random model does not end strings by itself."""
    ended = set()
    for seed, most in enumerate((60, 75, 110)):
        settings = {"max_tokens": most, "seed": seed, "temperature": 1.0, "draft_model": draft}
        chunks = list(stream_generate(*small, "hello", schema=schema, **settings))
        jsonschema.validate(json.loads("".join(chunk.text for chunk in chunks)), schema)
        ended.add(chunks[-1].finish_reason)
        assert len(chunks) <= most
    assert ended <= {"stop", "length"}
    if schema == {"type": "string"}:
        assert "length" in ended


@given(schema=schemas(), seed=st.integers(0, 99), most=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_json_of_any_length_is_complete_or_refused(small, schema, seed, most):
    try:
        text = generate(*small, "hello", schema=schema, seed=seed, temperature=1.0, max_tokens=most)
    except QwenMLXError as error:
        assert f"fits into max_tokens, {most}; give more" in str(error)  # noqa: PT017
        constraint(small[1], json_schema=schema).check_fits(200)
    else:
        jsonschema.validate(json.loads(text), schema)


@each(
    "schema",
    [{"type": "string", "pattern": r"\d{1000}"}, {"type": "array", "items": {"type": "integer"}, "minItems": 10**8}],
    ids=["pattern", "items"],
)
def test_the_search_for_an_end_has_one(small, schema, monkeypatch):
    monkeypatch.setattr(closing, "STEPS", 64)
    with pytest.raises(QwenMLXError, match="fits into max_tokens"):
        constraint(small[1], json_schema=schema).check_fits(10**15)


def test_a_regular_expression_may_be_cut(small):
    made = constraint(small[1], regex="(hello){100}")
    chunks = list(stream_generate(*small, "hello", schema=made, max_tokens=5))
    assert chunks[-1].finish_reason == "length"
    assert "".join(chunk.text for chunk in chunks) == "hello" * 5


def test_a_batch_is_closed_too(small):
    results = batch_generate(*small, ["hello", "he"], schema=NESTED, max_tokens=[40, 70], temperature=1.0, seed=2)
    for result in results:
        jsonschema.validate(json.loads(result.text), NESTED)


@pytest.mark.parametrize("draft", [None, "prompt-lookup"])
def test_a_bias_against_all_that_is_allowed_ends_with_a_sentence(small, draft):
    bias = dict.fromkeys(range(small[1].vocab_size), float("-inf"))
    with pytest.raises(
        QwenMLXError, match=r'The structured output cannot go on: Parser Error: token "!" doesn.t satisfy the grammar'
    ):
        generate(
            *small,
            "hello",
            schema=constraint(small[1], choices=["hello"]),
            logit_bias=bias,
            draft_model=draft,
            temperature=0,
        )


@each(
    ("kind", "words"),
    [
        ({}, "Nothing is given, expected one of json_schema"),
        ({"regex": "a", "choices": ["b"]}, "regex and choices are given"),
        ({"regex": "(a"}, "The regex cannot be used: .*unclosed group"),
        ({"regex": 3}, "The regex is int, expected a string"),
        ({"regex": "[a&&b]"}, "The regex cannot be used: nothing satisfies it"),
        ({"grammar": 'start: "a'}, "The grammar cannot be used: .*lexer error"),
        ({"grammar": 'foo: "a"'}, "The grammar cannot be used: no start rule"),
        ({"grammar": "start: " + "x" * (1 << 15)}, "The grammar has 32,775 characters, expected at most 32,768"),
        ({"choices": []}, "choices is .*expected a list of strings that are not empty"),
        ({"choices": "ab"}, "choices is 'ab', expected a list"),
        ({"choices": ["a", ""]}, "choices is"),
        ({"json_schema": {"type": "strin"}}, "The json_schema cannot be used: Invalid type: strin"),
        ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "Unsatisfiable schema"),
        ({"json_schema": False}, "The json_schema cannot be used: nothing satisfies it"),
        ({"json_schema": "false"}, "nothing satisfies it"),
        ({"json_schema": {"not": {"type": "null"}}}, "Unimplemented keys"),
        ({"json_schema": {"x-guidance": {"lenient": True}, "not": {"type": "null"}}}, "Unimplemented keys"),
        ({"json_schema": {"$ref": "http://127.0.0.1:9/s.json"}}, "The json_schema cannot be used"),
        ({"json_schema": "{"}, "The json_schema is not JSON"),
        ({"json_schema": {"enum": [{1, 2}]}}, "The json_schema is not JSON"),
        ({"json_schema": {"items": {"multipleOf": 1_000_003}}}, "multipleOf 1000003 has more than 10,000 remainders"),
        ({"json_schema": {"multipleOf": 1.00003}}, "multipleOf 1.00003 has more"),
        ({"json_schema": {"enum": [float("nan")]}}, "The json_schema"),
        ({"json_schema": [1]}, "The json_schema is list, expected a mapping or true"),
        ({"json_schema": {"enum": ["x" * LARGEST]}}, "The json_schema has .* characters, expected at most 262,144"),
        ({"json_schema": "[" * 100_000}, "The json_schema is not JSON"),
        ({"json_schema": '{"items":' * 5000 + "{}" + "}" * 5000}, "The json_schema"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals_are_one_sentence(small, kind, words):
    with pytest.raises(QwenMLXError, match=words) as caught:
        constraint(small[1], **kind)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_what_is_wrong_without_a_tokenizer_is_refused_without_one():
    check_grammar(json_schema=PERSON)
    for kind, words in (
        ({"json_schema": {"type": "strin"}}, "Invalid type"),
        ({"regex": "(a"}, "unclosed group"),
        ({"grammar": "start: nothing"}, "The grammar cannot be used"),
    ):
        with pytest.raises(QwenMLXError, match=words):
            check_grammar(**kind)


@pytest.mark.parametrize("part", ["STACK", "HEAP"])
def test_a_grammar_for_which_there_is_no_memory_is_a_sentence(small, part: str, monkeypatch: pytest.MonkeyPatch):
    size = threading.stack_size()
    monkeypatch.setattr(grammars, part, 1 << 50)
    for compiles in (lambda: check_grammar(regex="a"), lambda: constraint(small[1], regex="a")):
        with pytest.raises(QwenMLXError, match="There is no memory to compile a grammar"):
            compiles()
    assert threading.stack_size() == size
    monkeypatch.undo()
    check_grammar(regex="a")


def test_min_tokens_does_not_go_with_a_schema(small):
    with pytest.raises(QwenMLXError, match="min_tokens does not go with structured output"):
        generate(*small, "hello", schema=PERSON, min_tokens=3)


def test_the_tokenizer_is_not_kept(tmp_path: Path):
    tokenizer = load(write_gguf(tmp_path / "m.gguf", RandomModel()))[1]
    constraint(tokenizer, choices=["hello"])
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


@pytest.mark.heavy
def test_without_the_extra_one_sentence_says_what_to_install(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel())
    code = f"""
import sys
import time
sys.modules["llguidance"] = None
from qwen_mlx import generate, load
made = load({str(path)!r})
assert generate(*made, "hello", max_tokens=3)
generate(*made, "hello", schema=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "install qwen_mlx with its extra structured" in done.stderr.splitlines()[-1]


def test_real_answers_satisfy_their_schema(real_gguf: Path):
    """The real model, asked in words: its own greedy text is the same with a draft and in a batch."""
    model, tokenizer = load(real_gguf)
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "sports": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "age", "sports"],
        "additionalProperties": False,
    }
    prompt = "Anna is 34, plays chess and swims. Answer with a JSON object of name, age and sports."
    text = generate(model, tokenizer, prompt, schema=schema, temperature=0, max_tokens=60)
    jsonschema.validate(json.loads(text), schema)
    assert json.loads(text)["age"] == 34
    drafted = generate(
        model, tokenizer, prompt, schema=schema, temperature=0, max_tokens=60, draft_model="prompt-lookup"
    )
    assert drafted == text
    digits = constraint(tokenizer, regex=r"[0-9]{1,3}")
    (answer,) = batch_generate(model, tokenizer, ["How old is Anna, who is 34?"], schema=digits, temperature=0)
    assert answer.text == "34"


def test_a_short_expression_cannot_take_seconds(small):
    """0.4 s of the processor, of which a request to a server may ask for as many as it likes."""
    start = time.process_time()
    constraint(small[1], regex="(a{1000}){1000}")
    assert time.process_time() - start < 1.5


@each("declared", ["", '%llguidance {"no_forcing": false}\n'])
def test_a_grammar_whose_answer_has_no_end_is_cut(small, declared):
    """The first pattern takes every "a", so that only an "a" may ever follow."""
    made = constraint(small[1], grammar=declared + "start: /a+/ /a+/")
    (chunk,) = list(stream_generate(*small, "hello", schema=made, max_tokens=8))[-1:]
    assert chunk.finish_reason == "length"


DEEP_RULES = "".join(f"r{i:x}:r{i + 1:x}\n" for i in range(3000))
DEEP_SCHEMAS = {f"a{i}": {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/a{i + 1}"}]} for i in range(3500)}


@each(
    "kind",
    [
        {"grammar": f'start: r0\n{DEEP_RULES}rbb8: "x"'},
        {"json_schema": {"$ref": "#/$defs/a0", "$defs": DEEP_SCHEMAS | {"a3500": {"type": "null"}}}},
    ],
    ids=lambda kind: next(iter(kind)),
)
def test_rules_that_name_one_another_deeply_do_not_end_the_process(small, kind):
    check_grammar(**kind)
    assert constraint(small[1], **kind).start(8).mask().any()
