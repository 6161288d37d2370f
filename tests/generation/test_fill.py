"""Fill in the middle: the prompt's ids, how a context is cut, and where a fill ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mlx import QwenMLXError, fill, generate, load, stream_fill
from qwen_mlx.generation.fill import FillStop, fill_ends, fill_prompt, share
from qwen_mlx.generation.prompt_cache import PromptCache
from qwen_mlx.gguf.reader import GGUFFile
from qwen_mlx.text.tokenizer import Tokenizer
from reference.small_models import END_OF_TEXT, IM_END, RandomModel, save_folder
from tests.helpers.cases import each
from tests.helpers.fim_model import FIM_IDS, FIM_TOKENS, save_fim_folder
from tests.helpers.holes import HOLES

PREFIX, MIDDLE, SUFFIX, PAD, REPOSITORY, FILE = FIM_IDS.values()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    return load(save_fim_folder(tmp_path_factory.mktemp("small") / "fim"))


def test_prompt_without_context(small):
    ids = fill_prompt(small[1], "hello ", " ll", max_prompt_tokens=100)
    assert ids == [PREFIX, *small[1].encode("hello "), SUFFIX, *small[1].encode(" ll"), MIDDLE]


def test_prompt_with_a_repository(small):
    encode = small[1].encode
    ids = fill_prompt(
        small[1], "a", "b", files={"x.py": "one", "y.py": "two"}, repository="r", path="z.py", max_prompt_tokens=100
    )
    context = [REPOSITORY, *encode("r\n"), FILE, *encode("x.py\none\n"), FILE, *encode("y.py\ntwo\n")]
    assert ids == [*context, FILE, *encode("z.py\n"), PREFIX, *encode("a"), SUFFIX, *encode("b"), MIDDLE]


def test_names_of_control_tokens_in_texts_are_text(small):
    text = "".join(FIM_TOKENS) + "<|im_end|><|endoftext|>"
    ids = fill_prompt(small[1], text, text, files=[(text, text)], repository=text, path=text, max_prompt_tokens=5000)
    special = set(FIM_IDS.values()) | {IM_END, END_OF_TEXT}
    assert [i for i in ids if i in special] == [REPOSITORY, FILE, FILE, PREFIX, SUFFIX, MIDDLE]


def test_ends_are_every_token_of_the_format(small):
    assert set(fill_ends(small[1])) == {*FIM_IDS.values(), IM_END, END_OF_TEXT}


def test_a_context_is_cut_around_the_cursor(small):
    """Three tokens before the cursor for one after it; one token a character here."""
    before, after = "abcdefgh" * 30, "ABCDEFGH" * 30
    ids = fill_prompt(small[1], before, after, max_prompt_tokens=83)
    assert len(ids) <= 83
    text = small[1].decode(ids[1 : ids.index(SUFFIX)]), small[1].decode(ids[ids.index(SUFFIX) + 1 : -1])
    assert before.endswith(text[0])
    assert 54 <= len(text[0]) <= 60
    assert text[1] == after[:20]


def test_a_short_side_leaves_its_share_to_the_other(small):
    ids = fill_prompt(small[1], "ab", "x" * 300, max_prompt_tokens=83)
    assert ids == [PREFIX, *small[1].encode("ab"), SUFFIX, *small[1].encode("x" * 78), MIDDLE]
    ids = fill_prompt(small[1], "x" * 300, "ab", max_prompt_tokens=83)
    assert ids[-4:] == [SUFFIX, *small[1].encode("ab"), MIDDLE]
    assert 69 <= ids.index(SUFFIX) <= 79


def test_files_are_cut_before_the_text_around_the_cursor(small):
    """The last files stay; the one that does not fit loses its end; those before it go."""
    files = [(f"{n}", n * 200) for n in "pqr"]
    ids = fill_prompt(small[1], "a" * 100, "b" * 100, files=files, max_prompt_tokens=600)
    assert len(ids) == 600
    counts = {letter: ids.count(small[1].encode(letter)[0]) for letter in "abpqr"}
    context = len("<myproject\n") + len("<r\n\n") + 200 + len("<filename\n")
    # "myproject" has a p and an r of its own, "filename" an a.
    assert counts == {"a": 101, "b": 100, "p": 1, "r": 202, "q": 600 - 3 - 200 - context - len("<\n")}


def test_files_get_half_at_most(small):
    ids = fill_prompt(small[1], "a" * 500, "b" * 500, files=[("q", "q" * 500)], max_prompt_tokens=400)
    room = 400 - 3 - len("myproject\n") - 1 - len("filename\n") - 1
    assert ids.count(small[1].encode("q")[0]) == room - room // 2 - 2  # its separator, its name's line
    assert len(ids) <= 400


@given(
    before=st.text(max_size=200),
    after=st.text(max_size=200),
    files=st.lists(st.tuples(st.text(max_size=10), st.text(max_size=200)), max_size=3),
    most=st.integers(40, 400),
)
@settings(max_examples=100, deadline=None)
def test_a_prompt_is_never_too_long_and_ends_at_the_cursor(small, before, after, files, most):
    ids = fill_prompt(small[1], before, after, files=files, max_prompt_tokens=most)
    assert len(ids) <= most
    assert [ids.count(i) for i in (PREFIX, SUFFIX, MIDDLE)] == [1, 1, 1]
    assert ids[-1] == MIDDLE
    at = ids.index(SUFFIX)
    encoded = small[1].encode(before), small[1].encode(after)
    kept = ids[ids.index(PREFIX) + 1 : at], ids[at + 1 : -1]
    assert encoded[0][len(encoded[0]) - len(kept[0]) :] == kept[0]
    assert encoded[1][: len(kept[1])] == kept[1]


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_shares_fill_the_room(room, first, second, at_least):
    a, b = share(room, first, second, min(at_least, room))
    assert 0 <= a <= first
    assert 0 <= b <= second
    assert a + b == min(room, first + second)
    assert a >= min(first, at_least, room)


def test_the_cut_stays_while_one_types(small):
    """A prompt cache is of use only if the next prompt begins as the last did."""
    before = "abcdefgh" * 100
    prompts = [fill_prompt(small[1], before + "x" * n, "b" * 20, max_prompt_tokens=200) for n in range(20)]
    starts = {tuple(ids[:100]) for ids in prompts}
    assert len(starts) <= 2


def test_the_text_beyond_any_room_is_not_tokenized(small, monkeypatch):
    lengths = []
    encode = small[1].encode
    monkeypatch.setattr(small[1], "encode", lambda text: lengths.append(len(text)) or encode(text))
    fill_prompt(small[1], "x" * 10**6, "y" * 10**6, files=[("f", "z" * 10**6)] * 5, max_prompt_tokens=100)
    assert max(lengths) <= 32 * 100 + 3
    assert len(lengths) < 8


@each(
    ("arguments", "words"),
    [
        ({"prefix": 3}, "prefix is int, expected a string"),
        ({"suffix": None}, "suffix is NoneType"),
        ({"path": b"x"}, "path is bytes"),
        ({"repository": 3}, "repository is int"),
        ({"files": ["ab"]}, "files holds 'ab', expected pairs"),
        ({"files": [("a", 1)]}, "files holds"),
        ({"max_prompt_tokens": 3}, "max_prompt_tokens is 3, expected more than 3"),
        ({"prefix": "\ud800"}, "lone surrogate"),
    ],
)
def test_what_is_not_text_is_refused(small, arguments, words):
    with pytest.raises(QwenMLXError, match=words):
        fill_prompt(small[1], **({"prefix": "", "suffix": "", "max_prompt_tokens": 50} | arguments))


def test_a_model_without_the_tokens_is_refused(tmp_path: Path):
    model, tokenizer = load(save_folder(tmp_path / "m", RandomModel()))
    with pytest.raises(QwenMLXError, match=r"lacks <\|fim_prefix\|>, <\|fim_suffix\|>, <\|fim_middle\|>; take"):
        fill(model, tokenizer, "a", "b")


def test_wrong_arguments_are_refused_before_any_work(small):
    for arguments, words in (
        ({"stop_at": "word"}, "stop_at is 'word', expected 'line' or 'indent'"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ({"files": 5}, "files is int, expected pairs of strings"),
        ({"max_token": 3}, "did you mean 'max_tokens'"),
        ({"temperature": -1}, "temperature is -1"),
    ):
        with pytest.raises(QwenMLXError, match=words):
            stream_fill(*small, "a", "b", **arguments)


def test_a_fill_is_the_greedy_text_after_its_prompt(small):
    ids = fill_prompt(small[1], "hello", " ll", max_prompt_tokens=100)
    plain = generate(*small, ids, max_tokens=20, temperature=0)
    assert fill(*small, "hello", " ll", max_tokens=20) == plain
    assert fill(*small, "hello", " ll", max_tokens=20, prompt_cache=PromptCache(small[0])) == plain
    assert plain


@each("name", [*FIM_TOKENS, "<|im_end|>", "<|endoftext|>"])
def test_a_fill_ends_at_every_token_of_the_format_and_never_shows_it(small, name):
    model, tokenizer = small
    end = tokenizer.special[name]
    bias = dict.fromkeys(fill_ends(tokenizer), -1e4) | {end: 1e4}
    chunks = list(stream_fill(model, tokenizer, "a", "b", logit_bias=bias, min_tokens=2, max_tokens=9))
    assert [chunk.token for chunk in chunks][-1] == end
    assert len(chunks) == 3, "min_tokens keeps every end away"
    assert chunks[-1].finish_reason == "stop"
    assert "<|" not in "".join(chunk.text for chunk in chunks)


def test_a_second_keystroke_computes_what_is_new(small):
    cache, files = PromptCache(small[0]), [("f.py", "hello " * 30)]
    first = list(stream_fill(*small, "hello", "ll", files=files, prompt_cache=cache, max_tokens=2))
    again = list(stream_fill(*small, "hellox", "ll", files=files, prompt_cache=cache, max_tokens=2))
    assert again[-1].stats.reused_tokens > 80
    assert again[-1].stats.prompt_tokens < 12 < first[-1].stats.prompt_tokens
    assert "".join(c.text for c in again) == fill(*small, "hellox", "ll", files=files, max_tokens=2)


def shown(pieces: list[str], **stop) -> tuple[str, bool]:
    """The text that a stop lets through, and whether it ended it."""
    ends, text = FillStop(**stop), ""
    for i, piece in enumerate(pieces):
        part, ended = ends.add(piece, last=i == len(pieces) - 1)
        text += part
        if ended:
            return text, True
    return text, False


CUTS = [
    ("x + 1\n    y", {"line": True}, "x + 1", True),
    ("\n\n  x + 1\r\ny", {"line": True}, "\n\n  x + 1", True),
    ("x + 1  ", {"line": True}, "x + 1  ", False),
    ("\n \n", {"line": True}, "\n \n", False),
    ("a\n    b\n\n\ndef c", {"indent": 4}, "a\n    b", True),
    ("a\n    b\n\n\n    c", {"indent": 4}, "a\n    b\n\n\n    c", False),
    ("a\n\tb\n  c", {"indent": 4}, "a\n\tb", True),
    ("a\nb", {"indent": 0}, "a\nb", False),
    ("a\n    \n", {"indent": 4}, "a\n    \n", False),
]


@each(("text", "stop", "expected", "ended"), CUTS)
def test_stops_at_a_line_and_at_indentation(text: str, stop: dict, expected: str, ended: bool):
    assert shown([text], **stop) == (expected, ended)
    assert shown(list(text), **stop) == (expected, ended)


@each("stop", [{"line": True}, {"indent": 4}])
@each("blank", ["\n", " \r\n", "\n\f"])
def test_blank_lines_without_end_cost_little(stop: dict, blank: str):
    """A small model may write nothing else: work that grows with the square of their number would take hours."""
    pieces = [*[blank] * 10_000, "x", "\ny"]
    assert shown(pieces, **stop) == shown(["".join(pieces)], **stop)
    assert shown(pieces, **stop)[1]


@given(
    pieces=st.lists(st.text(alphabet=" \t\nxy", max_size=6), min_size=1, max_size=8),
    stop=st.sampled_from([{"line": True}, {"indent": 2}, {"indent": 4}, {}]),
)
def test_a_stop_is_the_same_in_whatever_pieces_a_text_comes(pieces: list[str], stop: dict):
    assert shown(pieces, **stop) == shown(["".join(pieces)], **stop)


def test_stop_at_uses_the_line_of_the_cursor(small):
    assert FillStop.of("indent", "def f():\n    if x:\n\treturn ")._indent == 8
    newline = small[1].encode("\n")[0]
    text = fill(*small, "  x", "", stop_at="line", logit_bias={newline: 1e4}, max_tokens=5)
    assert text == "\n" * 5, "blank lines alone do not end a fill at a line"


# Qwen's own example (examples/Qwen2.5-Coder-fim.py).
QUICKSORT = (
    "def quicksort(arr):\n    if len(arr) <= 1:\n        return arr\n    pivot = arr[len(arr) // 2]\n    ",
    "\n    middle = [x for x in arr if x == pivot]\n    right = [x for x in arr if x > pivot]\n"
    "    return quicksort(left) + middle + quicksort(right)",
)


def test_prompts_are_the_documentation_s_text(small, real_gguf: Path):
    """Read with its control tokens, as transformers reads it (tests/text compares the tokenizers on such a text)."""
    prefix, suffix = QUICKSORT
    files = [("library.py", "class Book:\n    pass\n"), ("student.py", "\nclass Student:\n    pass")]
    for tokenizer in (small[1], Tokenizer.from_gguf(GGUFFile(real_gguf).metadata)):
        text = f"<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>"
        ids = fill_prompt(tokenizer, prefix, suffix, max_prompt_tokens=1000)
        assert ids == tokenizer.encode(text, allow_special=True)
        context = "".join(f"<|file_sep|>{path}\n{content}\n" for path, content in files)
        text = f"<|repo_name|>library-system\n{context}<|file_sep|>main.py\n{text}"
        names = {"repository": "library-system", "path": "main.py"}
        ids = fill_prompt(tokenizer, prefix, suffix, files=files, **names, max_prompt_tokens=1000)
        assert ids == tokenizer.encode(text, allow_special=True)
    assert set(fill_ends(tokenizer)) == {151664, 151662, 151659, 151660, 151661, 151663, 151645, 151643}


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_real_fills_of_held_out_functions_equal_transformers(real_gguf: Path, real_hf, count: int):
    """Transformers reads prompt and fill in one pass: if each id is its likeliest next one, its own greedy fill is the
    same."""
    import torch

    model, tokenizer = load(real_gguf)
    assert len(HOLES) == 20
    for prefix, suffix in HOLES[:count]:
        chunks = list(stream_fill(model, tokenizer, prefix, suffix, max_tokens=24, stop_at="line"))
        prompt, made = fill_prompt(tokenizer, prefix, suffix, max_prompt_tokens=1000), [c.token for c in chunks]
        with torch.no_grad():
            logits = real_hf(torch.tensor([prompt + made]), logits_to_keep=len(made) + 1).logits[0]
        assert made == logits[:-1].argmax(-1).tolist(), prefix
        text = "".join(chunk.text for chunk in chunks)
        assert text.strip()
        assert "<|" not in text
        assert "\n" not in text.lstrip()
