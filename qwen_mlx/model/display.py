"""How a model and its answers look in a notebook: HTML in which all text is escaped, legible on light and on dark."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..backend import named_arrays
from .layers import matrices

if TYPE_CHECKING:
    from ..generation.text import GenerationChunk
    from ..text.tokenizer import Tokenizer
    from .qwen2 import Qwen2


class Html:
    """A piece of HTML that a notebook shows."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return f"Html({len(self.text)} characters, for a notebook)"

    def _repr_html_(self) -> str:
        return self.text


def summary(model: Qwen2) -> dict[str, str]:
    """What a model is, a line each: architecture, number of parameters, how its matrices are stored, its memory.

    Memory is that of the arrays as they are; shared ones count once.
    """
    config = model.config
    mix: Counter[str] = Counter()
    for module in model.modules():
        if "weight" in module and module["weight"].ndim > 1 and "parts" not in module:
            (matrix,) = matrices(module)
            form = matrix.format
            name = f"{form.bits} bits, group {form.group_size}" if form.kind == "affine" else form.kind.upper()
            mix[str(matrix.arrays[0].dtype).rpartition(".")[2] if form.kind == "dense" else name] += (
                form.rows * form.columns
            )
    arrays = {id(array): array for _, array in named_arrays(model)}
    vectors = sum(array.size for array in arrays.values() if array.ndim == 1)
    total = sum(mix.values())
    return {
        "layers": f"{config.n_layers} of hidden size {config.hidden_size}, {config.intermediate_size} in the MLP",
        "heads": f"{config.n_heads} of {config.head_dim}, {config.n_kv_heads} for keys and values",
        "vocabulary": f"{config.vocab_size}{', the embedding is the head too' if config.tie_word_embeddings else ''}",
        "context": f"{config.context_length} tokens",
        "parameters": f"{(total + vectors) / 1e6:.0f} million",
        "matrices": ", ".join(f"{100 * count / total:.0f} % {name}" for name, count in mix.most_common()),
        "memory": f"{sum(array.nbytes for array in arrays.values()) / 1e9:.2f} GB",
    }


def table(rows: Iterable[tuple[str, str]], title: str) -> str:
    """A small HTML table of names and texts, whose line breaks and blanks stay."""
    left = 'style="text-align:left; vertical-align:top; white-space:pre-wrap"'
    cells = "".join(
        f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(text)}</td></tr>" for name, text in rows
    )
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"


def passage(text: str, note: str) -> str:
    """A text as it is, and a line about it below."""
    return f'<pre style="white-space:pre-wrap">{html.escape(text)}</pre><small>{html.escape(note)}</small>'


def coloured(chunks: Iterable[GenerationChunk], tokenizer: Tokenizer) -> Html:
    """Tokens on a ground from clear (probability 1) to orange (1 in 1,000 or less); the mouse shows the alternatives.

    chunks: of stream_generate(..., logprobs=n). Raises ValueError where one has no log-probability.
    """
    spans = []
    for chunk in chunks:
        if chunk.logprob is None:
            raise ValueError("A chunk has no log-probability; generate with logprobs=3, for example.")
        doubt = min(1.0, -chunk.logprob / math.log(1000))
        others = ", ".join(f"{tokenizer.decode([i])!r} {math.exp(p):.1%}" for i, p in chunk.top_logprobs)
        title = html.escape(f"{math.exp(chunk.logprob):.1%}; {others}", quote=True)
        text = tokenizer.decode([chunk.token], skip_special=False)
        if "\ufffd" in text:  # a part of a character, which the chunk that completes it has whole
            text = chunk.text or "·"
        ink = "color:black;" if doubt > 0.65 else ""  # white on orange cannot be read
        shown = html.escape(text).replace("\n", "⏎<br>")
        spans.append(f'<span style="{ink}background:rgba(255,140,0,{doubt:.2f})" title="{title}">{shown}</span>')
    return Html(f'<pre style="white-space:pre-wrap">{"".join(spans)}</pre>')
