"""Real clients: OpenAI's SDK, and the bodies that editors build (llama.vim's autoload/llama.vim, llama.vscode's
src/llama-server.ts, Continue's core/llm/llms/LlamaCpp.ts and OpenAI.ts)."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from qwen_mlx import load, stream_generate
from tests.helpers.fim_model import save_fim_folder
from tests.helpers.running_server import serving

pytestmark = pytest.mark.heavy  # importing the SDK takes seconds


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    return load(save_fim_folder(tmp_path_factory.mktemp("clients") / "m", seed=3, max_position_embeddings=2048))


@pytest.fixture(scope="module")
def service(small):
    with serving(small) as service:
        yield service


@pytest.fixture(scope="module")
def openai(service):
    from openai import OpenAI

    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


MESSAGES = [{"role": "system", "content": "hell"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]


def test_the_sdk_chats(small, openai):
    assert [model.id for model in openai.models.list()] == ["small"]
    expected = list(
        stream_generate(
            *small,
            [{"role": "system", "content": "hell"}, {"role": "user", "content": "hello"}],
            temperature=0,
            max_tokens=9,
            logprobs=2,
        )
    )
    text = "".join(chunk.text for chunk in expected)
    arguments = {"model": "small", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 9}
    answer = openai.chat.completions.create(**arguments, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == expected[-1].finish_reason
    assert answer.choices[0].logprobs.content[0].logprob == pytest.approx(expected[0].logprob, abs=1e-4)
    stream = openai.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == len(expected)


def test_the_sdk_completes(openai):
    arguments = {"model": "small", "prompt": "hello ", "suffix": " hell", "temperature": 0, "max_tokens": 8}
    answer = openai.completions.create(**arguments)
    chunks = openai.completions.create(**arguments, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_the_sdk_knows_our_errors(openai):
    import openai as sdk

    with pytest.raises(sdk.BadRequestError, match="temperature is 200") as error:
        openai.chat.completions.create(model="small", messages=MESSAGES, temperature=200)
    assert error.value.param == "temperature"
    with pytest.raises(sdk.NotFoundError) as error:
        openai.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert error.value.code == "model_not_found"


def test_many_at_once_from_the_async_sdk(service, openai):
    from openai import AsyncOpenAI

    arguments = {"model": "small", "messages": MESSAGES, "temperature": 1.0, "max_tokens": 12}

    async def main() -> list[str]:
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
            asked = [client.chat.completions.create(**arguments, seed=seed) for seed in range(20)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    texts = asyncio.run(main())
    for seed in (0, 7, 19):
        alone = openai.chat.completions.create(**arguments, seed=seed)
        assert texts[seed] == alone.choices[0].message.content


def test_leaving_the_sdk_s_stream_ends_the_answer(service, openai):
    before = service.scheduler.metrics.cancelled
    stream = openai.chat.completions.create(model="small", messages=MESSAGES, stream=True, logit_bias={"262": -100})
    next(iter(stream))
    stream.close()
    while service.scheduler.load != (0, 0):
        pass
    assert service.scheduler.metrics.cancelled == before + 1


def test_the_sdk_parses_into_pydantic(openai):
    from typing import Literal

    import pydantic
    from openai import pydantic_function_tool

    class Answer(pydantic.BaseModel):
        word: Literal["he", "hello"]
        sure: bool

    arguments = {"model": "small", "messages": MESSAGES, "temperature": 1.5, "seed": 4, "max_tokens": 80}
    answer = openai.chat.completions.parse(**arguments, response_format=Answer)
    assert isinstance(answer.choices[0].message.parsed, Answer)
    with openai.chat.completions.stream(**arguments, response_format=Answer) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed
    called = openai.chat.completions.parse(
        **arguments | {"max_tokens": 200}, tools=[pydantic_function_tool(Answer)], tool_choice="required"
    )
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Answer)


def vim(prefix: str, middle: str, suffix: str, extra: list[dict]) -> dict:
    """The body of llama#fim, version a1c8e6e."""
    fields = ["content", "truncated", "tokens_cached"]
    for kind in ("prompt", "predicted"):
        fields += [f"timings/{kind}_{name}" for name in ("n", "ms", "per_token_ms", "per_second")]
    return {
        "id_slot": 0,
        "input_prefix": prefix,
        "input_suffix": suffix,
        "input_extra": extra,
        "prompt": middle,
        "n_predict": 16,
        "stop": [],
        "n_indent": 0,
        "top_k": 40,
        "top_p": 0.99,
        "stream": False,
        "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True,
        "t_max_prompt_ms": 30000,
        "t_max_predict_ms": 30000,
        "response_fields": fields,
    }


EXTRA = [{"text": "hello\n" * 60, "time": [1, 2], "filename": "other.py"}]


def test_llama_vim(service):
    """Its ring of files is read ahead of the completion, which then computes the rest alone."""
    warm = vim("", "", "", EXTRA) | {"n_predict": 0, "temperature": 0.0, "samplers": [], "response_fields": [""]}
    warm |= {"t_max_prompt_ms": 1, "t_max_predict_ms": 1}
    with httpx.Client(base_url=service.url, timeout=60) as client:
        assert client.post("/infill", json=warm).raise_for_status().json() == {}
        first = client.post("/infill", json=vim("hello\n" * 20, "he", "hell\n", EXTRA)).raise_for_status().json()
        again = client.post("/infill", json=vim("hello\n" * 20, "hell", "hell\n", EXTRA)).raise_for_status().json()
    fields = vim("", "", "", [])["response_fields"]
    assert set(first) == set(again) == set(fields)  # by these names it reads them
    assert first["tokens_cached"] > 100
    assert again["timings/prompt_n"] <= 3


def test_llama_vim_edits(service):
    """Its instructions: a chat that is read ahead, and then streamed."""
    asked = {"id_slot": 3, "messages": [{"role": "system", "content": "hell"}, {"role": "user", "content": "hello"}]}
    warm = asked | {"samplers": [], "n_predict": 0, "stream": False, "cache_prompt": True, "response_fields": [""]}
    asked |= {"min_p": 0.1, "temperature": 0.1, "samplers": ["min_p", "temperature"], "stream": True}
    with httpx.Client(base_url=service.url, timeout=60) as client:
        assert client.post("/v1/chat/completions", json=warm).raise_for_status().json() == {}
        text = client.post("/v1/chat/completions", json=asked | {"cache_prompt": True}).raise_for_status().text
    assert text.endswith("data: [DONE]\n\n")


def test_llama_vscode(service):
    """Version 0.0.63 asks for three fills; earlier ones for one, without a slot."""
    fill = {"input_prefix": "hello\n", "input_suffix": "", "input_extra": EXTRA, "prompt": "he", "n_predict": 8}
    fill |= {"top_k": 40, "top_p": 0.99, "stream": False, "samplers": ["top_k", "top_p", "infill"], "n_indent": 4}
    fill |= {"cache_prompt": True, "t_max_prompt_ms": 30000, "t_max_predict_ms": 30000}
    edit = {
        "messages": [{"role": "system", "content": "hell"}, {"role": "user", "content": "hello"}],
        "stream": False,
        "cache_prompt": True,
        "samplers": "edkypmxt",
        "temperature": 0.8,
        "dynatemp_range": 0,
        "dynatemp_exponent": 1,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "typical_p": 1,
        "xtc_probability": 0,
        "xtc_threshold": 0.1,
        "repeat_last_n": 64,
        "repeat_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "dry_multiplier": 0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_penalty_last_n": -1,
        "max_tokens": -1,
        "timings_per_token": False,
    }
    warm = {"messages": edit["messages"], "n_predict": 0, "samplers": [], "cache_prompt": True}
    warm |= {"t_max_prompt_ms": 500, "t_max_predict_ms": 1}
    with httpx.Client(base_url=service.url, timeout=60) as client:
        several = client.post("/infill", json=fill | {"id_slot": 0, "n_cmpl": 3}).raise_for_status().json()
        body = client.post("/infill", json=fill).raise_for_status().json()
        assert [one["content"] for one in several] == [body["content"]] * 3
        assert {"content", "generation_settings", "tokens_cached", "truncated", "timings"} <= set(body)
        body = client.post("/v1/chat/completions", json=edit).raise_for_status().json()
        assert isinstance(body["choices"][0]["message"]["content"], str)
        body = client.post("/v1/chat/completions", json=warm).raise_for_status().json()
        assert body["choices"][0]["message"]["content"] == ""


def test_continue(small, service):
    """Its llama.cpp provider streams /completion with a prompt in the model's own format."""
    prompt = "<|fim_prefix|>hello <|fim_suffix|> hell<|fim_middle|>"
    asked = {"n_predict": 8, "temperature": 0, "stop": ["<|fim_pad|>", "<|endoftext|>"], "prompt": prompt}
    texts = []
    with httpx.stream("POST", f"{service.url}/completion", json=asked | {"stream": True}, timeout=60) as response:
        for line in response.iter_lines():
            if line:
                texts.append(json.loads(line.removeprefix("data: "))["content"])
    expected = stream_generate(*small, prompt, raw=True, temperature=0, max_tokens=8)
    assert "".join(texts) == "".join(chunk.text for chunk in expected)


def test_zed_predicts_edits(service):
    """Its edit predictions of an OpenAI-compatible server, in the prompt format "qwen"."""
    marks = [f"<|{name}|>" for name in ("endoftext", "file_separator", "fim_pad", "fim_prefix", "fim_middle")]
    marks += ["<|fim_suffix|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<PRE>", "<SUF>", "<MID>"]
    prompt = "<|fim_prefix|>hello <|fim_suffix|> hell<|fim_middle|>"
    body = {"model": "small", "prompt": prompt, "max_tokens": 8, "stop": [*marks, "[PREFIX]", "[SUFFIX]"]}
    answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
    assert set(answer) >= {"id", "object", "created", "model", "choices", "usage"}
    assert isinstance(answer["choices"][0]["text"], str)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_temperature",
        "description": "Get the current temperature at a location.",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string", "description": "The city."}},
            "required": ["location"],
        },
    },
}


def test_the_sdk_calls_tools_of_the_real_model(real_gguf):
    from openai import OpenAI

    question = {"role": "user", "content": "What is the temperature in Paris?"}
    with serving(load(real_gguf), seconds=300) as service:
        client = OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=300)
        arguments = {"model": "small", "tools": [WEATHER], "temperature": 0, "max_tokens": 60}
        answer = client.chat.completions.create(messages=[question], **arguments)
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls"
        assert call.function.name == "get_temperature"
        assert "Paris" in json.loads(call.function.arguments)["location"]
        chunks = list(client.chat.completions.create(messages=[question], stream=True, **arguments))
        deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
        assert [d.function.arguments for d in deltas] == [call.function.arguments]
        answered = [
            question,
            answer.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "19 degrees"},
        ]
        final = client.chat.completions.create(messages=answered, **arguments | {"tool_choice": "none"})
        assert final.choices[0].message.content
        assert final.choices[0].message.tool_calls is None
