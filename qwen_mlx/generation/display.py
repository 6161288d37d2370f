"""Tokens and how sure the model was of each, as HTML for a notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

from ..text.tokenizer import Tokenizer
from .text import GenerationChunk


class Html:
    """A piece of HTML that a notebook shows."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return f"Html({len(self.text)} characters, for a notebook)"

    def _repr_html_(self) -> str:
        return self.text


def coloured(chunks: Iterable[GenerationChunk], tokenizer: Tokenizer) -> Html:
    """Tokens on a ground from clear (probability 1) to orange (1 in 1,000 or less); the mouse shows the alternatives.

    chunks: of stream_generate(..., logprobs=n). Raises ValueError where one has no log-probability.
    """
    spans = []
    for chunk in chunks:
        if chunk.logprob is None:
            raise ValueError("A chunk has no log-probability; generate with logprobs=3, for example.")
        doubt = min(1.0, -chunk.logprob / math.log(1000))
        others = ", ".join(f"{tokenizer.token_text(i)!r} {math.exp(p):.1%}" for i, p in chunk.top_logprobs)
        title = html.escape(f"{math.exp(chunk.logprob):.1%}; {others}", quote=True)
        text = tokenizer.token_text(chunk.token)
        if "\ufffd" in text:  # a part of a character, which the chunk that completes it has whole
            text = chunk.text or "·"
        ink = "color:black;" if doubt > 0.65 else ""  # white on orange cannot be read
        shown = html.escape(text).replace("\n", "⏎<br>")
        spans.append(f'<span style="{ink}background:rgba(255,140,0,{doubt:.2f})" title="{title}">{shown}</span>')
    return Html(f'<pre style="white-space:pre-wrap">{"".join(spans)}</pre>')
