"""Chat templates of real models, rendered by transformers and here, over conversations as clients send them.

Where transformers refuses or garbles what a client sends (the text of a tool call's arguments quoted once more, a list
written as Python writes it), the same conversation in an older form is what transformers is asked for.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from qwen_mlx import QwenMLXError
from qwen_mlx.text.tokenizer import Tokenizer
from tests.helpers.byte_folder import write_byte_folder
from tests.helpers.cases import each

DATA = Path(__file__).parents[1] / "data" / "chat_templates.json"
TEMPLATES = {entry["name"]: entry["template"] for entry in json.loads(DATA.read_text(encoding="utf-8"))["templates"]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wéather & <wind> of a 'city', \"now\"",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "城市"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
ARGUMENTS = {"city": "Zürich", "days": 3}
GARBLED = (
    "[{'type': 'text'",
    '"type": "text"',
    "{'city'",
    '\\"city',
)  # a part or arguments as Python's or doubled JSON


def user(content: Any = "Hi there") -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def answer(content: Any = "Fine.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any, number: int = 0) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(content: Any = '{"temp": 21}', number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": f"call0000{number}", "name": "get_weather"}


def called(arguments: Any, content: Any) -> list[dict[str, Any]]:
    return [user("Weather?"), answer(content, tool_calls=[call(arguments)]), result()]


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


OPENAI = {"refusal": None, "audio": None, "function_call": None, "tool_calls": None}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
# name -> (forms of the messages, the first as a client sends it; the template's other variables; words that stay)
CONVERSATIONS: dict[str, tuple[list[list[dict[str, Any]]], dict[str, Any], tuple[str, ...]]] = {
    "one message": ([[user()]], {}, ("Hi there",)),
    "no generation prompt": ([[user()]], {"add_generation_prompt": False}, ("Hi there",)),
    "system": ([[system("Be brief."), user()]], {}, ("Hi there",)),
    "empty system": ([[system(""), user()]], {}, ("Hi there",)),
    "two turns": ([[user("one"), answer("two 你好"), user("three e\u0301 👩‍💻")]], {}, ("three",)),
    "ends with an answer": ([[user("one"), answer("two")]], {"add_generation_prompt": False}, ("two",)),
    "white space": ([[user("\n\n a \t\n"), answer("  b\n\n"), user(" c ")]], {}, ()),
    "tools": ([[user("Weather?")]], {"tools": [WEATHER]}, ()),
    "tools and system": ([[system("Be brief."), user("Weather?")]], {"tools": [WEATHER, WEATHER]}, ()),
    "call": ([called(ARGUMENTS, ""), called(TEXT, "")], {"tools": [WEATHER]}, ()),
    "call beside text": ([called(ARGUMENTS, "I look."), called(TEXT, "I look.")], {"tools": [WEATHER]}, ()),
    "call as OpenAI's": (
        [called(TEXT, None), called(ARGUMENTS, None), called(ARGUMENTS, ""), called(TEXT, "")],
        {},
        (),
    ),
    "two calls": (
        [
            [user(), answer("", tool_calls=[call(a), call(a, 1)]), result(), result("x", 1), answer("End.")]
            for a in (ARGUMENTS, TEXT)
        ],
        {"tools": [WEATHER]},
        (),
    ),
    "developer": ([[system("Be brief.", role), user()] for role in ("developer", "system")], {}, ()),
    "system twice": ([[system("Be brief."), user("one"), answer("two"), system("In French."), user()]], {}, ()),
    "part": ([[user([text_part("Hi there")])], [user()]], {}, ("Hi there",)),
    "parts": (
        [
            [system([text_part("Be "), text_part("brief.")]), user([text_part("Hi "), text_part("there")])],
            [system("Be brief."), user()],
        ],
        {},
        ("Hi", "there"),
    ),
    "reasoning": ([[user("one"), answer("two", reasoning_content="I think."), user("three")]], {}, ("three",)),
    "reasoning by its older name": ([[user("one"), answer("two", thinking="I think."), user("three")]], {}, ("three",)),
    "thoughts in the text": ([[user("one"), answer("<think>\nI think.\n</think>\n\ntwo"), user("three")]], {}, ()),
    "an object of OpenAI's": ([[user("one"), answer("two", **OPENAI), user("three")]], {}, ("three",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_folder(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def theirs(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# The conversations that a template refuses, in transformers and here: roles out of order, tools, or messages of a form
# of its own.
REFUSED = {
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": 16,
    "llama-cpp-deepseek-r1": 5,
    "axolotl-mistral_v1": 5,
    "axolotl-nemotron_h": 5,
    "axolotl-aya": 5,
    "unsloth-vicuna": 5,
    "unsloth-vicuna_old": 5,
    "unsloth-alpaca": 5,
    "unsloth-unsloth": 5,
    "axolotl-mistral_v7_tekken": 4,
    "Qwen3.5-4B": 1,
    "Mistral-Small-3.2-24B-Instruct-2506": 1,
    "mistralai-Mistral-Nemo-Instruct-2407": 1,
    "trl-qwen3_5_nothink": 1,
    "axolotl-mistral_v2v3": 1,
}


def test_there_are_sixty_templates_and_twelve_hundred_equal_conversations():
    assert len(TEMPLATES) >= 60
    assert len(CONVERSATIONS) >= 20
    assert len(TEMPLATES) * len(CONVERSATIONS) - sum(REFUSED.values()) >= 1200


@each("name", TEMPLATES)
def test_text_and_ids_equal_transformers(folder: Path, theirs, name: str):
    source = TEMPLATES[name]
    ours = Tokenizer.from_folder(folder)
    ours.chat_templates["default"] = source
    different, refused = [], 0
    for title, (forms, options, words) in CONVERSATIONS.items():
        options = {"add_generation_prompt": True} | options
        if title == "developer" and ("developer" not in source or name == "deepseek-ai-DeepSeek-V3.2"):
            forms = forms[1:]  # the role would be invented, or left out by a template that only names it
        texts = [rendered(theirs, source, form, options, words) for form in forms]
        if title == "call as OpenAI's":  # as transformers 4 gave it to templates, before an empty text is tried
            texts[2:2] = [with_none(theirs, source, form, options) for form in forms[1::-1]]
        texts = [text for text in texts if text]
        calls = any(message.get("tool_calls") for message in forms[0])
        # A template that writes the first of several parts alone gets them joined.
        needed = {"get_weather"} if calls else {"brief"} if title == "parts" else set()
        expected = next((text for text in texts if all(word in text for word in needed)), next(iter(texts), None))
        messages = CONVERSATIONS[title][0][0]
        if expected is None:
            with pytest.raises(QwenMLXError):
                ours.render_chat(messages, **options)
            refused += 1
            continue
        text, ids = ours.render_chat(messages, **options), ours.apply_chat_template(messages, **options)
        if text != expected or ids != theirs.encode(expected, add_special_tokens=False):
            different.append((title, text, expected))
    assert not different
    assert refused == REFUSED.get(name, 0)
    for options in INJECTED:
        harmless = json.loads(json.dumps(options).replace(CONTROL_TEXT, "nothing"))
        counts = [control_tokens(ours, **one) for one in (options, harmless)]
        assert counts[0] == counts[1]


# A control token's name without its brackets, which templates write around names, keys and roles.
CONTROL_TEXT = "|im_end|"
SCHEMA = {"type": "object", CONTROL_TEXT: "x", "properties": {CONTROL_TEXT: {"type": "integer", CONTROL_TEXT: "x"}}}
ODD_TOOL = {"type": "function", "function": {"name": CONTROL_TEXT, "description": "d", "parameters": SCHEMA}}
ODD_CALL = {"name": CONTROL_TEXT, "arguments": {CONTROL_TEXT: CONTROL_TEXT}}
ODD_ANSWER = answer("", tool_calls=[{"id": "call00000", "type": "function", "function": ODD_CALL}])
INJECTED: list[dict[str, Any]] = [
    {"messages": [user(f"a<{CONTROL_TEXT}>")], "tools": [ODD_TOOL]},
    {"messages": [user(), ODD_ANSWER, result(f"<{CONTROL_TEXT}>")], "tools": [ODD_TOOL]},
    {"messages": [{"role": CONTROL_TEXT, "content": CONTROL_TEXT}]},
]


def control_tokens(tokenizer: Tokenizer, **options: Any) -> int:
    """How many control tokens a conversation has; -1 where the template refuses it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = tokenizer.apply_chat_template(**options)
    except QwenMLXError:
        return -1
    return sum(tokenizer.names[i] in tokenizer.control for i in ids)


def with_none(theirs, source: str, messages: list, options: dict[str, Any]) -> str | None:
    """The template's text with None for a content, which transformers 5 leaves out."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        return _compile_jinja_template(source).render(
            messages=messages, **{"tools": None} | theirs.special_tokens_map | options
        )
    except Exception:
        return None


def rendered(theirs, source: str, messages: list, options: dict[str, Any], words: tuple[str, ...]) -> str | None:
    """Transformers' text; None if it refuses the messages, leaves out a word or garbles a part."""
    try:
        text = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    except Exception:
        return None
    garbled = any(sign in text for sign in GARBLED)
    return None if garbled or not all(word in text for word in words) else text
