"""The routes, over real sockets: shapes, refusals, hang-ups, keys and hosts."""

from __future__ import annotations

import concurrent.futures
import json
import re
import socket

import httpx
import jsonschema
import pytest

from benchmarks.server_load import streamed_speed
from qwen_mlx import load, stream_generate
from qwen_mlx.generation.fill import stream_fill
from qwen_mlx.server.limits import Limits
from qwen_mlx.server.llama_cpp import FILL_TOKENS
from qwen_mlx.text.thoughts import Thoughts
from reference.small_models import IM_END
from tests.helpers.cases import each
from tests.helpers.fim_model import FIM_IDS, save_fim_folder
from tests.helpers.running_server import serving, wait_for

pytestmark = pytest.mark.heavy  # together they take many seconds

NO_END = {str(i): -100 for i in (IM_END, IM_END - 2, *FIM_IDS.values())}
CHAT, PLAIN, INFILL = "/v1/chat/completions", "/v1/completions", "/infill"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    return load(save_fim_folder(tmp_path_factory.mktemp("http") / "m", seed=3, max_position_embeddings=512))


@pytest.fixture(scope="module")
def service(small):
    with serving(small, slots=4) as service:
        yield service


@pytest.fixture(scope="module")
def client(service):
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


def hello(**fields) -> dict:
    return {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 6, **fields}


def events(response: httpx.Response) -> list[dict]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    if lines[-1] == "data: [DONE]":
        lines.pop()
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_chat_equals_the_library(small, client):
    expected = list(stream_generate(*small, "hello", temperature=0, max_tokens=6))
    body = client.post(CHAT, json=hello(model="small", logprobs=True, top_logprobs=2)).raise_for_status().json()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "".join(chunk.text for chunk in expected)
    assert choice["finish_reason"] == expected[-1].finish_reason
    assert body["usage"]["completion_tokens"] == len(expected)
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + len(expected)
    assert (body["object"], body["model"]) == ("chat.completion", "small")
    theirs = list(stream_generate(*small, "hello", temperature=0, max_tokens=6, logprobs=2))
    for entry, chunk in zip(choice["logprobs"]["content"], theirs, strict=False):
        assert entry["logprob"] == pytest.approx(chunk.logprob, abs=1e-4)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(
            [p for _, p in chunk.top_logprobs], abs=1e-4
        )


@each("fields", [{}, {"n": 3, "temperature": 1, "seed": 4}, {"stop": ["e", "a"]}, {"logprobs": True}])
def test_a_stream_holds_what_comes_at_once(client, fields):
    asked = hello(max_tokens=12, **fields)
    whole = client.post(CHAT, json=asked).raise_for_status().json()
    pieces = events(client.post(CHAT, json=asked | {"stream": True, "stream_options": {"include_usage": True}}))
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for index, choice in enumerate(whole["choices"]):
        mine = [c for piece in pieces for c in piece["choices"] if c["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content") or "" for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        if "logprobs" in fields:
            tokens = [entry["token"] for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
            assert tokens == [entry["token"] for entry in choice["logprobs"]["content"]]


def test_several_choices_are_the_seeds_from_the_first_on(small, client):
    body = client.post(CHAT, json=hello(n=3, temperature=1, seed=40, max_tokens=9)).json()
    for seed, choice in enumerate(body["choices"], 40):
        expected = "".join(c.text for c in stream_generate(*small, "hello", temperature=1, seed=seed, max_tokens=9))
        assert choice["message"]["content"] == expected


@each("prompt", ["hello", [5, 6, 7], ["hello", "he"], [[5, 6], [7, 8]]], ids=str)
def test_completions_take_text_and_ids(small, client, prompt):
    body = client.post(PLAIN, json={"prompt": prompt, "temperature": 0, "max_tokens": 5, "logprobs": 1}).json()
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    for one, choice in zip(prompts, body["choices"], strict=True):
        expected = list(stream_generate(*small, one, raw=True, temperature=0, max_tokens=5, logprobs=1))
        assert choice["text"] == "".join(chunk.text for chunk in expected)
        logprobs = [chunk.logprob for chunk in expected][: len(choice["logprobs"]["tokens"])]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-4)


def test_echo_puts_the_prompt_first_and_no_tokens_are_fine(client):
    asked = {"prompt": "hello", "temperature": 0, "max_tokens": 4}
    text = client.post(PLAIN, json=asked).json()["choices"][0]["text"]
    assert client.post(PLAIN, json=asked | {"echo": True}).json()["choices"][0]["text"] == "hello" + text
    pieces = events(client.post(PLAIN, json=asked | {"echo": True, "stream": True}))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "hello" + text
    body = client.post(PLAIN, json=asked | {"echo": True, "max_tokens": 0}).json()
    assert body["choices"][0]["text"] == "hello"
    assert body["usage"]["completion_tokens"] == 0


def test_suffix_and_infill_equal_the_library(small, client):
    expected = "".join(c.text for c in stream_fill(*small, "hello ", " hell", max_tokens=12))
    body = client.post(PLAIN, json={"prompt": "hello ", "suffix": " hell", "temperature": 0, "max_tokens": 12}).json()
    assert body["choices"][0]["text"] == expected
    asked = {"input_prefix": "hello ", "input_suffix": " hell", "n_predict": 12}
    assert client.post(INFILL, json=asked).json()["content"] == expected
    assert "".join(e["content"] for e in events(client.post(INFILL, json=asked | {"stream": True}))) == expected
    endless = {"input_prefix": "hello ", "ignore_eos": True, "logit_bias": NO_END}  # which has a limit all the same
    assert client.post(INFILL, json=endless).json()["tokens_predicted"] == FILL_TOKENS
    files = client.post(INFILL, json=asked | {"input_extra": [{"text": "he", "filename": "a.py"}]}).json()
    theirs = stream_fill(*small, "hello ", " hell", files=[("a.py", "he")], max_tokens=12)
    assert files["content"] == "".join(c.text for c in theirs)


@pytest.mark.parametrize("stream", [True, False])
def test_a_thought_is_told_from_the_answer(small, monkeypatch, stream):
    """As of a model whose template has opened a thought, which a mark in its text ends."""
    goes_on = {"temperature": 0, "max_tokens": 60}
    bias = {int(token): value for token, value in NO_END.items()}
    whole = "".join(c.text for c in stream_generate(*small, "hello", **goes_on, logit_bias=bias))
    mark = next(whole[i : i + 2] for i in range(5, len(whole)) if re.fullmatch("[!-~]{2}", whole[i : i + 2]))
    thought, _, answer = whole.partition(mark)
    monkeypatch.setattr(small[1], "thoughts", lambda ids: Thoughts(("<think>", mark), True))
    with serving(small) as service, httpx.Client(base_url=service.url, timeout=60) as client:
        response = client.post(CHAT, json=hello(stream=stream, logit_bias=NO_END) | goes_on).raise_for_status()
    if stream:
        deltas = [piece["choices"][0]["delta"] for piece in events(response)]
        found = ["".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning_content", "content")]
    else:
        message = response.json()["choices"][0]["message"]
        found = [message["reasoning_content"], message["content"]]
    assert found == [thought.strip(), answer.lstrip()]
    assert thought.strip()
    assert answer.strip()


@each("field", ["reasoning_budget", "thinking_token_budget", "thinking_budget_tokens", None])
@each("stream", [True, False])
def test_a_budget_ends_a_thought(small, monkeypatch, field, stream):
    """Given by a request, or by the server for all that give none."""
    monkeypatch.setattr(small[1], "think_marks", ("assistant", "§§"))
    budget, goes_on = {"reasoning_budget": 5}, {"temperature": 0, "max_tokens": 40}
    bias = {int(token): value for token, value in NO_END.items()}
    expected = list(stream_generate(*small, "hello", **budget, **goes_on, logit_bias=bias))
    without = list(stream_generate(*small, "hello", **goes_on, logit_bias=bias))
    with serving(small) as service, httpx.Client(base_url=service.url, timeout=60) as client:
        service.reasoning_budget = 5 if field is None else 7
        for value, chunks in ((5, expected), (-1, without)) if field else ((None, expected),):
            fields = goes_on | ({} if value is None else {field: value})
            response = client.post(CHAT, json=hello(stream=stream, logit_bias=NO_END) | fields).raise_for_status()
            if stream:
                deltas = [piece["choices"][0]["delta"] for piece in events(response)]
            else:
                deltas = [response.json()["choices"][0]["message"]]
            found = ["".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning_content", "content")]
            assert found == ["".join(getattr(c, name) for c in chunks) for name in ("reasoning", "answer")]
    assert "".join(chunk.answer for chunk in expected)
    assert not "".join(chunk.answer for chunk in without)


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["he", "ll"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORMS = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
    "json_schema": SCHEMA,
    "structured_outputs": {"json": SCHEMA},
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": SCHEMA, "strict": True}}
OTHER = {"type": "function", "function": {"name": "sub", "parameters": {"type": "object", "properties": {}}}}


@each("form", FORMS)
@each(("path", "stream"), [(CHAT, False), (CHAT, True), (PLAIN, False), ("/completion", True)])
def test_answers_have_the_form_that_is_asked_for(client, form, path, stream):
    asked = hello() if path == CHAT else {"prompt": "hello"}
    asked |= {form: FORMS[form], "temperature": 1.5, "seed": 3, "max_tokens": 60, "stream": stream}
    response = client.post(path, json=asked).raise_for_status()
    if path == CHAT and stream:
        text = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in events(response))
    elif stream:
        text = "".join(piece["content"] for piece in events(response))
    else:
        choice = response.json()["choices"][0]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
    jsonschema.validate(json.loads(text), SCHEMA)


def test_other_forms(client):
    def text(**form) -> str:
        body = client.post(CHAT, json=hello(max_tokens=40) | {"temperature": 1.5, "seed": 1} | form).raise_for_status()
        return body.json()["choices"][0]["message"]["content"]

    assert isinstance(json.loads(text(response_format={"type": "json_object"})), dict)
    assert re.fullmatch("[ab]{3}x", text(structured_outputs={"regex": "[ab]{3}x"}))
    assert text(structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    assert text(response_format={"type": "text"})


@pytest.mark.parametrize("stream", [True, False])
def test_a_form_that_outgrows_its_bounds_is_the_request_s_mistake(client, stream):
    asked = hello(max_tokens=400, structured_outputs={"regex": "(a{1000}){1000}"}, stream=stream)
    response = client.post(CHAT, json=asked)
    error = (events(response)[-1] if stream else response.json())["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("The structured output cannot go on: ")
    assert stream or response.status_code == 400


def test_rows_of_other_forms_do_not_meet(client):
    """Answers with forms beside others without: each is what it is alone."""
    cases = [hello() | {"max_tokens": 30, "temperature": 1, "seed": i} for i in range(8)]
    cases = [case | ({"json_schema": SCHEMA} if i % 2 else {}) for i, case in enumerate(cases)]

    def send(case: dict) -> str:
        return client.post(CHAT, json=case).json()["choices"][0]["message"]["content"]

    alone = list(map(send, cases))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(send, cases)) == alone


@each("choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=str)
@each("stream", [True, False])
def test_a_call_can_be_forced(client, choice, stream):
    tools = [TOOL] if choice == "required" else [OTHER, TOOL]
    asked = hello() | {"tools": tools, "tool_choice": choice, "temperature": 1.5, "seed": 2, "max_tokens": 200}
    response = client.post(CHAT, json=asked | {"stream": stream}).raise_for_status()
    if stream:
        choices = [piece["choices"][0] for piece in events(response)]
        (call,) = [call for c in choices for call in c["delta"].get("tool_calls", [])]
        reason = choices[-1]["finish_reason"]
        assert not any(c["delta"].get("content") for c in choices)
    else:
        (only,) = response.json()["choices"]
        (call,), reason = only["message"]["tool_calls"], only["finish_reason"]
    assert reason == "tool_calls"
    assert call["function"]["name"] == "add"
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)


def test_tools_that_must_not_be_called_are_not_named(client):
    asked = hello(tools=[TOOL], tool_choice="none")
    mine, plain = (client.post(CHAT, json=body).json()["usage"]["prompt_tokens"] for body in (asked, hello()))
    assert mine == plain


@pytest.mark.parametrize("sampled", [False, True])
def test_several_fills_of_one_prompt(service, client, sampled):
    """They are those of the seeds from the first on; greedy ones are the same, and computed once."""
    asked = {"input_prefix": "hello ", "input_suffix": " hell", "n_predict": 12, "temperature": 0.0}
    asked |= {"temperature": 1.5, "seed": 8} if sampled else {}
    before = service.scheduler.metrics.generated_tokens
    several = client.post(INFILL, json=asked | {"n_cmpl": 3, "response_fields": ["index", "content"]}).json()
    computed = service.scheduler.metrics.generated_tokens - before
    seeds = [{"seed": 8 + i} if sampled else {} for i in range(3)]
    alone = [client.post(INFILL, json=asked | seed).json() for seed in seeds]
    assert several == [{"index": i, "content": one["content"]} for i, one in enumerate(alone)]
    assert computed == sum(one["tokens_predicted"] for one in (alone if sampled else alone[:1]))
    pieces = events(client.post(INFILL, json=asked | {"n": 3, "stream": True}))
    for i, one in enumerate(alone):
        mine = [piece for piece in pieces if piece["index"] == i]
        assert "".join(piece["content"] for piece in mine) == one["content"]
        assert [piece["stop"] for piece in mine] == [False] * (len(mine) - 1) + [True]


def test_the_second_keystroke_computes_what_is_new(client):
    asked = {"input_prefix": "hello\n" * 40, "input_suffix": "he\n" * 20, "n_predict": 4}
    first = client.post(INFILL, json=asked | {"prompt": "he"}).json()
    second = client.post(INFILL, json=asked | {"prompt": "hell"}).json()
    assert first["timings"]["prompt_n"] > 100
    assert second["timings"]["prompt_n"] <= 3
    assert second["timings"]["cache_n"] + second["timings"]["prompt_n"] == second["tokens_evaluated"]


REFUSED = [
    (CHAT, {}, "messages"),
    (CHAT, hello(messages=[]), "messages"),
    (CHAT, hello(messages="hello"), "messages"),
    (CHAT, hello(messages=[3]), "messages[0]"),
    (CHAT, hello(messages=[{"role": "tool"}]), "messages[0].content"),
    (CHAT, hello(messages=[{"role": "king", "content": "x"}]), "messages[0].role"),
    (CHAT, hello(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0]"),
    (CHAT, hello(messages=[{"role": "user", "content": "x", "mood": 1}]), "messages[0].mood"),
    (CHAT, hello(messages=[{"role": "user", "content": "\ud800"}]), "messages"),
    (CHAT, hello(temprature=1), "temprature"),
    (CHAT, hello(temperature="hot"), "temperature"),
    (CHAT, hello(temperature=-1), "temperature"),
    (CHAT, hello(temperature=True), "temperature"),
    (CHAT, hello(top_p=2), "top_p"),
    (CHAT, hello(n=0), "n"),
    (CHAT, hello(n=17), "n"),
    (CHAT, hello(n=1.5), "n"),
    (CHAT, hello(max_tokens=0), "max_tokens"),
    (CHAT, hello(max_tokens=-7), "max_tokens"),
    (CHAT, hello(max_completion_tokens=7), "max_tokens"),
    (CHAT, hello(repeat_penalty=1.1, repetition_penalty=1.2), "repeat_penalty"),
    (CHAT, hello(stop=[""]), "stop"),
    (CHAT, hello(stop=7), "stop"),
    (CHAT, hello(logit_bias={"x": 1}), "logit_bias"),
    (CHAT, hello(logit_bias={"1": 1e9}), "logit_bias"),
    (CHAT, hello(logit_bias={"99999": 1}), None),
    (CHAT, hello(top_logprobs=2), "top_logprobs"),
    (CHAT, hello(logprobs=True, top_logprobs=21), "top_logprobs"),
    (CHAT, hello(stream=1), "stream"),
    (CHAT, hello(stream_options={"include_usage": True}), "stream_options"),
    (CHAT, hello(stream=True, stream_options={"x": 1}), "stream_options.x"),
    (CHAT, hello(mirostat=2), "mirostat"),
    (CHAT, hello(dry_multiplier=0.8), "dry_multiplier"),
    (CHAT, hello(samplers=["magic"]), "samplers"),
    (CHAT, hello(tools=[{"type": "function"}]), "tools[0].function"),
    (CHAT, hello(tools=[{"type": "function", "function": {"parameters": {}}}]), "tools"),
    (CHAT, hello(tools=[TOOL], tool_choice={"function": {"name": "nothing"}}), "tool_choice"),
    (CHAT, hello(tool_choice="required"), "tool_choice"),
    (CHAT, hello(tools=[TOOL], response_format={"type": "json_object"}), "tools"),
    (CHAT, hello(response_format={"type": "yaml"}), "response_format.type"),
    (CHAT, hello(response_format={"type": "json_schema"}), "response_format.json_schema"),
    (CHAT, hello(response_format={"type": "json_schema", "json_schema": {"schema": 3}}), "response_format"),
    (CHAT, hello(json_schema={"type": "nonsense"}), "json_schema"),
    (CHAT, hello(json_schema={"allOf": [{"const": 1}, {"const": 2}]}), "json_schema"),
    (CHAT, hello(json_schema={}, response_format={"type": "json_object"}), None),
    (CHAT, hello(json_schema={"type": "array", "minItems": 900}), None),
    (CHAT, hello(structured_outputs={"regex": "("}), "structured_outputs"),
    (CHAT, hello(structured_outputs={"regex": "a" * 300_000}), "structured_outputs"),
    (CHAT, hello(structured_outputs={"yaml": "a"}), "structured_outputs.yaml"),
    (CHAT, hello(grammar="root ::= x"), "grammar"),
    (CHAT, hello(thinking_token_budget=-2), "thinking_token_budget"),
    (CHAT, hello(reasoning_budget=5, json_schema=SCHEMA), None),
    (CHAT, hello(audio={"voice": "x"}), "audio"),
    (CHAT, hello(reasoning_effort="high"), "reasoning_effort"),
    (CHAT, hello(messages=[{"role": "user", "content": "hello" * 600}]), None),
    (PLAIN, {"prompt": ""}, "prompt"),
    (PLAIN, {"prompt": []}, "prompt"),
    (PLAIN, {"prompt": [-1]}, None),
    (PLAIN, {"prompt": [10**30]}, None),
    (PLAIN, {"prompt": ["a", 1]}, "prompt"),
    (PLAIN, {"prompt": "a", "best_of": 3}, "best_of"),
    (PLAIN, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (PLAIN, {"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
    (PLAIN, {"prompt": [1], "suffix": "a"}, "prompt"),
    (INFILL, {}, "input_prefix"),
    (INFILL, {"input_prefix": 3}, "input_prefix"),
    (INFILL, {"input_extra": [{"filename": "a"}]}, "input_extra[0].text"),
    (INFILL, {"n_probs": 3}, "n_probs"),
    (INFILL, {"n_predict": -3}, "n_predict"),
    (INFILL, {"id_slot": -2}, "id_slot"),
    (INFILL, {"id_slot": "a"}, "id_slot"),
    (INFILL, {"n_cmpl": 0}, "n_cmpl"),
    (INFILL, {"n_cmpl": 17}, "n_cmpl"),
    (INFILL, {"response_fields": "content"}, "response_fields"),
    (CHAT, hello(response_fields=["choices"], stream=True), "response_fields"),
    (INFILL, {"lora": [{"id": 0, "scale": 0.5}]}, "lora"),
    ("/completion", {"prompt": ["a", "b"]}, "prompt"),
    ("/tokenize", {}, "content"),
    ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
]


@each(("path", "body", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_not_done_is_refused(client, path, body, param):
    response = client.post(path, content=json.dumps(body))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith((".", "?"))
    assert len(error["message"]) < 400


RAW = [b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000, b'{"a":' * 5000]
RAW += [b'{"messages": ' + b"[" * 70 + b"]" * 70 + b"}", b'{"n": ' + b"9" * 5000 + b"}", b"\x00", b'{"messages": null}']


@each("raw", RAW, ids=lambda raw: str(raw[:20]))
@each("path", [CHAT, INFILL])
def test_bytes_that_are_no_body_are_refused(client, raw, path):
    response = client.post(path, content=raw)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_other_paths_methods_and_models(client):
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get(CHAT).status_code == 405
    response = client.post(CHAT, json=hello(model="gpt-4"))
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["small"]
    assert client.get("/v1/models/small").json()["id"] == "small"
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}


def test_the_benchmark_s_streams_count_what_came(service):
    metrics = service.scheduler.metrics
    before = metrics.generated_tokens
    assert streamed_speed(service.url, ["hello", "he"], 5) > 0
    assert metrics.generated_tokens == before + 10
    with pytest.raises(ValueError, match="prompt is empty"):
        streamed_speed(service.url, [""], 5)


def test_props_tokens_and_metrics(small, client):
    props = client.get("/props").json()
    assert (props["total_slots"], props["model_alias"], props["fills"]) == (4, "small", True)
    assert props["default_generation_settings"]["n_ctx"] == 512
    ids = client.post("/tokenize", json={"content": "hello <|im_end|>é"}).json()["tokens"]
    assert ids == small[1].encode("hello <|im_end|>é", allow_special=True)
    pieces = client.post("/tokenize", json={"content": "é", "with_pieces": True}).json()["tokens"]
    assert b"".join(bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces) == (
        "é".encode()
    )
    assert client.post("/detokenize", json={"tokens": ids}).json()["content"] == "hello <|im_end|>é"
    lines = client.get("/metrics").text.splitlines()
    values = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
    assert values["qwen_mlx:tokens_predicted_total"] > 0
    assert len(values) * 3 == len(lines)


def test_the_page_asks_no_other_host(client):
    response = client.get("/")
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    assert "://" not in response.text.replace("http://www.w3.org/2000/svg", "")


@each("stream", [True, False])
@each("path", [CHAT, INFILL])
def test_a_client_that_hangs_up_ends_its_answer(service, client, path, stream):
    before = service.scheduler.metrics.cancelled
    asked = {"input_prefix": "a", "n_predict": 480} if path == INFILL else hello(max_tokens=480)
    body = json.dumps(asked | {"stream": stream, "logit_bias": NO_END}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as raw:
        raw.sendall(head + body)
        wait_for(lambda: service.scheduler.load[0] == 1)
    wait_for(lambda: service.scheduler.metrics.cancelled == before + 1)
    assert service.scheduler.load == (0, 0)
    assert client.post(CHAT, json=hello()).status_code == 200


def test_answers_at_once_are_those_of_one_at_a_time(client):
    """Requests of all kinds in company, with hang-ups and bad bodies between them."""
    cases = [(path, body) for path, body, _ in REFUSED[::6]]
    cases += [(CHAT, hello(max_tokens=20, temperature=1, seed=i)) for i in range(12)]
    cases += [(INFILL, {"input_prefix": "hello" * i, "input_suffix": "he", "n_predict": 9}) for i in range(8)]
    cases += [(PLAIN, {"prompt": [i, 9], "temperature": 0, "max_tokens": 11}) for i in range(8)]

    def send(case: tuple[str, dict]) -> tuple[int, str]:
        path, body = case
        response = client.post(path, content=json.dumps(body))
        answer = response.json()
        if path == INFILL:
            return response.status_code, answer.get("content", "")
        return response.status_code, json.dumps(answer.get("choices"))

    alone = list(map(send, cases))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(send, cases)) == alone


def test_a_fill_that_is_cut_says_so(client):
    asked = {"input_prefix": "hello\n" * 60, "input_suffix": "he\n" * 30, "n_predict": 4}
    body = client.post(INFILL, json=asked).json()
    assert not body["truncated"]
    body = client.post(INFILL, json=asked | {"input_extra": [{"text": "hello\n" * 500}]}).json()
    assert body["truncated"]
    assert body["tokens_evaluated"] <= 512
    response = client.post(PLAIN, json={"prompt": "hello\n" * 300, "suffix": "x", "max_tokens": 4})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_prompts_of_nine_megabytes_are_refused_and_harm_nobody(client):
    text = "hello " * 1_500_000
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        usual = pool.submit(client.post, CHAT, json=hello(max_tokens=30))
        for path, body in (
            (CHAT, hello(messages=[{"role": "user", "content": text}])),
            (PLAIN, {"prompt": text}),
        ):
            response = pool.submit(client.post, path, json=body).result()
            assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert (
            pool.submit(client.post, INFILL, json={"input_prefix": text, "n_predict": 2}).result().json()["truncated"]
        )
        assert usual.result().status_code == 200


def test_a_full_queue_says_when_to_come_again(small):
    with serving(small, slots=1, queue_size=0) as service, httpx.Client(base_url=service.url, timeout=60) as client:
        long = hello(max_tokens=400, stream=True, logit_bias=NO_END)
        with client.stream("POST", CHAT, json=long) as busy:
            next(busy.iter_lines())
            for stream in (True, False):
                response = client.post(CHAT, json=hello(stream=stream))
                assert (response.status_code, response.headers["retry-after"]) == (503, "1")
                assert response.json()["error"]["code"] == "queue_full"
        wait_for(lambda: service.scheduler.load == (0, 0))
        assert client.post(CHAT, json=hello()).status_code == 200


def test_keys_hosts_origins_and_sizes(small):
    limits = Limits(max_body=1000, api_key="secret", hosts=("models.example",))
    with serving(small, limits) as service, httpx.Client(base_url=service.url, timeout=60) as client:
        key = {"authorization": "Bearer secret"}
        for value in (None, "Bearer wrong", "Basic secret", "Bearer é"):
            raw = {} if value is None else {"authorization": value.encode()}
            response = client.post(CHAT, json=hello(), headers=raw)
            assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
            assert response.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=raw).status_code == 401
        assert client.get("/health").status_code == 200
        assert client.post(CHAT, json=hello(), headers=key).status_code == 200
        for host, status in (
            ("localhost:9", 200),
            ("[::1]:8080", 200),
            ("10.0.0.3", 200),
            ("models.example", 200),
            ("evil.example", 403),
            ("localhost.evil.example", 403),
            ("", 403),
            ("[", 403),
        ):
            assert client.get("/v1/models", headers=key | {"host": host}).status_code == status, host
        port = service.url.rpartition(":")[2]
        for origin, status in ((service.url, 200), ("https://evil.example", 403), (f"http://evil.example:{port}", 403)):
            assert client.post(CHAT, json=hello(), headers=key | {"origin": origin}).status_code == status
        assert client.post(CHAT, content=b" " * 1001, headers=key).status_code == 413
        chunks = (b" " * 300 for _ in range(5))
        assert client.post(CHAT, content=chunks, headers=key).status_code == 413
        assert "access-control-allow-origin" not in client.post(CHAT, json=hello(), headers=key).headers


def test_the_log_has_a_line_for_each_request_and_none_of_its_text(small, caplog):
    with (
        serving(small) as service,
        caplog.at_level("INFO", "qwen_mlx.server"),
        httpx.Client(base_url=service.url, timeout=60) as client,
    ):
        for stream in (True, False):
            client.post(CHAT, json=hello(stream=stream, messages=[{"role": "user", "content": "hellhell"}]))
    lines = [record.getMessage() for record in caplog.records if record.name == "qwen_mlx.server"]
    assert len(lines) == 2
    assert all(line.startswith("/v1/chat/completions done: ") for line in lines)
    assert "hellhell" not in "".join(lines)
