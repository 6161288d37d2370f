"""A model and its texts in a notebook: HTML in which all text is escaped, legible on light and on dark."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable

from ..backend import named_arrays, nn
from .config import ModelConfig
from .layers import matrix_of


def summary(model: nn.Module, config: ModelConfig) -> dict[str, str]:
    """Architecture, number of parameters, packing of the matrices and memory of a model, a line each.

    Memory is that of the arrays as they are; shared ones count once.
    """
    packings: Counter[str] = Counter()
    for module in model.modules():
        if "weight" in module and module["weight"].ndim > 1:
            matrix = matrix_of(module)
            dense = matrix.packing.kind == "dense"
            name = str(matrix.arrays[0].dtype).rpartition(".")[2] if dense else str(matrix.packing)
            packings[name] += matrix.rows * matrix.columns
    arrays = {id(array): array for _, array in named_arrays(model)}
    vectors = sum(array.size for array in arrays.values() if array.ndim == 1)
    total = sum(packings.values())
    head = "the embedding is the head too" if config.tie_word_embeddings else "the head is a matrix of its own"
    return {
        "layers": f"{config.num_hidden_layers} of hidden size {config.hidden_size}, MLP {config.intermediate_size}",
        "heads": f"{config.num_attention_heads} of {config.head_dim}, {config.num_key_value_heads} for keys and values",
        "vocabulary": f"{config.vocab_size}, {head}",
        "context": f"{config.context_length} tokens",
        "parameters": f"{(total + vectors) / 1e6:.0f} million",
        "matrices": ", ".join(f"{100 * count / total:.0f} % {name}" for name, count in packings.most_common()),
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
