"""The real Qwen2.5-Coder-0.5B-Instruct file: the same tokens as transformers in float32, on the same GGUF."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_mlx import generate, load, ops
from qwen_mlx.backend import mx
from qwen_mlx.generation.engine import generate_tokens
from qwen_mlx.generation.settings import GenerationSettings
from qwen_mlx.generation.text import encode_prompt
from qwen_mlx.model.cache import KVCache
from qwen_mlx.model.fused import FusedModel
from reference.emulator import emulate

PROMPTS = [
    "Write a python function that reverses a string.",
    "What is the capital of France, and why is it famous?",
    "Explain in one paragraph how a hash map works.",
    "Write a SQL query that finds the second highest salary.",
    "Implement binary search in Rust with tests.",
    "用中文解释什么是递归,并举一个例子。",
    "请写一个快速排序的 Python 函数。",
    "Напиши функцию на Python, которая проверяет, является ли число простым.",
    "Расскажи коротко о космосе.",
    "اكتب دالة بايثون لحساب مجموع قائمة من الأرقام.",
    "ما هي عاصمة مصر؟",
    "日本の首都はどこですか。簡単に説明してください。",
]
RAW = ["def fibonacci(n):\n    ", "#include <stdio.h>\n\nint main(void) {\n"]
TOKENS = 64


@pytest.fixture(scope="module")
def ours(real_gguf: Path):
    return load(real_gguf)


@pytest.fixture(scope="module")
def dense(real_gguf: Path):
    return load(real_gguf, quantized=False)


def greedy(ours, ids: list[int], count: int = TOKENS) -> list[int]:
    tokens = generate_tokens(ours[0], ids, GenerationSettings())
    return [token.id for token in itertools.islice(tokens, count)]


@pytest.mark.parametrize("prompt", [*PROMPTS, *RAW], ids=range(len(PROMPTS) + len(RAW)))
def test_greedy_ids_equal_transformers(ours, real_hf, prompt: str):
    """Transformers reads our ids in one pass: if each is its likeliest next token, its own greedy ids are the same."""
    ids = encode_prompt(ours[1], prompt, raw=prompt in RAW)
    made = greedy(ours, ids, 256 if prompt == PROMPTS[0] else TOKENS)
    with torch.no_grad():
        logits = real_hf(torch.tensor([ids + made])).logits[0]
    expected = logits[len(ids) - 1 : -1].argmax(-1).tolist()
    assert made == expected


def test_greedy_ids_equal_transformers_generate(ours, real_hf):
    """The same without the short cut, on transformers' own generate."""
    ids = encode_prompt(ours[1], PROMPTS[0])
    with torch.no_grad():
        expected = real_hf.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, repetition_penalty=1.0)
    assert greedy(ours, ids, 20) == expected[0, len(ids) :].tolist()


def test_answer_reads_as_expected(ours):
    text = generate(*ours, PROMPTS[0], max_tokens=40, temperature=0)
    assert text.startswith(
        "Here's a simple Python function to reverse a string:\n\n```python\ndef reverse_string(s):\n"
    )


def test_every_parameter_equals_transformers_by_value(dense, real_hf):
    """Bit for bit: the GGUF's bytes reached the right parameter, not transposed, not permuted."""
    theirs = real_hf.state_dict()
    mine = dense[0].hf_parameters()
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert np.array_equal(np.array(array), theirs[name].numpy()), name


@pytest.mark.parametrize("count", [12, pytest.param(256, marks=pytest.mark.slow)])
def test_tokens_by_the_decoding_step_equal_the_plain_ones(ours, dense, monkeypatch, count: int):
    """The step that a GPU takes, its products and its cache's tail in plain MLX operations, on float32 weights; a CPU
    makes one or two such tokens a second."""
    ids = encode_prompt(ours[1], PROMPTS[0])
    plain = greedy(ours, ids, count)
    steps = []

    def supports_step(self: FusedModel, input_ids: mx.array, cache: list[KVCache]) -> bool:
        steps.append(input_ids.size == 1 and cache[0].offset > 0)
        return steps[-1]

    monkeypatch.setattr(FusedModel, "supports_step", supports_step)
    with ops.forced("reference"):
        assert greedy(dense, ids, count) == plain
    assert sum(steps) >= count - 1


@pytest.mark.slow
def test_a_decoding_step_in_the_emulator_gives_the_plain_tokens(real_gguf: Path):
    """The real file packed as on a GPU, in float32: each greedy token by the emulated kernels of a step."""
    model, tokenizer = load(real_gguf, dtype="float32", quantized=True)
    ids = encode_prompt(tokenizer, "Write a haiku about the sea.")
    plain = greedy((model, tokenizer), ids, 6)
    cache = model.make_cache()
    fused = FusedModel.of(model)
    fused(mx.array([ids]), cache)
    for token, following in itertools.pairwise(plain):
        with emulate(checked=False):
            logits = fused(mx.array([[token]]), cache)
            assert logits[0, -1].argmax().item() == following
