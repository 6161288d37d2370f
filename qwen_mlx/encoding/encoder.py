"""An encoder: a Qwen2 without its language head, and what makes a vector or scores of its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..backend import mx, nn
from ..errors import QwenMLXError
from ..model.cache import make_caches
from ..model.config import ModelConfig
from ..model.layers import Linear
from ..model.qwen2 import Qwen2Model, rotary_of
from ..text.tokenizer import Tokenizer

POOLINGS = ("last", "mean", "first", "max")
Text = str | Sequence[str] | Sequence[Mapping[str, Any]]
Encode = Callable[[str, "str | None"], list[int]]  # a text, and the second of a pair, to token ids


@dataclass(frozen=True)
class EncoderSettings:
    """The way from hidden states to a vector, as a folder's modules.json says, and to scores, as its config.json does.

    pooling: the position that counts, or what is taken over all. prompts: texts to put before an input, by name.
    pad_token_id: trailing tokens with this id are no part of a text that is scored, as in transformers. scores_tokens:
    the head is for each token, as a process reward model's, and not for a text.
    """

    pooling: str = "last"
    normalize: bool = True
    max_length: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    pad_token_id: int | None = None
    labels: tuple[str, ...] = ()
    scores_tokens: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise QwenMLXError(f"pooling is {self.pooling!r}, expected one of {', '.join(POOLINGS)}.")


class Dense(nn.Module):
    """A projection of pooled vectors, as sentence-transformers' Dense: activation(x W^T + b)."""

    def __init__(self, width: int, size: int, bias: bool, activation: str):
        super().__init__()
        self.linear = Linear(width, size, bias=bias)
        self._activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.linear(x)
        return mx.tanh(y) if self._activation == "tanh" else y


class Encoder(nn.Module):
    """A Qwen2Model, its head and its tokenizer.

    score: layers from hidden states to scores, none for an embedding model. dense: projections of the pooled vector.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: EncoderSettings,
        tokenizer: Tokenizer,
        encode: Encode,
        score: Sequence[nn.Module] = (),
        dense: Sequence[Dense] = (),
    ):
        super().__init__()
        self.config, self.settings, self.tokenizer, self.encode = config, settings, tokenizer, encode
        self.model = Qwen2Model(config, rotary_of(config))
        self.score: Any = list(score) if len(score) != 1 else score[0]
        self.dense = list(dense)

    @property
    def has_scores(self) -> bool:
        """True for a model with a classification or reward head."""
        return not (isinstance(self.score, list) and not self.score)

    def hidden(self, input_ids: mx.array) -> mx.array:
        """Normalised hidden states (B, L, hidden_size) of input_ids (B, L)."""
        return self.model(input_ids, make_caches(self.config.num_hidden_layers, self.config.head_dim))

    def scores(self, hidden: mx.array) -> mx.array:
        """Scores (..., labels) of hidden states (..., hidden_size)."""
        for layer in self.score if isinstance(self.score, list) else [self.score]:
            hidden = layer(hidden)
        return hidden

    def token_ids(self, text: Text) -> list[int]:
        """Ids of a text, of a pair of texts or of a conversation (a list of messages).

        Raises QwenMLXError for something else, an empty input, and one that is longer than the model's context.
        """
        if not isinstance(text, Sequence):
            raise QwenMLXError(f"an input is {text!r}, expected a text, a pair of texts or a list of messages.")
        if isinstance(text, str):
            ids = self.encode(text, None)
        elif len(text) and all(isinstance(message, Mapping) for message in text):
            ids = self.tokenizer.apply_chat_template(list(text), add_generation_prompt=False)  # type: ignore[arg-type]
        elif len(text) == 2 and all(isinstance(part, str) for part in text):
            ids = self.encode(str(text[0]), str(text[1]))
        else:
            raise QwenMLXError(f"an input is {text!r:.80}, expected a text, a pair of texts or a list of messages.")
        ids = ids[: self.settings.max_length] if self.settings.max_length else ids
        if not ids:
            raise QwenMLXError("an input is empty, expected at least one token; leave it out.")
        if len(ids) > self.config.context_length:
            raise QwenMLXError(
                f"an input has {len(ids)} tokens and the model's context {self.config.context_length}; shorten it."
            )
        return ids
