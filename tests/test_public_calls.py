"""Wrong arguments of public calls: whatever a caller gives, the answer is a result or a QwenMLXError."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qwen_mlx
from qwen_mlx import Chat, PromptCache, QwenMLXError, Tokenizer
from qwen_mlx.backend import mx
from reference.small_models import RandomModel, write_gguf
from tests.helpers.encoders import classifier
from tests.helpers.fim_model import save_fim_folder

WRONG = st.one_of(
    st.sampled_from([None, True, "", "x", b"x", (), [], {}, [None], ["x", 1], [[]], {"x": 1}, {1: "x"}, {"role": "x"}]),
    st.sampled_from([0, -1, 5, 2**70, 0.5, -1.0, float("nan"), float("inf"), 1j, object(), print, Ellipsis]),
    st.builds(lambda: np.array([1, 2])),
    st.builds(lambda: np.array([[0.5]])),
    st.builds(lambda: mx.array([1, 2])),
    st.builds(lambda: mx.array(1.5)),
    st.sampled_from([np.int64(3), np.float32(0.5), Path("nowhere"), slice(1), {1, 2}, range(3), iter(())]),
    st.lists(st.sampled_from([None, 1, "x", 0.5, b"x", {"role": "user", "content": "x"}]), max_size=3),
)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each public call by its name, with arguments that it takes."""
    folder = tmp_path_factory.mktemp("calls")
    path = save_fim_folder(folder / "model", max_position_embeddings=128)
    base = write_gguf(folder / "base.gguf", RandomModel(num_hidden_layers=1))
    (model, tokenizer), encoder = qwen_mlx.load(path), qwen_mlx.load_encoder(classifier(folder / "classifier"))
    both = {"model": model, "tokenizer": tokenizer}
    messages = [{"role": "user", "content": "hi"}]
    (saved := folder / "saved").mkdir()

    def generate_of(name: str) -> Callable[..., Any]:
        return lambda **arguments: list(getattr(qwen_mlx, name)(**arguments))

    def chat(**arguments: Any) -> None:
        list(Chat(**arguments).send("hi"))

    def sent(text: Any) -> None:
        list(Chat(model, tokenizer, max_tokens=1).send(text))

    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "generate": (qwen_mlx.generate, {**both, "prompt": "hi", "max_tokens": 1}),
        "stream_generate": (generate_of("stream_generate"), {**both, "prompt": "hi", "max_tokens": 1}),
        "batch_generate": (qwen_mlx.batch_generate, {**both, "prompts": ["hi"], "max_tokens": 1}),
        "fill": (qwen_mlx.fill, {**both, "prefix": "a", "suffix": "b", "max_tokens": 1}),
        "stream_fill": (generate_of("stream_fill"), {**both, "prefix": "a", "suffix": "b", "max_tokens": 1}),
        "Chat": (chat, {**both, "max_tokens": 1}),
        "Chat.send": (sent, {"text": "hi"}),
        "Chat.edit": (Chat(model, tokenizer).edit, {"number": 1}),
        "Chat.save": (Chat(model, tokenizer).save, {"path": folder / "chat.json"}),
        "Chat.load": (Chat(model, tokenizer).load, {"path": folder / "chat.json"}),
        "PromptCache": (PromptCache, {"model": model}),
        "PromptCache.save": (PromptCache(model).save, {"path": folder / "cache"}),
        "PromptCache.load": (PromptCache.load, {"path": folder / "cache", "model": model}),
        "load": (qwen_mlx.load, {"model": path}),
        "load_encoder": (qwen_mlx.load_encoder, {"model": folder / "classifier"}),
        "convert": (qwen_mlx.convert, {"source": path, "output": folder / "converted", "force": True}),
        "export": (qwen_mlx.export, {"source": base, "output": folder / "exported.gguf", "force": True}),
        "embed": (qwen_mlx.embed, {"encoder": encoder, "texts": ["hi"]}),
        "score": (qwen_mlx.score, {"encoder": encoder, "texts": ["hi"]}),
        "step_scores": (qwen_mlx.step_scores, {"encoder": encoder, "texts": ["hi"], "step": "<|im_end|>"}),
        "activations": (qwen_mlx.activations, {"model": model, "input_ids": [1, 2]}),
        "hidden_states": (qwen_mlx.hidden_states, {"model": model, "input_ids": [1, 2]}),
        "Qwen2": (lambda input_ids: mx.eval(model(input_ids)), {"input_ids": [1, 2]}),
        "SamplingSettings": (qwen_mlx.SamplingSettings, {}),
        "Tokenizer": (tokenizer.__call__, {"text": "hi"}),
        "Tokenizer.encode": (tokenizer.encode, {"text": "hi"}),
        "Tokenizer.decode": (tokenizer.decode, {"ids": [1]}),
        "Tokenizer.read": (Tokenizer.read, {"path": path}),
        "Tokenizer.save": (tokenizer.save, {"folder": saved}),
        "Tokenizer.check_length": (tokenizer.check_length, {"text": "hi", "context_length": 9}),
        "Tokenizer.token_bytes": (tokenizer.token_bytes, {"i": 1}),
        "Tokenizer.token_text": (tokenizer.token_text, {"i": 1}),
        "Tokenizer.with_prefix": (tokenizer.with_prefix, {"ids": [1]}),
        "ModelConfig.from_folder": (qwen_mlx.ModelConfig.from_folder, {"folder": path}),
        "ModelConfig.suggest_yarn": (model.config.suggest_yarn, {"n_tokens": 200}),
        "PromptCache.keep": (PromptCache(model).keep, {"prompt": [1]}),
        "Tokenizer.render_chat": (tokenizer.render_chat, {"messages": messages}),
        "Tokenizer.apply_chat_template": (tokenizer.apply_chat_template, {"messages": messages}),
    }
    return found


GENERATING = ["generate", "stream_generate", "batch_generate", "fill", "stream_fill", "Chat", "Chat.send"]
FILES = ["Chat.save", "Chat.load", "PromptCache.save", "PromptCache.load", "load", "load_encoder", "convert", "export"]
VALUES = ["embed", "score", "step_scores", "activations", "hidden_states", "Qwen2"]
TEXTS = ["encode", "decode", "render_chat", "apply_chat_template", "read", "save"]
TEXTS += ["check_length", "token_bytes", "token_text", "with_prefix"]
OTHERS = ["Chat.edit", "PromptCache", "PromptCache.keep", "SamplingSettings", "Tokenizer"]
OTHERS += ["ModelConfig.from_folder", "ModelConfig.suggest_yarn"]
NAMES = [*GENERATING, *FILES, *VALUES, *(f"Tokenizer.{name}" for name in TEXTS), *OTHERS]
# Parameters that are written in the signature of another function.
SAME = {"stream_generate": qwen_mlx.stream_generate, "stream_fill": qwen_mlx.stream_fill, "Chat": Chat}


def parameters(name: str, call: Callable[..., Any]) -> list[str]:
    every = inspect.signature(SAME.get(name, call)).parameters
    return [p for p in every if every[p].kind is not inspect.Parameter.VAR_KEYWORD]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for what a call writes under a wrong name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_argument_gives_a_result_or_a_sentence(name: str, calls, elsewhere):
    call, right = calls[name]
    assert sorted(calls) == sorted(NAMES)
    if name not in ("Chat.edit", "Chat.load", "PromptCache.save", "PromptCache.load"):  # there is nothing to begin with
        call(**right)

    examples = 50 if name in ("convert", "export", "load_encoder") else 150  # each a model that is read or written

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    @given(st.dictionaries(st.sampled_from(parameters(name, call)), WRONG, min_size=1, max_size=2))
    def check(wrong: dict[str, Any]) -> None:
        # A large limit is right, and only takes long.
        if isinstance(wrong.get("max_tokens"), int | np.int64) or (name == "load" and wrong.get("model", 1) is None):
            return
        with contextlib.suppress(QwenMLXError):
            call(**{**right, **wrong})

    check()


def test_every_public_callable_is_called_with_wrong_arguments():
    kinds = {"BatchResult", "GenerationChunk", "Encoder", "GGUFError", "QwenMLXError", "ModelConfig"}  # results, errors
    assert {name for name in qwen_mlx.__all__ if name not in NAMES} == kinds


def test_a_wrong_name_is_answered_with_the_right_one(calls):
    for name, wrong, words in (
        ("generate", {"temp": 0}, "did you mean 'temperature'"),
        ("batch_generate", {"sampler": print}, "mlx-lm's: give temperature="),
        ("load", {"device": "cpu"}, "no argument 'device'"),
        ("convert", {"bits": 4}, "no argument 'bits'"),
        ("embed", {"batchsize": 4}, "did you mean 'batch_size'"),
    ):
        call, right = calls[name]
        with pytest.raises(QwenMLXError, match=words):
            call(**right, **wrong)


def test_a_missing_argument_and_one_too_many_are_sentences(calls):
    both = [calls["generate"][1][name] for name in ("model", "tokenizer")]
    for call, words in (
        (
            lambda: qwen_mlx.generate(*both),
            r"generate: missing .*'prompt'; its arguments are \(model, tokenizer, prompt, \*, ",
        ),
        (lambda: qwen_mlx.generate(*both, "hi", 5), r"generate: too many positional arguments; .*, \*, .*max_tokens"),
        (lambda: Chat(both[0]), r"^Chat: missing .*'tokenizer'; its arguments are \(model, tokenizer, "),
        (lambda: both[1].encode(), r"^Tokenizer.encode: missing .*'text'; its arguments are \(text, "),
    ):
        with pytest.raises(QwenMLXError, match=words):
            call()


def test_a_wrong_kind_is_named_with_the_right_one(calls):
    call, right = calls["generate"]
    with pytest.raises(QwenMLXError, match=r"model is .*Tokenizer.*, expected Qwen2"):
        call(**{**right, "model": right["tokenizer"], "tokenizer": right["model"]})
    assert isinstance(right["tokenizer"], Tokenizer)
