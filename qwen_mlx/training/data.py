"""Examples for training: lines of JSON as mlx-lm takes them, tokenized, and the order in which they are read."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import QwenMLXError, shortened
from ..text.tokenizer import Tokenizer

LENGTH_UNIT = 16  # rows of a batch are padded to a multiple of it, so that products come in few shapes


class Example(NamedTuple):
    """A text for training. ids: int32 (L,); n_prompt: the first so many are read and not learnt."""

    ids: np.ndarray
    n_prompt: int


class Batch(NamedTuple):
    """Examples as one array, padded on the right.

    inputs: int32 (B, L); positions: of predictions that count, in inputs.reshape(-1); targets: the token after each;
    segments: int32 (B, L), the number of each token's example in its row, None where a row is one example.
    """

    inputs: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    segments: np.ndarray | None = None


def read_examples(
    path: Path, tokenizer: Tokenizer, *, mask_prompt: bool, max_length: int
) -> tuple[list[Example], list[str]]:
    """The examples of a JSONL file, and notes on those that were cut or left out.

    A line is {"messages": [...]}, perhaps with "tools"; {"prompt": ..., "completion": ...}, which becomes two messages;
    or {"text": ...}, whose control tokens count as such and which ends with the model's end token.
    mask_prompt: learn the last message alone, or the completion; of a text, everything. max_length: tokens at most,
    more are cut. Raises QwenMLXError naming the file, the line and its fault.
    """
    examples, n_cut, n_empty = [], 0, 0
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        ids, n_prompt = _tokenized(line, where, tokenizer, mask_prompt)
        n_cut += len(ids) > max_length
        example = Example(np.array(ids[:max_length], np.int32), max(1, n_prompt))
        if len(example.ids) > example.n_prompt:
            examples.append(example)
        else:
            n_empty += 1
    if not examples:
        fault = "every example's prompt fills --max-seq-length" if n_empty else "it is empty"
        raise QwenMLXError(f"{path}: has nothing to learn; {fault}.")
    notes = []
    if n_cut:
        notes.append(f"{path}: {n_cut} examples are longer than {max_length} tokens and were cut.")
    if n_empty:
        notes.append(f"{path}: {n_empty} examples have nothing to learn after their prompts and were left out.")
    return examples, notes


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbers and objects of the lines that are not blank."""
    if not path.is_file():
        raise QwenMLXError(f"{path}: no such file; give a folder with train.jsonl and, to validate, valid.jsonl.")
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(line, f"{path}, line {number}")
    except OSError as error:
        raise QwenMLXError(f"{path}: cannot be read ({error.strerror}).") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise QwenMLXError(f"{where}: is not UTF-8 (byte {line[error.start]:#04x}); save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise QwenMLXError(f"{where}: is not JSON ({shortened(str(error))}); each line is an object.") from None
    if not isinstance(value, dict):
        raise QwenMLXError(f"{where}: is {type(value).__name__}, expected a JSON object.")
    return value


def _tokenized(line: dict[str, Any], where: str, tokenizer: Tokenizer, mask_prompt: bool) -> tuple[list[int], int]:
    """Token ids and how many of them are the prompt."""
    try:
        if "messages" in line:
            return _of_chat(line["messages"], line.get("tools"), where, tokenizer, mask_prompt)
        if "prompt" in line and "completion" in line:
            pair = _text(line, "prompt", where), _text(line, "completion", where)
            if "system" in line:
                raise QwenMLXError(f"{where}: has 'system' beside a prompt; give 'messages', the system's first.")
            messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair)]
            return _of_chat(messages, line.get("tools"), where, tokenizer, mask_prompt)
        if "text" in line:
            ids = tokenizer.with_prefix(tokenizer.encode(_text(line, "text", where), allow_special=True))
            end = tokenizer.special.get(tokenizer.special_tokens.get("eos_token", ""), min(tokenizer.eos_token_ids))
            return (ids if ids and ids[-1] in tokenizer.eos_token_ids else [*ids, end]), 0
    except QwenMLXError as error:
        raise error if str(error).startswith(where) else QwenMLXError(f"{where}: {error}") from None
    found = ", ".join(map(repr, list(line)[:5])) or "nothing"
    raise QwenMLXError(f"{where}: has {shortened(found)}, expected 'messages', 'prompt' and 'completion', or 'text'.")


def _of_chat(messages: Any, tools: Any, where: str, tokenizer: Tokenizer, mask_prompt: bool) -> tuple[list[int], int]:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise QwenMLXError(f"{where}: 'messages' is {shortened(repr(messages), 80)}, expected a list of objects.")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise QwenMLXError(f"{where}: 'tools' is {shortened(repr(tools), 80)}, expected a list of objects.")
    for number, message in enumerate(messages, 1):
        speaks = message.get("role") in ("user", "assistant") and not message.get("tool_calls")
        if speaks and message.get("content") in (None, "", []):
            raise QwenMLXError(
                f"{where}: message {number}, of the {message['role']}, is empty; fill it or remove the line."
            )
    if any("ids" in message for message in messages):  # which could name control tokens
        raise QwenMLXError(f"{where}: a message has 'ids', which only a conversation's own may have; leave them out.")
    ids = tokenizer.apply_chat_template(messages, tools, add_generation_prompt=False)
    if not mask_prompt:
        return ids, 0
    if messages[-1].get("role") != "assistant":
        raise QwenMLXError(f"{where}: ends with {messages[-1].get('role')!r}, expected an answer of the assistant's.")
    prompt = tokenizer.apply_chat_template(messages[:-1], tools) if len(messages) > 1 else []
    # Not the length: a token may hold the prompt's last character and the answer's first.
    return ids, sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids)))


def _text(line: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(line[name], str):
        raise QwenMLXError(f"{where}: {name!r} is {type(line[name]).__name__}, expected a string.")
    if not line[name]:
        raise QwenMLXError(f"{where}: {name!r} is empty; fill it or remove the line.")
    return str(line[name])


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of examples, by which a continued training knows its own."""
    value = hashlib.sha256()
    for example in examples:
        value.update(np.array([len(example.ids), example.n_prompt], "<i8").tobytes() + example.ids.tobytes())
    return value.hexdigest()


def batches(examples: Sequence[Example], size: int, pack_length: int | None = None) -> list[Batch]:
    """All examples in batches of `size` rows, those of like length together. A row is an example, or with pack_length
    as many as so many tokens hold."""
    if pack_length is None:
        rows = [[example] for example in sorted(examples, key=lambda example: len(example.ids))]
    else:
        rows = _packed(examples, pack_length)
    return [_batch(rows[start : start + size]) for start in range(0, len(rows), size)]


def _packed(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Rows of examples, by best fit: the longest first, each into the fullest row that has room for it."""
    rows: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # what is left of each row, and its number, ascending
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        need = len(example.ids) - 1
        at = bisect.bisect_left(rooms, (need, 0))
        room, row = rooms.pop(at) if at < len(rooms) else (max(length, need), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        bisect.insort(rooms, (room - need, row))
    return rows


def order_of(n_batches: int, seed: int, start: int) -> Iterator[int]:
    """The numbers of the batches that training reads from its `start`-th on, without end: each epoch has an order of
    its own, which depends on the seed and the epoch alone."""
    for epoch in itertools.count(start // n_batches):
        order = np.random.default_rng([seed, epoch]).permutation(n_batches)
        yield from map(int, order[start % n_batches if epoch == start // n_batches else 0 :])


def _batch(rows: Sequence[Sequence[Example]]) -> Batch:
    length = max(sum(len(example.ids) - 1 for example in row) for row in rows)
    length += -length % LENGTH_UNIT
    inputs, segments = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    positions, targets = [], []
    for i, row in enumerate(rows):
        start = 0
        for number, (ids, n_prompt) in enumerate(row):
            stop = start + len(ids) - 1
            inputs[i, start:stop], segments[i, start:stop] = ids[:-1], number
            positions.append(np.arange(start + n_prompt - 1, stop, dtype=np.int32) + i * length)
            targets.append(ids[n_prompt:])
            start = stop
    several = any(len(row) > 1 for row in rows)
    return Batch(inputs, np.concatenate(positions), np.concatenate(targets), segments if several else None)
