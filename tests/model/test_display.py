"""Models and answers as a notebook shows them: right numbers, and no text of a model becomes HTML."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from qwen_mlx import Chat, batch_generate, load, ops, stream_generate
from qwen_mlx.generation.display import coloured
from qwen_mlx.generation.engine import GenerationStats
from qwen_mlx.generation.text import GenerationChunk
from qwen_mlx.gguf.reader import GGUFFile
from qwen_mlx.model.display import summary, table
from qwen_mlx.text.tokenizer import Tokenizer
from reference.small_models import RandomModel, write_gguf


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load(Path(write_gguf(tmp_path_factory.mktemp("display") / "small.gguf", RandomModel())))


def test_a_model_says_what_it_is(small):
    model = small[0]
    theirs = sum(values.size for values in RandomModel().state_dict().values())
    found = summary(model, model.config)
    assert found["parameters"] == f"{theirs / 1e6:.0f} million"
    assert found["memory"] == f"{theirs * 4 / 1e9:.2f} GB"
    assert found["matrices"] == "100 % float32"
    assert repr(model).startswith("Qwen2(layers: 3 of hidden size 64")
    assert model._repr_html_().count("<tr>") == len(found)


def test_a_packed_model_says_how(tmp_path: Path, real_gguf: Path):
    model, _ = load(real_gguf, quantized=True)
    found = summary(model, model.config)
    size = sum(math.prod(tensor.shape) for tensor in GGUFFile(real_gguf).tensors.values())  # its head is stored apart
    assert found["parameters"] == f"{size / 1e6:.0f} million"
    assert found["vocabulary"] == "151936, the head is a matrix of its own"
    most = "Q5_0" if ops.executor() == "cpu" else "5 bits, group 32"
    assert re.match(rf"\d+ % {most}, ", found["matrices"])
    assert {"Q4_K", "Q6_K"} <= set(re.split(r"[ ,]+", found["matrices"]))


def test_answers_and_conversations_are_readable_and_escaped(small):
    answer = batch_generate(*small, ["hello"], max_tokens=3, logprobs=2)[0]
    assert repr(answer) == f"BatchResult(prompt_tokens={answer.prompt_tokens}, text={answer.text!r}, " + (
        f"finish_reason={answer.finish_reason!r})"
    )
    answer.text = "<script>alert(1)</script>\n  x < y"
    assert answer._repr_html_() == (
        '<pre style="white-space:pre-wrap">&lt;script&gt;alert(1)&lt;/script&gt;\n  x &lt; y</pre>'
        f"<small>{answer.prompt_tokens} tokens read, {len(answer.token_ids)} made; "
        f"ended by {answer.finish_reason}</small>"
    )
    chat = Chat(*small, system="<script>", max_tokens=2)
    list(chat.send("<img onerror=x>"))
    assert repr(chat) == f"Chat(3 messages, {len(chat.prompt_cache.ids)} tokens computed)"
    cache = chat.prompt_cache
    nbytes = sum(layer.nbytes for layer in cache.layers)
    assert repr(cache) == f"PromptCache({len(cache.ids)} tokens held, {nbytes / 1e6:.1f} MB)"
    chat.messages[-1]["content"] = "</td><script>"
    text = chat._repr_html_()
    assert text.count("<tr>") == 3
    assert "<script" not in text
    assert "<img" not in text


def test_a_character_of_several_tokens_is_shown_whole(real_gguf: Path):
    tokenizer = Tokenizer.from_gguf(GGUFFile(real_gguf).metadata)
    *parts, last = tokenizer.encode("🦜")
    assert parts
    stats = GenerationStats()
    chunks = [GenerationChunk("", i, None, stats, -0.1) for i in parts] + [
        GenerationChunk("🦜", last, None, stats, -9.0)
    ]
    shown = re.findall(">([^<]+)</span>", coloured(chunks, tokenizer).text)
    assert shown == ["·"] * len(parts) + ["🦜"]
    assert coloured(chunks, tokenizer).text.count("color:black") == 1  # on full orange


def test_tokens_are_coloured_and_escaped(small):
    model, tokenizer = small
    chunks = list(stream_generate(model, tokenizer, "hello", max_tokens=5, logprobs=2, temperature=0))
    text = coloured(chunks, tokenizer)._repr_html_()
    assert text.count("<span") == len(chunks)
    hostile = tokenizer.encode("<script>\"'&")
    text = coloured(
        [GenerationChunk("", i, None, GenerationStats(), -1.0, ((i, -1.0),)) for i in hostile], tokenizer
    ).text
    assert "<script" not in text
    assert all(sign in text for sign in ("&lt;", "&gt;", "&amp;", "&quot;", "&#x27;"))
    assert "<b>" not in table([("<b>", "<b>")], "<b>")
    with pytest.raises(ValueError, match="generate with logprobs"):
        coloured([GenerationChunk("", 1, None, GenerationStats())], tokenizer)
