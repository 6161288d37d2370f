"""Text that no model can hold, and tokenizer.json files that would take all memory or end the process."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from qwen_mlx.errors import GGUFError, QwenMLXError
from qwen_mlx.text.limits import LONGEST_PIECE, PIECE, check_parts, pieces, splits_after_lines
from qwen_mlx.text.token_names import name_splitter
from qwen_mlx.text.tokenizer import Tokenizer
from qwen_mlx.text.vocabulary import SPLIT, sentencepiece
from reference.small_models import RandomModel, save_folder, write_gguf


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.read(write_gguf(tmp_path_factory.mktemp("m") / "m.gguf", RandomModel()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "m", RandomModel())


def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(plain: Tokenizer):
    rng = random.Random(0)
    words = [
        "a",
        "B's",
        " c",
        "\n",
        "\r\n",
        "\n\n ",
        " \n x",
        "12",
        "é",
        "e\u0301",
        "日本",
        "。",
        "、",
        " - ",
        "\t",
        "\u3000",
        "'ll",
    ]
    text = "".join(rng.choice(words) for _ in range(PIECE))
    split = list(pieces(text))
    assert splits_after_lines(plain._bpe)
    assert len(split) > 1
    assert "".join(split) == text
    assert plain.encode(text) == plain._bpe.encode(text, add_special_tokens=False).ids


def test_every_border_is_one_of_the_rule(plain: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qwen_mlx.text.limits.PIECE", 1)
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("aZé字ʰ1½ \n\r\t.'。-(\u0301\u200b") for _ in range(40))
        assert plain.encode(text) == plain._bpe.encode(text, add_special_tokens=False).ids, repr(text)


def test_a_word_beyond_any_model_is_refused(plain: Tokenizer):
    with pytest.raises(QwenMLXError, match="a word of more than"):
        plain.encode("x" * (2 * LONGEST_PIECE))


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_read(plain: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    longest = max(map(len, plain.names))
    plain.check_length("x" * (100 * longest), 100)
    with pytest.raises(QwenMLXError, match="cannot hold them"):
        plain.check_length("x" * (100 * longest + 1), 100)


class PanicException(BaseException):
    """Named as the library's own."""


def test_a_panic_of_the_library_is_a_sentence(plain: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    class Panics:
        pre_tokenizer = None

        def encode(self, *_: object, **__: object) -> None:
            raise PanicException("retry-limit-in-match over")

    monkeypatch.setattr(plain, "_bpe", Panics())
    with pytest.raises(QwenMLXError, match="retry-limit"):
        plain.encode("x")


def spoil(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
START = r"[^\r\n\p{L}\p{N}]?"
RULES = {
    "Qwen2": SPLIT,
    "Qwen3.5": SPLIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"),
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "GPT-4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
    r"\s+(?!\S)|\s+",
    "GPT-4o": f"{START}{UPPER}*{LOWER}+{CONTRACTIONS}?|{START}{UPPER}+{LOWER}*{CONTRACTIONS}?|\\p{{N}}{{1,3}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}",
    "Llama 3": SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
    "Nemo": rf"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}",
    "DeepSeek V3": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{BLANKS}",
    "DeepSeek V3's digits": r"\p{N}{1,3}",
    "DeepSeek V3's letters": "[一-龥\u3040-ゟ゠-ヿ]+",
    "StarCoder": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_rules_of_known_models_are_accepted(rule: str):
    check_parts({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": rule}}, "model": {}})


@pytest.mark.parametrize("name", ["Qwen2", "GPT-4o", "Nemo"])
def test_a_rule_with_two_runs_reads_a_text_once(name: str):
    """Each of these runs, read again from every of its characters, would take more than 5 seconds."""
    text = "".join(one * 60_000 + "-" for one in (" ", "A", "a", "\u0301")) + "x"
    rule = pre_tokenizers.Split(Regex(RULES[name]), "isolated")
    started = time.thread_time()
    assert len(rule.pre_tokenize_str(text)) < 60_100
    assert time.thread_time() - started < 3


HOSTILE = ["(a+)+", "a*a*b", "a+b", "(a|b)*", "a{1,99}a{1,99}b", r"(a)\1", "(?=a*)", r"\s+$", "^a*b", r"\s*[\r\n]+"]
HOSTILE += [r"\s*[\r\n]+|\s|\s+", "a?" * 30 + "b", "[[a]]*", "(?i:a*)*", "(?i:a|b)+", r".*x", "a|" * 499 + "a|aa"]
HOSTILE += [f"{START}{UPPER}*{LOWER}+", f"{START}{UPPER}*{LOWER}+|{UPPER}|{START}{UPPER}+{LOWER}*"]


@pytest.mark.parametrize("rule", HOSTILE)
def test_a_rule_that_is_not_known_to_be_harmless_is_refused(rule: str):
    with pytest.raises(ValueError, match=r"rule|too many"):
        check_parts({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": rule}}, "model": {}})


DOUBLING = {"type": "Replace", "pattern": {"Regex": "."}, "content": "xxxx"}
SPLITTING = {"type": "Split", "behavior": "Isolated", "invert": False}
BOMBS: dict[str, dict[str, Any]] = {
    "doubling": {"normalizer": {"type": "Sequence", "normalizers": [DOUBLING] * 40}},
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    "precompiled": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a fixed length of 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a list for a normalizer": {"normalizer": [1]},
    "nested": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [DOUBLING] * 9}]}
    },
    "a rule that tries all ways": {"pre_tokenizer": SPLITTING | {"pattern": {"Regex": "(a+)+[bc]"}}},
    "a rule that reads in vain": {"normalizer": {"type": "Replace", "pattern": {"Regex": r"\s*[xy]"}, "content": ""}},
    "a rule of a decoder": {
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "((a{999}){999}){999}"}}]}
    },
    "a long text to search for": {"pre_tokenizer": SPLITTING | {"pattern": {"String": "b" + "a" * 50_000}}},
    "many parts": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 10_000}},
    "a prefix of subwords": {  # it aborted the process
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "aa": 1, "é": 2, "aé": 3},
            "merges": [["a", "é"]],
            "continuing_subword_prefix": "x",
        }
    },
    "a merge into no token": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}},
    "no model": {"model": None},
    "another model": {"model": {"type": "Unigram", "vocab": []}},
    "an id": {"added_tokens": [{"id": 250_000_000, "content": "<x>", "special": True}]},
    "a negative id": {"added_tokens": [{"id": -1, "content": "<x>", "special": True}]},
    "an id that is no number": {"added_tokens": [{"id": "1", "content": "<x>", "special": True}]},
}


@pytest.mark.parametrize("changes", BOMBS.values(), ids=BOMBS)
def test_a_hostile_tokenizer_json(folder: Path, changes: dict[str, Any]):
    spoil(folder / "tokenizer.json", **changes)
    with pytest.raises(QwenMLXError, match=r"tokenizer\.json"):
        Tokenizer.read(folder)


@pytest.mark.parametrize("changes", [{"eos_token": ["a"]}, {"bos_token": 5, "add_bos_token": True}, {"pad_token": {}}])
def test_names_of_tokens_that_are_no_names(folder: Path, changes: dict[str, Any]):
    spoil(folder / "tokenizer_config.json", **changes)
    assert Tokenizer.read(folder).eos_token_ids


@pytest.mark.parametrize("template", [[1, 2], 7, [{"name": ["a"], "template": "x"}]])
def test_a_template_that_is_no_text(folder: Path, template: Any):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    spoil(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(QwenMLXError, match="chat_template"):
        Tokenizer.read(folder)


@pytest.mark.parametrize("tokens", [["a" * 10**6], [f"{i:0500}" for i in range(20_000)]], ids=["one", "many"])
def test_a_sentencepiece_vocabulary_of_long_tokens_is_refused(tokens: list[str]):
    """Every split of every token is looked at."""
    ids = {token: i for i, token in enumerate(tokens)}
    with pytest.raises(GGUFError, match="too many characters"):
        sentencepiece(ids, [0.0] * len(ids), None, True)


@given(
    st.lists(st.text("ab<|", min_size=1, max_size=5), min_size=1, unique=True), st.text("ab<|\u00e9\ufdd0", max_size=40)
)
def test_many_names_are_found_as_few_are(names: list[str], text: str):
    with pytest.MonkeyPatch.context() as patch:
        few = name_splitter(names)(text)
        patch.setattr("qwen_mlx.text.token_names.MANY", 0)
        many = name_splitter(names)(text)
    assert "".join(many) == text
    assert many == few


def test_very_many_names_are_found_at_once():
    """Each of them tried at each place would take seconds."""
    names = [f"<|s_{i}|>" for i in range(20_000)]
    text = "".join(names[::9]) + "<|s_x" * 20_000
    started = time.thread_time()
    split = name_splitter(names)(text)
    assert time.thread_time() - started < 0.8
    assert split[1::2] == names[::9]


def test_a_chat_of_a_model_with_very_many_added_tokens(plain: Tokenizer):
    """65,536 of a model for speech: 200 messages would take a minute."""
    added = {f"<|s_{i}|>": 1000 + i for i in range(10_000)}
    tokenizer = Tokenizer(
        plain._bpe, plain.names, plain.special | added, plain.control, plain.eos_token_ids, plain.chat_templates
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"<|s_{i}|>{i}<|im_end|>"} for i in range(60)]
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    started = time.thread_time()
    ids = tokenizer.apply_chat_template(messages, chat_template=template)
    assert time.thread_time() - started < 1
    assert [i for i in ids if i >= 1000] == [1000 + i for i in range(60)]
    assert ids.count(plain.special["<|im_end|>"]) == 60


def test_control_tokens_of_too_many_characters_are_refused(plain: Tokenizer):
    control = {f"{chr(0x4E00 + i)}x": i for i in range(2049)}
    with pytest.raises(QwenMLXError, match="more than 2,048 different characters"):
        Tokenizer(plain._bpe, plain.names, control, control, {0}, {})
