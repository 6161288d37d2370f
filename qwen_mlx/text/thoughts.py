"""Thoughts: the text that a model writes between marks before it answers."""

from __future__ import annotations

from collections.abc import Collection, Iterable

# Opening and closing marks: DeepSeek-R1's and QwQ's, Sky-T1's and OpenThinker's, Marco-o1's.
THINK_MARKS = (
    ("<think>", "</think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<Thought>", "</Thought>"),
    ("<thinking>", "</thinking>"),
)


def think_marks(special: Collection[str], templates: Iterable[str]) -> tuple[str, str] | None:
    """The marks of a model that has both as tokens, or whose chat template names the closing one; None for others."""
    source = "\n".join(templates)
    return next((m for m in THINK_MARKS if (m[0] in special and m[1] in special) or m[1] in source), None)


class Thoughts:
    """Tells a text's thoughts from its answer as it comes, whatever the pieces.

    A thought is at the beginning of the text: after an opening mark, or at once where the prompt has `opened` it.
    Neither part has the marks, nor the white space beside them.
    """

    def __init__(self, marks: tuple[str, str], opened: bool):
        self._open, self._close = marks
        self._opened = opened
        self._phase = "beginning"  # then "thought", then "answer"
        self._pending = ""  # what may turn out to be a mark, or the white space beside one
        self._after_mark = opened  # True until something follows a mark

    @property
    def thinking(self) -> bool:
        """True while the text is a thought, as far as it is known."""
        return self._phase == "thought" or (self._phase == "beginning" and self._opened)

    def add(self, text: str, last: bool = False) -> tuple[str, str]:
        """The newly complete text of the thought and of the answer; `last`: nothing follows `text`."""
        thought, pending = "", self._pending + text
        if self._phase == "beginning":
            start = pending.lstrip()
            if start.startswith(self._open):
                self._phase, self._after_mark, pending = "thought", True, start[len(self._open) :]
            elif last or not self._open.startswith(start):
                self._phase = "thought" if self._opened else "answer"
        if self._phase == "thought":
            thought, mark, answer = pending.partition(self._close)
            if mark:
                thought = self._without_lead(thought.rstrip())
                self._phase, self._after_mark, pending = "answer", True, answer
            else:
                end = len(pending) if last else self._complete(pending)
                thought, pending = self._without_lead(pending[:end]), pending[end:]
        if self._phase == "answer":
            self._pending = ""
            return thought, self._without_lead(pending)
        self._pending = pending
        return thought, ""

    def _without_lead(self, text: str) -> str:
        """`text` without the white space that follows a mark."""
        if self._after_mark:
            text = text.lstrip()
            self._after_mark = not text
        return text

    def _complete(self, text: str) -> int:
        """The length of `text` without white space and the beginning of a closing mark at its end."""
        sizes = range(min(len(self._close) - 1, len(text)), 0, -1)
        begun = next((size for size in sizes if self._close.startswith(text[-size:])), 0)
        return len(text[: len(text) - begun].rstrip())
