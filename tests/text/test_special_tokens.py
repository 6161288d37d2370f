"""Tokens with a role: what ends a text, what stands around it, what a template can name; and the guard of messages."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_mlx import GGUFError, QwenMLXError
from qwen_mlx.generation.text import encode_prompt
from qwen_mlx.text.chat_template import render, render_traced
from qwen_mlx.text.special_tokens import end_ids
from qwen_mlx.text.taint import Taint, plain
from qwen_mlx.text.tokenizer import Tokenizer
from tests.helpers.byte_folder import CONTROL, special_ids, write_byte_folder
from tests.helpers.cases import each

BOS, EOS, IM_END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|im_end|>"
IDS = special_ids()
TAINT = Taint(CONTROL)
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
CALLS = "{%% for m in messages %%}{%% for c in m.tool_calls %%}{{ %s }}{%% endfor %%}{%% endfor %%}"
HI = [{"role": "user", "content": "Hi"}]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
MINIMAL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|endoftext|>", IM_END],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 4,
    "tokenizer.ggml.bos_token_id": 3,
}


def folder(path: Path, **changes: Any) -> Tokenizer:
    return Tokenizer.from_folder(write_byte_folder(path, **changes))


def template_processing(*before: str, after: tuple[str, ...] = ()) -> dict[str, Any]:
    """A post-processor as tokenizer.json writes it."""
    around = [[{"SpecialToken": {"id": name, "type_id": 0}} for name in names] for names in (before, after)]
    tokens = {name: {"id": name, "ids": [IDS[name]], "tokens": [name]} for name in (*before, *after)}
    single = [*around[0], {"Sequence": {"id": "A", "type_id": 0}}, *around[1]]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens}


@each(
    ("template", "expected"),
    [
        ("{{ eos_token }}", IM_END),
        ("{{ bos_token + pad_token }}", f"{BOS}<|endoftext|>"),
        ("{{ unk_token }}", "<|endoftext|>"),
        ("{{ sep_token is defined }}", "False"),
        ("{{ image_token }}", "<s>"),
    ],
)
def test_a_template_can_name_every_special_token(tmp_path: Path, template: str, expected: str):
    tokenizer = folder(tmp_path, chat_template=template, extra_special_tokens={"image_token": "<s>"})
    assert tokenizer.render_chat(HI) == expected


def test_special_tokens_map_names_tokens_too(tmp_path: Path):
    write_byte_folder(tmp_path, chat_template="{{ bos_token }}{{ sep_token }}", bos_token=None)
    names = {"bos_token": {"content": "<s>", "lstrip": False}, "sep_token": "</s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    assert Tokenizer.from_folder(tmp_path).render_chat(HI) == "<s></s>"


@pytest.mark.parametrize("add", [True, False, None])
def test_bos_of_a_template_is_in_every_chat_once(tmp_path: Path, add: bool | None):
    changes = {} if add is None else {"add_bos_token": add}
    tokenizer = folder(tmp_path, chat_template="{{ bos_token }}" + PLAIN, **changes)
    assert tokenizer.apply_chat_template(HI) == [IDS[BOS], *tokenizer.encode("Hi")]


@each(
    ("changes", "before", "after"),
    [
        ({}, [], []),
        ({"post_processor": template_processing(BOS)}, [BOS], []),
        ({"post_processor": template_processing(after=("<|endoftext|>",))}, [], ["<|endoftext|>"]),
        ({"post_processor": template_processing(BOS), "add_bos_token": False}, [BOS], []),
        ({"post_processor": template_processing(BOS), "add_bos_token": True}, [BOS], []),
        ({"post_processor": {"type": "Sequence", "processors": [template_processing(BOS, "<s>")]}}, [BOS, "<s>"], []),
        ({"post_processor": BYTE_LEVEL}, [], []),
    ],
)
def test_what_stands_around_a_text_is_read_as_transformers_reads_it(tmp_path: Path, changes, before, after):
    from transformers import AutoTokenizer

    tokenizer, text = folder(tmp_path, **changes), "Hi you"
    expected = [*(IDS[name] for name in before), *tokenizer.encode(text), *(IDS[name] for name in after)]
    assert [*tokenizer.prefix_ids, *tokenizer.encode(text), *tokenizer.suffix_ids] == expected
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == expected
    assert encode_prompt(tokenizer, text, raw=True) == expected[: len(expected) - len(after)]
    assert encode_prompt(tokenizer, "".join(before) + text, raw=True) == expected[: len(expected) - len(after)]


@pytest.mark.parametrize(("end", "after"), [(False, []), (True, [IM_END])])
def test_a_config_that_asks_for_bos_is_obeyed_and_saved(tmp_path: Path, end: bool, after: list[str]):
    from transformers import AutoTokenizer

    tokenizer = folder(tmp_path / "a", add_bos_token=True, add_eos_token=end)
    assert encode_prompt(tokenizer, "Hi", raw=True) == [IDS[BOS], *tokenizer.encode("Hi")]
    tokenizer.save(tmp_path / "a")
    expected = [IDS[BOS], *tokenizer.encode("Hi"), *(IDS[name] for name in after)]
    again = Tokenizer.from_folder(tmp_path / "a")
    assert [*again.prefix_ids, *again.encode("Hi"), *again.suffix_ids] == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("Hi")["input_ids"] == expected


@pytest.mark.parametrize("processor", [template_processing(BOS) | {"single": "x"}, {"type": "TemplateProcessing"}])
def test_a_damaged_post_processor_is_named(tmp_path: Path, processor: dict):
    with pytest.raises(QwenMLXError, match=r"tokenizer\.json"):
        folder(tmp_path, post_processor=processor)


def test_a_post_processor_of_ids_beyond_the_vocabulary_is_named(tmp_path: Path):
    processor = template_processing(BOS)
    processor["special_tokens"][BOS]["ids"] = [10**6]
    with pytest.raises(QwenMLXError, match=r"tokenizer\.json.*1000000"):
        folder(tmp_path, post_processor=processor)


def test_tools_take_the_template_that_is_named_for_them(tmp_path: Path):
    entries = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with {{ tools[0] }}"}]
    tokenizer = folder(tmp_path / "a", chat_template=entries)
    assert (tokenizer.render_chat(HI), tokenizer.render_chat(HI, ["x"])) == ("plain", "with x")
    assert tokenizer.render_chat(HI, ["x"], chat_template="default") == "plain"
    assert tokenizer.apply_chat_template(HI, chat_template="{{ messages[0].role }}") == tokenizer.encode("user")
    with pytest.raises(QwenMLXError, match="continue_final_message is given, which transformers'"):
        tokenizer.render_chat(HI, continue_final_message=True)
    plain = Tokenizer.from_gguf(MINIMAL | {"tokenizer.chat_template": "plain"})
    for saved, name, setting in ((tokenizer, "a", entries), (plain, "b", "plain")):
        (tmp_path / name).mkdir(exist_ok=True)
        saved.save(tmp_path / name)
        assert Tokenizer.from_folder(tmp_path / name).chat_templates == saved.chat_templates
        assert json.loads((tmp_path / name / "tokenizer_config.json").read_text())["chat_template"] == setting
    metadata = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    assert Tokenizer.from_gguf(MINIMAL | metadata).render_chat(HI, ["x"]) == "tools"
    assert plain.render_chat(HI, ["x"]) == "plain"


@each(
    ("own", "words"),
    [
        (5, "chat_template"),
        ([{"name": "x"}], "chat_template"),
        ([{"name": [], "template": ""}], "chat_template"),
        ([{"name": "../x", "template": "y"}], "letters"),
    ],
)
def test_damaged_templates_are_named(tmp_path: Path, own: Any, words: str):
    with pytest.raises(QwenMLXError, match=words):
        folder(tmp_path, chat_template=own)


def test_ends_are_known_by_their_meaning():
    names = ["<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_middle|>", "<EOT>"]
    special = {name: i for i, name in enumerate(names)}
    assert end_ids(special) == {0, 1, 2, 3, 4, 6}
    assert end_ids(special, {"fim_pad": 9}) == {0, 1, 3, 4, 6, 9}


def test_a_file_without_an_end_token_is_refused():
    unmarked = {"tokenizer.ggml.token_type": [1] * 5, "tokenizer.ggml.eos_token_id": None}
    with pytest.raises(GGUFError, match="eos_token_id"):
        Tokenizer.from_gguf(MINIMAL | unmarked | {"tokenizer.ggml.tokens": ["a", "b", "ab", "<x>", "<y>"]})


def test_a_gguf_s_list_of_end_tokens_is_obeyed():
    fields = MINIMAL | {"tokenizer.ggml.eos_token_ids": [2, 4]}
    assert Tokenizer.from_gguf(fields).eos_token_ids == {2, 3, 4}
    for wrong in ([5], [-1], ["4"], 4):
        with pytest.raises(GGUFError, match="eos_token_ids' is"):
            Tokenizer.from_gguf(fields | {"tokenizer.ggml.eos_token_ids": wrong})


def test_a_file_that_marks_no_control_tokens_has_them_by_their_names():
    words = r"token_type' marks no control tokens; 2 .*<\|endoftext\|>, <\|im_end\|>"
    with pytest.warns(UserWarning, match=words) as said:
        tokenizer = Tokenizer.from_gguf(MINIMAL | {"tokenizer.ggml.token_type": [1] * 5})
    assert said[0].filename == __file__, "the caller's line"
    assert (tokenizer.special, tokenizer.eos_token_ids) == ({"<|endoftext|>": 3, IM_END: 4}, {3, 4})
    assert tokenizer.encode(f"ab{IM_END}", allow_special=True) == [2, 4]


@each("pre", [None, "", "default", "gpt-2"])
def test_old_files_without_the_name_of_the_split_rule_load_with_a_sentence(pre: str | None):
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre"):
        tokenizer = Tokenizer.from_gguf(MINIMAL | {"tokenizer.ggml.pre": pre})
    assert tokenizer.encode("ab") == [2]


@pytest.mark.parametrize("pre", ["kormo", "f2llmv2", "deepseek-r1-qwen"])
def test_other_names_of_the_split_rule_load(pre: str):
    assert Tokenizer.from_gguf(MINIMAL | {"tokenizer.ggml.pre": pre}).encode("ab") == [2]


def test_a_gguf_names_its_tokens_for_the_template():
    ids = {"tokenizer.ggml.padding_token_id": 3, "tokenizer.ggml.unknown_token_id": 2**32 - 1}
    template = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}"
    tokenizer = Tokenizer.from_gguf(MINIMAL | ids | {"tokenizer.chat_template": template})
    assert tokenizer.render_chat(HI) == f"<|endoftext|>{IM_END}<|endoftext|>False"


def test_gguf_asks_for_bos_before_raw_text():
    tokenizer = Tokenizer.from_gguf(MINIMAL | {"tokenizer.ggml.add_bos_token": True})
    assert encode_prompt(tokenizer, "ab", raw=True) == [3, 2]
    assert encode_prompt(tokenizer, "<|endoftext|>ab", raw=True) == [3, 2]
    assert encode_prompt(Tokenizer.from_gguf(MINIMAL), "ab", raw=True) == [2]


# Folders without tokenizer.json.


@pytest.mark.parametrize("decoder", [True, False])
def test_vocab_and_merges_are_read_as_transformers_reads_them(tmp_path: Path, decoder: bool):
    from transformers import Qwen2Tokenizer

    write_byte_folder(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"] | {"he": 256, "ll": 257, "hell": 258}
    added = {name: i + 3 for name, i in IDS.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n")
    (tmp_path / "tokenizer.json").unlink()
    if decoder:
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        tokens = {str(i): {"content": name, "special": name in CONTROL, **flags} for name, i in added.items()}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": tokens}))
    else:
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    ours, theirs = Tokenizer.from_folder(tmp_path), Qwen2Tokenizer.from_pretrained(tmp_path)
    for text in ("hello hell", "<|im_start|>hell\u00e9<|im_end|>", "<think>"):
        assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False)
    assert added[IM_END] in ours.eos_token_ids


@each(
    ("name", "content"),
    [("vocab.json", "[]"), ("merges.txt", "h e x\n"), ("merges.txt", "h nosuch"), ("added_tokens.json", '{"x": []}')],
)
def test_damaged_vocab_and_merges_are_named(tmp_path: Path, name: str, content: str):
    files = {"vocab.json": '{"h": 0, "e": 1, "he": 2}', "merges.txt": "h e", "added_tokens.json": '{"<|im_end|>": 3}'}
    for file, text in (files | {name: content}).items():
        (tmp_path / file).write_text(text)
    with pytest.raises(QwenMLXError, match=name.split(".")[0].replace("_", ".")):
        Tokenizer.from_folder(tmp_path)


def token(name: str, **flags: bool) -> dict[str, Any]:
    """An added token as tokenizer_config.json writes it."""
    return {
        "content": name,
        **dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False),
    } | flags


def decoder(*changed: dict[str, Any], **more: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json's added_tokens_decoder with some tokens changed, and more of them by their ids."""
    tokens = {str(i): token(name, special=name in CONTROL) for name, i in IDS.items()}
    return {"added_tokens_decoder": tokens | {str(IDS[one["content"]]): one for one in changed} | more}


@each(
    "changes",
    [
        decoder(token("</s>", special=True, lstrip=True)),
        decoder(token("</s>", special=True, rstrip=True)),
        decoder(token("<think>", lstrip=True, rstrip=True)),
        decoder(token("<think>", single_word=True)),
        decoder(token("<tool_call>", special=True)),
        decoder(token("<think>", normalized=True)),
        decoder(**{"270": token("\u00e9\u1e69", normalized=True), "269": token("<extra>", normalized=True)}),
        decoder(**{"269": token("e\u0301s\u0307\u0323"), "270": token("<more>", normalized=True, rstrip=True)}),
        decoder(**{"269": token("<extra>", special=True), "270": token("<more>")}),
        decoder(**{"300": token("<extra>")}),
        {"additional_special_tokens": ["<extra>", "<tool_call>"]},
        {"extra_special_tokens": {"extra_token": "<extra>"}},
        {"eos_token": "!"},
        {"eos_token": "<extra>", "bos_token": "<more>", "additional_special_tokens": ["<x>"], "sep_token": "<y>"},
        {"extra_special_tokens": {"image_token": "<extra>"}, "pad_token": "<more>"},
    ],
)
def test_added_tokens_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]):
    from transformers import AutoTokenizer

    ours, theirs = folder(tmp_path, **changes), AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        f"a \n{IM_END}  b",
        "a<think>b",
        "a <think> b",
        "(<think>)\u0338",
        "<think>\u0338 <more>  \u0338",
        "\u00b2<think> \u216b<think> \u200d<think>\u4f60",
        "e\u0301s\u0323\u0307 \u00e9\u1e69 e\u0301s\u0307\u0323",
        "x<extra><more>y",
        " ! <tool_call>",
    ):
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    ours.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path)("a </s> <think>  ") == ours("a </s> <think>  ")


def test_a_role_s_token_without_an_embedding_is_text(tmp_path: Path):
    write_byte_folder(tmp_path, pad_token="<extra>", sep_token="<more>")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 270}')
    with pytest.warns(UserWarning, match="'<extra>' that tokenizer_config"):
        assert Tokenizer.from_folder(tmp_path).special.get("<more>") == 269


# The guard of control tokens in messages.


# What a template may do with a user's words v and w, and with the dict d of them.
USES = """
v; '<' ~ v ~ '>'; '<|' + v + '|>'; v | trim; v.strip('<|'); v.lstrip('<'); v.rstrip('>|'); v.split(w or 'x')[-1]
v.split('|') | join('+'); v.rsplit('|', 1)[0]; v.split() | join; v.partition('|')[2]; v.rpartition('|') | join('!')
v.replace('|', w); v | replace(w, '|'); v.replace('|', w, 1); v.removeprefix('<'); v.removesuffix(w); v | upper
v.title(); v | capitalize | lower; v | tojson; v | tojson(ensure_ascii=true); v | length; v[1:-1]; v.swapcase()
v | list | reverse | join; v | sort | join; v | urlencode; v | e; '%s<%s' | format(v, w); [v, w]; {v: w}
{'a': [v]} | string; [w, v] | sort | join(','); '%s' % v; '{}{}'.format(v, w); w.join([v, v]); v.find(w); v.count('|')
v.startswith(w); w in v; v == w; v > w; [v, w] | map('upper') | join; [v, w] | select('in', v) | list | length
v | truncate(9); v.center(9); v | indent; v | int; {'a': 'b'}[v]; v | wordcount; [v, w] | unique | join; [w, v] | min
v ~ [w]; v.isalpha(); v.splitlines() | join; v * 2; v is lower; v is eq w; d; d | tojson; d.items() | list; d | list
d | dictsort; d.copy(); dict(d); d | reverse | list; '%s' % d; d[v]; d.get(v); v in d; '<' ~ d.keys() | first ~ '>'
d | items | list; '<' ~ (d.items() | first | first) ~ '>'; d.values() | join; d | length; d | string
{'a': 'b'}.get(v, w); {'a': 'b'}.get(w); {v: w}.get(v); ('<' ~ v ~ w) | unique | join; [v, w] | unique | list
['a', v].index(v); ['a', 'im_end', w].count(v); [v, w].index(w); (v, 1); '{!r}{:>3}'.format(v, w); '%r' | format(v)
'%5s|%r' % (v, w); '%s' % [v]; '%s %s' % (v, {w: v}); [[1, v], [0, w]] | min
[{'a': v}, {'a': w}] | unique(attribute='a') | list
[{'a': v, 'b': 1}, {'a': w}, {'a': v}] | groupby('a') | list; '<' ~ ([{'a': v}] | groupby('a') | first).grouper ~ '>'
dict(**d) | list; dict(d)[v]; dict(d, a=w) | list; '{x}'.format(**dict(x=v)); namespace(**dict(x=v)).x
namespace(messages[0]).w; '<' ~ (['|im_end|', v] | sort)[1] ~ '>' if v == '|im_end|' else ''
""".replace("\n", ";").split(";")
USES = [use.strip() for use in USES if use.strip()]
MACRO = "{% macro m(a) %}<{{ kwargs | first }}>{{ a }}{% endmacro %}{% set k = messages[0].k %}{{ m(**k) }}"
PIECES = ["<", "|", ">", "<|", "|>", "im_end", "/s", "|im_end|", "<|im_end|>", "<|im_", "a", " ", "A", "</s>", "\n"]
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
WORDS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join) | ANY


@settings(max_examples=15, deadline=None)
@given(v=WORDS, w=WORDS)
@example(v="<|im_end|>", w="a")
@example(v="|im_end|", w="im_end")
@example(v="<|IM_END|>", w="</S>")
def test_a_user_s_characters_make_no_control_token(v: str, w: str):
    message = {"role": "user", "content": "", "v": v, "w": w, "d": {v: w, w: v}, "k": {v: w, "a": w}}
    names = "{% set v, w, d = messages[0].v, messages[0].w, messages[0].d %}"
    template = names + "\n".join("{{ %s }}" % use for use in USES) + "</s>"  # noqa: UP031
    template = MACRO + template
    text = render_traced(template, [message], {}, {}, TAINT)
    assert plain(text) == render(template, [message])
    assert text.endswith("</s>")
    assert not any(name in text[: -len("</s>")] for name in CONTROL)


def test_a_control_token_within_arguments_stays_text(tmp_path: Path):
    tokenizer = folder(tmp_path, chat_template=CALLS % "c.function.arguments | tojson")
    arguments = '{"a": "\\u003c|im_end|>"}'
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    ids = tokenizer.apply_chat_template([{"role": "assistant", "tool_calls": [call]}])
    assert tokenizer.decode(ids, skip_special=False) == '{"a": "<|im_end|>"}'
    assert IDS[IM_END] not in ids


class Color(str, enum.Enum):
    RED = "<|im_end|>"


class Word(str):
    def __str__(self) -> str:
        return "<|im_end|>"


@dataclasses.dataclass
class Point:
    x: Any


class Model:
    """An object with pydantic's method, as OpenAI's library has them."""

    def model_dump(self) -> dict[str, Any]:
        return {"x": [Point("a")], "y": Color.RED}


def count_words(text: str) -> int:
    """Counts words.

    Args:
        text: What to count them in.
    """
    return len(text.split())


@each(
    "value",
    [
        Color.RED,
        Word("a"),
        Point(Color.RED),
        Model(),
        np.float32(1.5),
        np.bool_(False),
        np.str_("a"),
        np.array([1])[0],
        collections.OrderedDict(b=1, a=Color.RED),
        collections.UserDict(a=(1, "b")),
        collections.defaultdict(list, a=[True]),
        enum.IntEnum("Level", ["LOW"]).LOW,
        {1: {None: 2.5}},
    ],
    ids=repr,
)
def test_values_of_python_are_plain_as_for_transformers(tmp_path: Path, value: Any):
    from transformers import AutoTokenizer

    template = "{{ x }}{{ messages[0].x }}{{ messages[0].x | tojson }}" + PLAIN
    tokenizer = folder(tmp_path, chat_template=template)
    messages = [{"role": "user", "content": "Hi", "x": value}]
    text = tokenizer.render_chat(messages, x=value)
    assert text == AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, x=value, tokenize=False)
    assert tokenizer.decode(ids := tokenizer.apply_chat_template(messages, x=value), skip_special=False) == text
    assert IDS[IM_END] not in ids


@each("value", [b"<|im_end|>", {"<|im_end|>"}, Path("<|im_end|>"), object(), ValueError(IM_END), [1, len]], ids=repr)
def test_values_that_json_does_not_have_are_named(tmp_path: Path, value: Any):
    tokenizer = folder(tmp_path, chat_template=PLAIN)
    kind = type(value[1] if isinstance(value, list) else value).__name__
    for messages, variables in (([{**HI[0], "x": value}], {}), (HI, {"x": value}), (HI, {"tools": [{"x": value}]})):
        for ask in (tokenizer.render_chat, tokenizer.apply_chat_template):
            with pytest.raises(QwenMLXError, match=f"type {kind} is in (a message|the variable '(x|tools)'),"):
                ask(messages, **variables)


def test_functions_are_tools_as_for_transformers(tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = folder(tmp_path, chat_template="{{ tools | tojson }}" + PLAIN)
    text = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(HI, tools=[count_words], tokenize=False)
    assert tokenizer.render_chat(HI, tools=[count_words]) == text
    assert tokenizer.apply_chat_template(HI, tools=[count_words]) == tokenizer.encode(text)
    for tools, words in (([len], "argument obj"), ("x", "expected a list"), ([folder], "docstring")):
        with pytest.raises(QwenMLXError, match=words):
            tokenizer.apply_chat_template(HI, tools=tools)


def test_an_answer_without_content_is_null_in_json_and_no_messages_are_named(tmp_path: Path):
    tokenizer = folder(
        tmp_path, chat_template="{% for m in messages %}{{ m.content | tojson }}{% endfor %}" + CALLS % 1
    )
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    with pytest.warns(UserWarning, match="leaves out tool calls"):
        assert tokenizer.render_chat([*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]) == '"Hi"null1'
    for ask in (tokenizer.render_chat, tokenizer.apply_chat_template):
        with pytest.raises(QwenMLXError, match="no messages"):
            ask([])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "x", 5]),
        "content": JSON | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=5)})),
        "tool_calls": JSON | st.lists(st.fixed_dictionaries({"function": JSON}), max_size=2),
        "reasoning_content": JSON,
    },
)


@settings(max_examples=200, deadline=None)
@given(messages=JSON | st.lists(MESSAGE | JSON, max_size=4))
def test_any_json_is_a_text_or_a_sentence(messages: Any):
    with contextlib.suppress(QwenMLXError):
        assert isinstance(render(CALLS % "m.role + m.content + c.function.name", messages), str)


@each(
    ("messages", "words"),
    [
        ([{"role": "assistant", "content": "", "ids": 5}], "'ids'"),
        ([{"role": "assistant", "content": "", "ids": [1.5]}], "'ids'"),
        ([{"role": "assistant", "content": "", "function_call": "f()"}], "tool call"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": None}], "no content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
        ([{"role": "assistant", "content": "", "tool_calls": "f()"}], "tool calls"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": 5}]}], "tool call"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{"}]}], "arguments"),
        ("Hi", "list"),
    ],
)
def test_what_is_no_message_is_named(messages: Any, words: str):
    source = (
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.name or c.function.name }}{{ (c.function or c).arguments | tojson }}"
        "{% endfor %}{% endif %}{% endfor %}"
    )
    with pytest.raises(QwenMLXError, match=words):
        render(source, messages)


def test_what_a_template_leaves_out_is_said():
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.warns(UserWarning, match="narrator"):
        assert render(source, [*HI, {"role": "narrator", "content": "x"}]) == "Hi"
    alone = "{% if messages[0].role == 'user' %}{{ messages[0].content }}{% endif %}"
    with pytest.warns(UserWarning, match="function"):
        assert render(alone, [{"role": "function", "name": "f", "content": "x"}]) == ""
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x"}]
    with pytest.warns(UserWarning, match=r"leaves out tool calls and results of tool calls\."):
        assert render(source, [*HI, *called]) == "Hi"
    for role in ("system", "developer"):
        with pytest.warns(UserWarning, match=r"leaves out systems' messages\."):
            assert render(source, [{"role": role, "content": "x"}, *HI]) == "Hi"
    first = "{{ messages[0].content }}{% for m in messages[1:] if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.warns(UserWarning, match="systems' messages within a conversation"):
        assert render(first, [SYSTEM, *HI, {"role": "system", "content": "y"}, *HI]) == "xHiHi"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render(first, [SYSTEM, *HI]) == "xHi"


SYSTEM = {"role": "system", "content": "x"}
WITH_TOOLS = "{% if tools %}" + CALLS % "c.function.arguments | tojson" + "{% endif %}"
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
SWITCHED = "{% if calls %}" + CALLS % "c.function.arguments | tojson" + "{% endif %}"


@each(
    ("template", "before", "variables"),
    [
        (WITH_TOOLS, [], {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (NEEDS_SYSTEM + CALLS % "c.function.arguments | tojson", [SYSTEM], {}),
        (NEEDS_SYSTEM + WITH_TOOLS, [SYSTEM], {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (SWITCHED, [], {"calls": True}),
        (CALLS % "('{\"x\": ' ~ c.function.arguments.values() | first) ~ '}'", [], {}),
    ],
)
def test_calls_are_probed_as_the_conversation_has_them(template: str, before: list[Any], variables: dict[str, Any]):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    messages = [*before, *HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render(template, messages, **variables).endswith('{"x": 1}')


def test_openai_s_older_calls_are_tool_calls():
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x":1}'}}
    messages = [*HI, call, {"role": "function", "name": "f", "content": "r"}]
    call_text = "{% for c in m.tool_calls %}{{ c.function }}{% endfor %}"
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }}" + call_text + ";{% endfor %}"
    assert render(source, messages) == "user:Hi;assistant:{'name': 'f', 'arguments': '{\"x\":1}'};tool:r;"
    own = "{% for m in messages %}{{ m.role }}{{ m.function_call }}{% endfor %}"
    assert render(own, messages).endswith("function")


@each("arguments", ["", " ", "null", "{}", {}, None, ...], ids=repr)
def test_a_call_without_arguments_has_an_empty_object(arguments: Any):
    function = {"name": "f"} | ({} if arguments is ... else {"arguments": arguments})
    messages = [{"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]
    assert render(CALLS % "c.function.arguments | tojson", messages) == "{}"


def test_strings_can_be_multiplied_and_json_has_its_arguments():
    assert render("{{ '-' * 3 + 2 * 'ab' }}", HI) == "---abab"
    json_text = "{{ {'b': 1, 'a': 'é'} | tojson(separators=(',', ':'), sort_keys=true) }}"
    assert render(json_text, HI) == '{"a":"é","b":1}'


# SentencePiece's vocabulary, as CodeQwen1.5's GGUF has it.

CODE = "def area(radius):\n    return 3.14159 * radius ** 2\n\n\nclass Shape:\n    def __init__(self):\n        pass\n"


def sentencepiece_model(space_first: bool) -> Any:
    """A model that SentencePiece trained on a little code."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE.splitlines() * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        add_dummy_prefix=space_first,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("space_first", [False, True])
def test_a_sentencepiece_vocabulary_gives_sentencepiece_s_ids(space_first: bool):
    theirs = sentencepiece_model(space_first)
    ids = range(theirs.vocab_size())
    kinds = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in ids]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.eos_token_id": theirs.eos_id(),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": space_first,
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    assert "<|im_end|>" in tokenizer.special
    for text in (*CODE.splitlines(), CODE, "unseen 你好 é 👩‍💻\t\x00", "  two  spaces ", "classradius", "retturn"):
        own = tokenizer.encode(text)
        assert own == theirs.encode(text), repr(text)
        assert tokenizer.decode(own) == text
        stream = tokenizer.detokenizer()  # of a text that goes on, whose first word has its space
        assert "".join([*map(stream.add, own), stream.finish()]) == (f" {text}" if space_first and text else text)
    around = tokenizer.encode("<|im_start|>def<|im_end|>", allow_special=True)
    assert around[0] == tokenizer.special["<|im_start|>"]
    assert around[-1] == tokenizer.special["<|im_end|>"]


def test_a_sentencepiece_vocabulary_is_saved_for_transformers(tmp_path: Path):
    from transformers import AutoTokenizer

    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "ab", "\u2581", "\u2581ab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 258 + [-4.0, -5.0, -1.0, -3.0, -2.0],
        "tokenizer.ggml.token_type": [2, 3, *[6] * 256, *[1] * 5],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    tokenizer.save(tmp_path)
    for text in ("ab ab", "aab\u00e9 b", " "):
        ids = tokenizer.encode(text)
        assert Tokenizer.from_folder(tmp_path).encode(text) == ids
        assert Tokenizer.from_folder(tmp_path).decode(ids) == text
        assert AutoTokenizer.from_pretrained(tmp_path).encode(text, add_special_tokens=False) == ids
