"""Lines of JSON as training reads them: tokens, prompts that are not learnt, faults, batches and their order."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_mlx import QwenMLXError, Tokenizer
from qwen_mlx.training.data import batches, digest, order_of, read_examples
from reference.small_models import CHATML, IM_END, RandomModel, save_folder
from tests.helpers.training import random_examples, write_lines

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = save_folder(tmp_path_factory.mktemp("tokenizer") / "m", RandomModel(num_hidden_layers=1))
    (folder / "chat_template.jinja").write_text(CHATML)
    return Tokenizer.read(folder)


def read(path: Path, tokenizer: Tokenizer, mask_prompt: bool = False, max_length: int = 512):
    return read_examples(path, tokenizer, mask_prompt=mask_prompt, max_length=max_length)


def test_each_kind_of_line(tmp_path: Path, tokenizer: Tokenizer):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "\nhell"}]
    lines = [{"messages": messages}, {"prompt": "hello", "completion": "\nhell"}, "", {"text": "hello<|im_end|>"}]
    path = write_lines(tmp_path / "train.jsonl", [*lines, {"text": "hello"}])
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(f"{prompt}\nhell<|im_end|>\n", allow_special=True)
    for masked in (False, True):
        examples, notes = read(path, tokenizer, masked)
        assert not notes
        assert [example.ids.tolist() for example in examples[:2]] == [ids, ids]
        assert [example.ids.tolist()[-1] for example in examples] == [ids[-1]] * 2 + [IM_END] * 2
        assert np.array_equal(examples[2].ids, examples[3].ids)
        n_prompt = len(tokenizer.encode(prompt, allow_special=True))
        assert [example.n_prompt for example in examples] == ([n_prompt, n_prompt, 1, 1] if masked else [1] * 4)


def test_a_token_across_the_prompt_s_end_is_learnt(tmp_path: Path, tokenizer: Tokenizer, monkeypatch):
    """Where the prompt's tokens are no beginning of all, the difference is where learning begins."""
    rows = {True: [5, 6, 7], False: [5, 6, 9, 8]}
    monkeypatch.setattr(
        Tokenizer,
        "apply_chat_template",
        lambda self, m, tools=None, add_generation_prompt=True: rows[add_generation_prompt],
    )
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}])
    assert read(path, tokenizer, True)[0][0].n_prompt == 2


def test_what_is_too_long_is_cut_or_left_out(tmp_path: Path, tokenizer: Tokenizer):
    lines = [{"prompt": "a", "completion": "b" * 40}, {"prompt": "a" * 90, "completion": "b"}]
    examples, notes = read(write_lines(tmp_path / "x.jsonl", lines), tokenizer, True, 50)
    assert [len(example.ids) for example in examples] == [50]
    assert "2 examples are longer than 50 tokens" in notes[0]
    assert "1 examples have nothing to learn" in notes[1]
    with pytest.raises(QwenMLXError, match="nothing to learn; every example's prompt fills --max-seq-length"):
        read(write_lines(tmp_path / "y.jsonl", lines[1:]), tokenizer, True, 50)


FAULTS = {
    "not JSON": ('{"text": "a"', "is not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "is not UTF-8 (byte 0xff)"),
    "no object": ("[1]", "is list, expected a JSON object"),
    "another object": ({"txt": "a"}, "has 'txt', expected 'messages'"),
    "no text": ({"text": 5}, "'text' is int, expected a string"),
    "half a pair": ({"prompt": "a"}, "has 'prompt', expected"),
    "no messages": ({"messages": []}, "'messages' is [], expected a list of objects"),
    "no role": ({"messages": [{"content": "a"}]}, "role"),
    "ends with the user": ({"messages": [{"role": "user", "content": "a"}]}, "ends with 'user'"),
    "ids": ({"messages": [{"role": "assistant", "content": "a", "ids": [2**40]}]}, "a message has 'ids'"),
    "an empty text": ({"text": ""}, "'text' is empty"),
    "an empty completion": ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    "an empty answer": ({"messages": [{"role": "assistant", "content": ""}]}, "message 1, of the assistant, is empty"),
    "tools that are none": ({"prompt": "a", "completion": "b", "tools": 5}, "'tools' is 5, expected a list"),
    "a system apart": ({"prompt": "a", "completion": "b", "system": "c"}, "has 'system' beside a prompt"),
    "half a character": ('{"text": "\\ud800"}', "lone surrogate"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_broken_line_is_named(tmp_path: Path, tokenizer: Tokenizer, kind: str):
    line, words = FAULTS[kind]
    path = write_lines(tmp_path / "train.jsonl", [{"text": "fine"}, "", line, {"text": "fine"}])
    with pytest.raises(QwenMLXError, match=f"^{re.escape(str(path))}, line 3: .*{re.escape(words)}"):
        read(path, tokenizer, True)


def test_a_file_without_lines_or_none(tmp_path: Path, tokenizer: Tokenizer):
    with pytest.raises(QwenMLXError, match="nothing to learn; it is empty"):
        read(write_lines(tmp_path / "x.jsonl", ["", " "]), tokenizer)
    with pytest.raises(QwenMLXError, match="no such file"):
        read(tmp_path / "none.jsonl", tokenizer)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(
    line=st.binary(max_size=30)
    | st.dictionaries(st.sampled_from(["messages", "prompt", "completion", "text", "tools"]), JSON).map(json.dumps),
    masked=st.booleans(),
)
def test_any_line_is_read_or_named(tmp_path: Path, tokenizer: Tokenizer, line: bytes | str, masked: bool):
    path = write_lines(tmp_path / "x.jsonl", [{"text": "fine"}, line])
    sentence = ""
    try:
        examples, _ = read(path, tokenizer, masked)
    except QwenMLXError as error:
        examples, sentence = [], str(error)
    assert examples or re.match(rf"{re.escape(str(path))}, line \d+: ", sentence)
    assert all(1 <= example.n_prompt < len(example.ids) for example in examples)


def test_batches_hold_every_target_once():
    examples = random_examples([9, 30, 4, 17, 40, 33, 2])
    made = batches(examples, 3)
    assert [batch.inputs.shape for batch in made] == [(3, 16), (3, 32), (1, 48)]
    pairs = []
    for batch in made:
        flat = batch.inputs.reshape(-1)
        pairs += list(zip(flat[batch.positions].tolist(), batch.targets.tolist()))
    expected = [(e.ids[i - 1], e.ids[i]) for e in examples for i in range(e.n_prompt, len(e.ids))]
    assert sorted(pairs) == sorted(expected)
    assert digest(examples) != digest(examples[::-1])
    assert digest(examples) != digest([examples[0]._replace(n_prompt=1), *examples[1:]])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=30), room=st.integers(1, 80))
def test_packed_rows_hold_every_example_once_within_their_length(lengths: list[int], room: int):
    examples, found = random_examples(lengths), []
    for batch in batches(examples, 2, room):
        segments = np.zeros_like(batch.inputs) if batch.segments is None else batch.segments
        for row, inputs in enumerate(batch.inputs):
            of_row = batch.positions // len(inputs) == row
            positions, targets = batch.positions[of_row] % len(inputs), batch.targets[of_row]
            numbers, used = segments[row, positions], 0
            for number in range(numbers.max() + 1):
                own = positions[numbers == number]
                ids = [*inputs[used : own[-1] + 1].tolist(), int(targets[numbers == number][-1])]
                found.append((ids, int(own[0]) + 1 - used))
                assert np.all(segments[row, used : own[-1] + 1] == number)
                used = own[-1] + 1
            assert used <= room or not numbers.any()
    assert sorted(found) == sorted((example.ids.tolist(), example.n_prompt) for example in examples)


@pytest.mark.parametrize("start", [0, 3, 5, 12])
def test_the_order_from_any_point_is_the_order_from_there(start: int):
    all_of_it = list(itertools.islice(order_of(5, 7, 0), 30))
    assert list(itertools.islice(order_of(5, 7, start), 30 - start)) == all_of_it[start:]
    assert [sorted(all_of_it[i : i + 5]) for i in range(0, 30, 5)] == [[0, 1, 2, 3, 4]] * 6
    assert all_of_it != list(itertools.islice(order_of(5, 8, 0), 30))
    assert all_of_it[:5] != all_of_it[5:10]
