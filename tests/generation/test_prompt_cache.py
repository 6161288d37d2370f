"""Prompt caches: the same answers as without one, nothing computed twice, and files that anyone may have spoilt."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from qwen_mlx import QwenMLXError, load, stream_generate
from qwen_mlx.backend import mx
from qwen_mlx.generation import prompt_cache as module
from qwen_mlx.generation.chat import Chat
from qwen_mlx.generation.prompt_cache import PromptCache, common_prefix, fingerprint
from qwen_mlx.model.cache import KVCache
from reference.small_models import TOKENS, RandomModel, write_gguf
from tests.helpers.cases import each
from tests.helpers.computing import count_computed


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("small") / "m.gguf", RandomModel(), T.Q8_0)


@pytest.fixture(scope="module")
def small(path: Path):
    return load(path)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_computed(monkeypatch)


def answer(small, prompt: list[int], cache: PromptCache | None = None, **arguments: Any):
    chunks = list(
        stream_generate(*small, prompt, prompt_cache=cache, **{"max_tokens": 9, "temperature": 0} | arguments)
    )
    return [chunk.token for chunk in chunks], chunks[-1].stats


def random_ids(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(0, len(TOKENS) - 3, count).tolist()


def test_prefix():
    assert common_prefix([], [1]) == common_prefix([1], [2]) == 0
    assert (
        common_prefix([1, 2], [1, 2, 3]) == common_prefix([1, 2, 3], [1, 2]) == common_prefix([1, 2, 3], [1, 2, 4]) == 2
    )


@pytest.mark.parametrize(
    "arguments", [{}, {"repetition_penalty": 1.5}, {"temperature": 1.0, "seed": 5}, {"prefill_step_size": 3}]
)
def test_same_answers_and_only_what_is_new_is_computed(small, computed: list[int], arguments: dict[str, Any]):
    rng, cache = np.random.default_rng(0), PromptCache(small[0])
    prompt: list[int] = random_ids(rng, 20)
    for _ in range(12):
        held = common_prefix(cache.ids, prompt)
        expected, plain = answer(small, prompt, **arguments)
        computed.clear()
        tokens, stats = answer(small, prompt, cache, **arguments)
        assert tokens == expected
        assert plain.reused_tokens == 0
        assert stats.reused_tokens == min(held, len(prompt) - 1)
        assert stats.prompt_tokens == len(prompt) - stats.reused_tokens
        # The step after the last token was under way; it computed the last token, which is not kept.
        assert sum(computed) == stats.prompt_tokens + stats.generated_tokens
        assert cache.ids == prompt + tokens[:-1]
        assert {layer.offset for layer in cache.layers} == {len(cache.ids)}
        everything = prompt + tokens
        prompt = everything[: rng.integers(1, len(everything) + 1)] + random_ids(rng, rng.integers(0, 9))


def test_the_penalty_sees_what_is_reused(small):
    """These answers would differ if it did not."""
    prompt = random_ids(np.random.default_rng(1), 60)
    with_penalty, _ = answer(small, prompt, repetition_penalty=3.0)
    cache = PromptCache(small[0])
    answer(small, prompt[:-1], cache, max_tokens=1)
    assert answer(small, prompt, cache, repetition_penalty=3.0)[0] == with_penalty
    assert answer(small, prompt[-1:], repetition_penalty=3.0)[0] != with_penalty


@each("at", range(1, 12))
def test_an_interrupt_anywhere_leaves_a_cache_that_serves(small, monkeypatch: pytest.MonkeyPatch, at: int):
    """Ctrl-C in the middle of a pass: some layers have the new tokens and some have not."""
    rng = np.random.default_rng(2)
    first, second = random_ids(rng, 10), random_ids(rng, 8)
    cache = PromptCache(small[0])
    answer(small, first, cache)
    calls, update, advance = 0, KVCache.update, KVCache.advance

    def interrupting(change):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return change(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "update", interrupting(update))
        patch.setattr(KVCache, "advance", interrupting(advance))
        with pytest.raises(KeyboardInterrupt):
            answer(small, first + second, cache, prefill_step_size=4)
    assert {layer.offset for layer in cache.layers} == {len(cache.ids)}
    assert len(cache.ids) >= len(first)
    assert answer(small, first + second, cache)[0] == answer(small, first + second)[0]


def test_a_cache_that_cannot_go_back_begins_anew(small):
    model, _ = small
    prompt = random_ids(np.random.default_rng(3), 40)
    cache = PromptCache(model, lambda: model.make_cache(max_size=16))
    fresh = PromptCache(model, lambda: model.make_cache(max_size=16))
    answer(small, prompt, cache)
    assert answer(small, prompt[:30], cache)[0] == answer(small, prompt[:30], fresh)[0]
    with pytest.raises(QwenMLXError, match="RotatingKVCache cannot be saved"):
        cache.save("/nonexistent/x")


def test_saved_and_loaded(small, path: Path, tmp_path: Path):
    file, prompt = tmp_path / "a cache", random_ids(np.random.default_rng(4), 300)
    cache = PromptCache(small[0])
    answer(small, prompt, cache)
    cache.save(file)
    cache.save(file)
    assert [p.name for p in tmp_path.iterdir()] == ["a cache"]
    again = load(path)  # a process of its own, in effect
    found = PromptCache.load(file, again[0])
    assert found.ids == cache.ids
    for ours, theirs in zip(found.layers, cache.layers, strict=True):
        assert ours.offset == theirs.offset
        assert all(mx.array_equal(a, b) for a, b in zip(ours.state, theirs.state))
    tokens, stats = answer(again, [*prompt, 5], found)
    assert stats.reused_tokens == 300
    assert tokens == answer(small, [*prompt, 5])[0]


def test_bfloat16_is_kept(path: Path, tmp_path: Path):
    model, tokenizer = load(path, dtype="bfloat16")
    cache = PromptCache(model)
    answer((model, tokenizer), [1, 2, 3], cache)
    cache.save(tmp_path / "c")
    found = PromptCache.load(tmp_path / "c", model)
    assert found.layers[0].state[0].dtype == mx.bfloat16
    assert all(mx.array_equal(a, b) for a, b in zip(found.layers[2].state, cache.layers[2].state))
    with pytest.raises(QwenMLXError, match=r"in 'bfloat16', expected float32; load the model in that dtype"):
        PromptCache.load(tmp_path / "c", load(path)[0])


def test_fingerprint_tells_models_apart(small, path: Path, tmp_path: Path):
    model, _ = small
    assert fingerprint(model) == fingerprint(load(path)[0])
    others = [
        load(write_gguf(tmp_path / "seed.gguf", RandomModel(seed=1), T.Q8_0))[0],
        load(write_gguf(tmp_path / "theta.gguf", RandomModel(rope_theta=10000.0), T.Q8_0))[0],
        load(path, quantized=False)[0],
        load(path, dtype="bfloat16")[0],
    ]
    assert len({fingerprint(other) for other in [model, *others]}) == 5
    changed = load(path)[0]
    changed.model.layers[1].mlp.down_proj.weight *= 1.001  # as an adapter would
    assert fingerprint(changed) != fingerprint(model)
    shaped = load(path)[0]
    shaped.model.norm.weight = shaped.model.norm.weight[None]  # the same values
    assert fingerprint(shaped) != fingerprint(model)


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    cache = PromptCache(small[0])
    answer(small, [1, 2, 3, 4, 5], cache)
    file = tmp_path_factory.mktemp("saved") / "c"
    cache.save(file)
    return file.read_bytes()


def with_header(data: bytes, edit: Callable[[dict[str, Any]], None]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def meta(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update({key: value})


def entry(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(values)


HEADERS = {
    "another format": (meta("format", "pt"), "not a prompt cache of qwen_mlx"),
    "another version": (meta("version", "2"), "version '2', expected '1'"),
    "another model": (meta("model", "0" * 64), "another model"),
    "another shape": (meta("shape", "80 layers"), "another model ('80 layers'"),
    "another dtype": (meta("dtype", "float16"), "in 'float16', expected float32"),
    "no metadata": (lambda header: header.pop("__metadata__"), "not a prompt cache"),
    "metadata of another type": (lambda header: header.update(__metadata__=[]), "damaged"),
    "no model": (lambda header: header["__metadata__"].pop("model"), "damaged"),
    "another checksum": (meta("crc32", "00000000"), "damaged"),
    "a layer is missing": (lambda header: header.pop("layers.1"), "damaged"),
    "a layer too many": (lambda header: header.update({"layers.9": header["layers.1"]}), "damaged"),
    "overlapping": (entry("layers.1", data_offsets=[0, 10]), "damaged"),
    "beyond the end": (entry("layers.1", shape=[10**6, 2, 2, 16]), "damaged"),
    "negative": (entry("layers.1", shape=[-13, 2, 2, 16]), "damaged"),
    "zero": (entry("ids", shape=[0], data_offsets=[0, 0]), "damaged"),
    "not a shape": (entry("layers.1", shape="13"), "damaged"),
    "not a number": (entry("layers.1", shape=[1.5]), "damaged"),
    "unknown dtype": (entry("layers.1", dtype="F64"), "damaged"),
    "entry of another type": (lambda header: header.update(ids=3), "damaged"),
    "no ids": (lambda header: header.update(other=header.pop("ids")), "damaged"),
}


@each("case", HEADERS)
def test_a_spoilt_header_is_one_sentence(small, saved: bytes, tmp_path: Path, case: str):
    edit, words = HEADERS[case]
    refused(small, tmp_path / "c", with_header(saved, edit), words)


def refused(small, file: Path, data: bytes, words: str) -> None:
    file.write_bytes(data)
    with pytest.raises(QwenMLXError) as error:
        PromptCache.load(file, small[0])
    assert str(file) in str(error.value)
    assert words in str(error.value), error.value
    assert str(error.value).count(". ") == 0


def test_a_truncated_or_foreign_file_is_one_sentence(small, path: Path, saved: bytes, tmp_path: Path):
    for data in (b"", b"hello", b"\xff" * 100, b"[" * 100, path.read_bytes(), saved + b"x", saved[:-1]):
        refused(small, tmp_path / "c", data, "damaged")
    for length in range(0, len(saved), 97):
        refused(small, tmp_path / "c", saved[:length], "damaged")
    deep = b"[" * 100_000
    refused(small, tmp_path / "c", len(deep).to_bytes(8, "little") + deep, "damaged")
    for where in (tmp_path, tmp_path / "absent"):
        with pytest.raises(QwenMLXError, match="cannot be read"):
            PromptCache.load(where, small[0])


def test_a_flipped_bit_is_seen(small, saved: bytes, tmp_path: Path):
    start = 8 + int.from_bytes(saved[:8], "little")
    for at in np.linspace(start, len(saved) - 1, 20).astype(int):
        spoilt = bytearray(saved)
        spoilt[at] ^= 4
        refused(small, tmp_path / "c", bytes(spoilt), "bytes are not those that were written")


def test_ids_beyond_the_vocabulary(small, saved: bytes, tmp_path: Path):
    """With a checksum that fits: it keeps out accidents, not an attacker."""
    start = 8 + int.from_bytes(saved[:8], "little")
    (tmp_path / "c").write_bytes(saved)
    arrays = dict(mx.load(str(tmp_path / "c"), format="safetensors"))
    at = start + json.loads(saved[8:start])["ids"]["data_offsets"][0]
    for token in (-1, 2**31 - 1):
        spoilt = saved[:at] + token.to_bytes(4, "little", signed=True) + saved[at + 4 :]
        arrays["ids"] = mx.array([token, *arrays["ids"].tolist()[1:]], mx.int32)
        refused(small, tmp_path / "c", with_header(spoilt, meta("crc32", module._checksum(arrays))), "token ids")


def test_a_disk_that_is_full_leaves_the_old_file(small, tmp_path: Path):
    cache, limits = PromptCache(small[0]), resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(QwenMLXError, match="nothing to save"):
        cache.save(tmp_path / "c")
    answer(small, [1, 2, 3], cache)
    cache.save(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    answer(small, [1, 2, 3, 4, 5, 6], cache)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(QwenMLXError, match="cannot be written"):
            cache.save(tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "c").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(QwenMLXError, match="cannot be written"):
        cache.save(tmp_path / "absent" / "c")


@each("order", ["old first", "new first", "old closed", "old forgotten"])
def test_a_cache_in_use_serves_a_second_generation_without_harm(small, order: str):
    model, _ = small
    first, second, cache = [3, 1, 4, 1, 5], [3, 1, 4, 9, 2], PromptCache(model)
    settings = {"max_tokens": 12, "temperature": 0}

    def ids(prompt: list[int], cache: PromptCache | None = None) -> list[int]:
        return [chunk.token for chunk in stream_generate(*small, prompt, prompt_cache=cache, **settings)]

    old = stream_generate(*small, first, prompt_cache=cache, **settings)
    made = [next(old).token for _ in range(3)]
    new = stream_generate(*small, second, prompt_cache=cache, **settings)
    others = [next(new).token for _ in range(2)]
    if order == "old first":
        made += [chunk.token for chunk in old]
    elif order == "old closed":
        old.close()
    elif order == "old forgotten":
        del old
    others += [chunk.token for chunk in new]
    if order == "new first":
        made += [chunk.token for chunk in old]
    assert others == ids(second)
    assert made == ids(first)[: len(made)]
    assert cache.ids == [*second, *others][: len(cache.ids)]
    assert len(cache.ids) == cache.layers[0].offset >= len(second) + len(others) - 1
    assert ids(first, cache) == ids(first)


def test_a_cache_of_another_model_object_is_refused(small, path: Path):
    for arguments in ({"prompt_cache": PromptCache(load(path)[0])}, {"prompt_cache": 5}, {"cache": []}, {"cache": 5}):
        with pytest.raises(QwenMLXError, match="cache is"):
            stream_generate(*small, [1, 2], **arguments)


def test_a_file_has_the_umasks_mode_and_replaces_no_device(small, tmp_path: Path):
    """Both kinds of files that a person names, through a link too; a link stays one."""
    model, tokenizer = small
    cache, chat = PromptCache(model), Chat(model, tokenizer)
    answer(small, [1, 2, 3], cache)
    before = os.umask(0o027)
    try:
        for save in (cache.save, chat.save):
            (tmp_path / "target").write_bytes(b"")
            (tmp_path / "target").unlink()
            (tmp_path / "link").unlink(missing_ok=True)
            (tmp_path / "link").symlink_to(tmp_path / "target")
            save(tmp_path / "link")
            assert (tmp_path / "link").is_symlink()
            assert (tmp_path / "target").stat().st_mode & 0o777 == 0o640
            os.mkfifo(tmp_path / "pipe")
            for name in (tmp_path / "pipe", "/dev/null", tmp_path):
                with pytest.raises(QwenMLXError, match="is not a regular file"):
                    save(name)
            (tmp_path / "pipe").unlink()
            for name in ("a\0b", "\ud800", tmp_path / ("x" * 300), "/proc/x"):
                with pytest.raises(QwenMLXError, match=r"no file can|cannot be written"):
                    save(name)
            assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "target"]
    finally:
        os.umask(before)


def test_cache_and_prompt_cache_exclude_each_other(small):
    with pytest.raises(QwenMLXError, match="Both cache and prompt_cache"):
        stream_generate(*small, [1, 2], prompt_cache=PromptCache(small[0]), cache=small[0].make_cache())


def generate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen_mlx.generate", "--temp", "0", "--max-tokens", "5", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.heavy
def test_on_the_command_line(path: Path, tmp_path: Path):
    cached = ["--model", path, "--prompt-cache", tmp_path / "c"]
    first = generate(*cached, "--prompt", "hello hello")
    assert first.returncode == 0, first.stderr
    again = generate(*cached, "--prompt", "hello hell")
    plain = generate("--model", path, "--prompt", "hello hell")
    assert again.stdout == plain.stdout
    count = int(re.search(r"\((\d+) more from the cache\)", again.stderr)[1])
    total = int(re.search(r"prompt: (\d+) tokens", plain.stderr)[1])
    assert 0 < count < total == count + int(re.search(r"prompt: (\d+) tokens", again.stderr)[1])
    other = write_gguf(tmp_path / "other.gguf", RandomModel(seed=1))
    for arguments, words in (
        (["--model", other, "--prompt-cache", tmp_path / "c"], "a prompt cache of another model"),
        (["--model", path, "--prompt-cache", path], "damaged or not a prompt cache"),
        (["--model", path, "--prompt-cache", tmp_path / "absent" / "c"], "its folder does not exist"),
    ):
        done = generate(*arguments, "--prompt", "hello")
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_file_that_is_replaced_while_it_is_read(small, saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "c"
    file.write_bytes(saved)
    read = mx.load

    def replaced(*arguments: Any, **options: Any) -> Any:
        (tmp_path / "new").write_bytes(b"another process's")
        (tmp_path / "new").replace(file)
        return read(*arguments, **options)

    monkeypatch.setattr(mx, "load", replaced)
    assert len(PromptCache.load(file, small[0]).ids) > 1


def test_a_name_that_is_not_utf_8(small, saved: bytes, tmp_path: Path):
    file = tmp_path / os.fsdecode(b"\xff.cache")
    file.write_bytes(saved)
    assert len(PromptCache.load(file, small[0]).ids) > 1


@each("shape", [["a", 2_500_000_000], [[1], 400_000_000], ["a", 10**12], [1.5], [-1], [2**64], None, {}, "12", [True]])
def test_a_shape_that_is_none(small, saved: bytes, tmp_path: Path, shape: Any):
    refused(small, tmp_path / "c", with_header(saved, lambda header: header["ids"].update(shape=shape)), "damaged")


@each("metadata", [{"format": 1}, {"format": "\ud800"}, {"format": float("inf")}, [], 5, {"a": None}])
def test_metadata_that_is_none(small, saved: bytes, tmp_path: Path, metadata: Any):
    data = with_header(saved, lambda header: header.update(__metadata__=metadata))
    refused(small, tmp_path / "c", data, "not a prompt cache")
