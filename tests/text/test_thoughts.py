"""Thoughts are told from answers, whatever the pieces in which the text comes."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from qwen_mlx.text.thoughts import Thoughts, think_marks
from qwen_mlx.text.tokenizer import Tokenizer
from tests.helpers.byte_folder import write_byte_folder
from tests.helpers.cases import each

MARKS = ("<think>", "</think>")
CASES = [
    # text, opened by the prompt, thought, answer
    ("<think>\nI think.\n</think>\n\nYes.\n", False, "I think.", "Yes.\n"),
    ("\n<think>a</think>b</think>", False, "a", "b</think>"),
    ("I think.\n</think>\n\nYes.", True, "I think.", "Yes."),
    ("<think>\nI think.</think>Yes.", True, "I think.", "Yes."),
    ("\n\n</think>\n\nYes.", True, "", "Yes."),
    ("</think>", True, "", ""),
    ("Cut off \n</thi", True, "Cut off \n</thi", ""),
    ("  Yes <think>no</think>.", False, "", "  Yes <think>no</think>."),
    ("<thin air", False, "", "<thin air"),
    ("<thin", False, "", "<thin"),
    (" ", False, "", " "),
    ("a < b </ c </think> d", True, "a < b </ c", "d"),
    ("", True, "", ""),
]


def split(pieces: list[str], opened: bool) -> tuple[str, str]:
    thoughts = Thoughts(MARKS, opened)
    parts = [thoughts.add(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@each(("text", "opened", "thought", "answer"), CASES)
def test_thought_and_answer(text: str, opened: bool, thought: str, answer: str):
    assert split([text], opened) == (thought, answer)
    assert split([*text, ""], opened) == (thought, answer)


@given(
    pieces=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", " ", "\n", "a", "</", ""]), min_size=1
    ),
    opened=st.booleans(),
)
def test_the_pieces_do_not_matter(pieces: list[str], opened: bool):
    assert split(pieces, opened) == split(["".join(pieces)], opened)


def test_nothing_of_a_thought_waits_longer_than_it_must():
    thoughts = Thoughts(MARKS, opened=True)
    assert [thoughts.add(piece)[0] for piece in ("I", " ", "th", "<", "b", "\n", "</think")] == [
        *("I", "", " th", "", "<b", "", "")
    ]
    assert thoughts.thinking
    assert thoughts.add(">") == ("", "")
    assert not thoughts.thinking


@each(
    ("special", "template", "marks"),
    [
        (["<think>", "</think>"], "", MARKS),
        ([], "{{ content.split('</think>')[-1] }}", MARKS),
        (
            [],
            "Think within <|begin_of_thought|> and <|end_of_thought|>.",
            ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ),
        ([], "<Thought> {{ x }} </Thought>", ("<Thought>", "</Thought>")),
        (["<think>"], "", None),
        (["<|im_start|>"], "{{ messages }}", None),
    ],
)
def test_marks_are_found_in_the_tokens_or_the_template(special, template, marks):
    assert think_marks(special, [template]) == marks


def test_a_prompt_opens_a_thought(tmp_path: Path):
    source = "{{ messages[0].content }}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    tokenizer = Tokenizer.from_folder(write_byte_folder(tmp_path, chat_template=source))
    messages = [{"role": "user", "content": "Hi"}]
    for prompt, opened in (
        (tokenizer.apply_chat_template(messages), True),
        (tokenizer.apply_chat_template(messages, add_generation_prompt=False), False),
        (tokenizer.encode("<think>\n\n</think>\n\n", allow_special=True), False),
    ):
        thoughts = tokenizer.thoughts(prompt)
        assert thoughts is not None
        assert thoughts.thinking is opened
