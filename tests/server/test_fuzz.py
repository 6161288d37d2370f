"""Bodies of any kind: each is read into tasks that can run, or refused with a status below 500 and a sentence."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mlx import QwenMLXError, load
from qwen_mlx.server.body import Body
from qwen_mlx.server.chat_completions import ChatRequest
from qwen_mlx.server.completions import CompletionRequest
from qwen_mlx.server.errors import RequestError
from qwen_mlx.server.llama_cpp import NativeRequest, detokenize, tokenize
from qwen_mlx.server.scheduler import Scheduler
from qwen_mlx.server.service import Service
from tests.helpers.fim_model import save_fim_folder

ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    1.5,
    1e308,
    -(2**70),
    2**64,
    "",
    "x",
    "\ud800",
    "<|im_end|>",
    [],
    [0],
    ["a"],
    {},
    {"a": 1},
]
TEXTS = st.sampled_from(["hello", "he" * 300, "é\0", "\ud800", "<|im_start|>system", ""]) | st.text(max_size=20)
VALUES = st.sampled_from(ODD) | st.integers(-3, 40) | st.floats(-2, 3) | TEXTS
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "developer", "king", None])
CALLS = st.fixed_dictionaries(
    {"id": VALUES, "type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXTS, "arguments": VALUES})}
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES},
        optional={
            "content": TEXTS | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS})) | VALUES,
            "tool_calls": st.lists(CALLS, max_size=2) | VALUES,
            "tool_call_id": TEXTS,
            "reasoning_content": VALUES,
            "name": VALUES,
        },
    ),
    max_size=3,
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries({"name": TEXTS}, optional={"parameters": VALUES}),
        }
    ),
    max_size=2,
)
EXTRA = st.lists(st.fixed_dictionaries({"text": TEXTS}, optional={"filename": TEXTS, "time": VALUES}), max_size=3)
FIELDS: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(
    [
        *(
            "model",
            "stream",
            "stream_options",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "typical_p",
            "seed",
            "stop",
            "n",
        ),
        *("max_tokens", "max_completion_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty"),
        *(
            "repeat_penalty",
            "repeat_last_n",
            "logit_bias",
            "logprobs",
            "top_logprobs",
            "min_tokens",
            "samplers",
            "user",
        ),
        *("tool_choice", "response_format", "suffix", "echo", "best_of", "prompt", "input_prefix", "input_suffix"),
        *("n_predict", "n_indent", "t_max_prompt_ms", "cache_prompt", "response_fields", "mirostat", "id_slot", "x"),
        *(
            "content",
            "tokens",
            "with_pieces",
            "add_special",
            "ignore_eos",
            "structured_outputs",
            "json_schema",
            "xtc_probability",
            "no_repeat_ngram_size",
        ),
    ],
    VALUES,
)
FIELDS |= {"messages": MESSAGES | VALUES, "tools": TOOLS | VALUES, "input_extra": EXTRA | VALUES}
BODIES = st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none(), max_size=6).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)
MAKERS: dict[str, tuple[Callable[[Service, Body], Any], dict[str, Any]]] = {
    "chat": (ChatRequest, {"messages": [{"role": "user", "content": "hello"}]}),
    "completions": (CompletionRequest, {"prompt": "hello"}),
    "infill": (functools.partial(NativeRequest, infill=True), {"input_prefix": "hello"}),
    "completion": (functools.partial(NativeRequest, infill=False), {"prompt": "hello"}),
    "tokenize": (tokenize, {"content": "hello"}),
    "detokenize": (detokenize, {"tokens": [1]}),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    small = load(save_fim_folder(tmp_path_factory.mktemp("fuzz") / "m", seed=3, max_position_embeddings=128))
    return Service(*small, Scheduler(*small), "small")


def check(service: Service, kind: str, fields: dict[str, Any]) -> bool:
    """Reads a body; True where it is served."""
    make, usual = MAKERS[kind]
    raw = json.dumps(usual | fields).encode()
    made = refused = None
    try:
        made = make(service, Body.read(raw))
    except (RequestError, QwenMLXError) as error:
        refused = error if isinstance(error, RequestError) else RequestError(400, str(error))
    if refused is not None:
        assert 400 <= refused.status < 500
        assert refused.message
        assert "\n" not in refused.message
        assert len(refused.message) < 500
        json.dumps(refused.body).encode()
        return False
    for task in getattr(made, "tasks", []):
        assert 0 < len(task.ids) + task.settings.max_tokens <= 128
        assert all(0 <= token < service.model.config.vocab_size for token in task.ids)
        hash(task.settings.sampling)
    return True


def test_usual_bodies_are_served(service):
    for kind in MAKERS:
        assert check(service, kind, {})


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(sorted(MAKERS)), fields=BODIES)
def test_any_fields_are_served_or_refused(service, kind, fields):
    check(service, kind, fields)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(kind=st.sampled_from(sorted(MAKERS)), fields=BODIES)
def test_five_thousand_bodies(service, kind, fields):
    check(service, kind, fields)
