"""Tokenizer of Qwen2 models: byte-level BPE by the `tokenizers` library, conversations, and streaming text.

Control tokens are split off here and not by the library, so that what a user types is text: `<|im_start|>` in a message
cannot open a turn.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GGUFError, QwenMLXError
from ..gguf.reader import GGUFFile
from . import chat_template
from .chat_template import GUARD, MARK, guarded
from .files import read_json, read_text

# Qwen2's rule (transformers' Qwen2Converter): contractions in any case, digits one by one, newlines with punctuation.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT_NAMES = ("qwen2", "deepseek-r1-qwen")  # tokenizer.ggml.pre of the files that use it
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type; the rest pads the vocabulary
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


class Tokenizer:
    """Text to token ids and back.

    names: every token's name by id, "" for ids that only pad. special: name -> id of every token that is not ordinary
    text. eos_token_ids: the tokens that end a generation. bos_token_id: put before raw text if the file asks for it.
    """

    def __init__(
        self,
        bpe: Any,
        names: Sequence[str],
        special: Mapping[str, int],
        control: Iterable[str],
        eos_token_ids: Iterable[int],
        chat_template: str | None,
        bos_token_id: int | None = None,
    ):
        self._bpe = bpe
        self.names = names
        self.special = dict(special)
        self._special_ids = frozenset(self.special.values())
        self._control_ids = frozenset(self.special[name] for name in control)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.chat_template = chat_template
        # A user's text is guarded where a control token could begin: at its first two characters.
        self._starts = {name[:2] for name in control}
        longest_first = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        self._split = re.compile(f"((?:{longest_first})(?!{GUARD}))" if longest_first else "(?!)")

    @property
    def vocab_size(self) -> int:
        """The number of ids that have a token; a model's matrices may have more rows."""
        return len(self.names)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From a GGUF's `tokenizer.*` metadata. Raises GGUFError naming the field that is missing or wrong."""

        def get(key: str, kind: type, items: type = object) -> Any:
            value = metadata.get(f"tokenizer.{key}")
            if value is None:
                raise GGUFError(f"metadata field 'tokenizer.{key}' is missing; convert the model again.")
            entries = value if isinstance(value, list) else []
            if not isinstance(value, kind) or not all(isinstance(item, items) for item in entries):
                of = "" if items is object else f" of {items.__name__}"
                raise GGUFError(
                    f"metadata field 'tokenizer.{key}' is not a {kind.__name__}{of}; convert the model again."
                )
            return value

        if get("ggml.model", str) != "gpt2" or get("ggml.pre", str) not in SPLIT_NAMES:
            raise GGUFError(
                f"the tokenizer is {metadata['tokenizer.ggml.model']!r} with the split rule "
                f"{metadata.get('tokenizer.ggml.pre')!r}, expected 'gpt2' with one of {', '.join(SPLIT_NAMES)}."
            )
        names, kinds = get("ggml.tokens", list, str), get("ggml.token_type", list, int)
        if len(kinds) != len(names):
            raise GGUFError(
                f"'tokenizer.ggml.token_type' has {len(kinds)} entries, expected {len(names)}, one a token."
            )

        def token(key: str) -> int | None:
            i = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if i is not None and (type(i) is not int or not 0 <= i < len(names)):
                raise GGUFError(
                    f"metadata field 'tokenizer.ggml.{key}_token_id' is {i!r}, expected 0 to {len(names) - 1}."
                )
            return i

        eos = {i for i in (token("eos"), token("eot")) if i is not None}
        if not eos:
            raise GGUFError("metadata field 'tokenizer.ggml.eos_token_id' is missing; convert the model again.")
        ids = {name: i for i, name in enumerate(names) if kinds[i] == NORMAL}
        special = {name: i for i, name in enumerate(names) if name and kinds[i] in (CONTROL, USER_DEFINED)}
        return cls(
            _bpe(ids, get("ggml.merges", list, str)),
            [name if kind in (NORMAL, CONTROL, USER_DEFINED) else "" for name, kind in zip(names, kinds)],
            special,
            [name for name, i in special.items() if kinds[i] == CONTROL],
            eos | {special[name] for name in END_TOKENS if name in special},
            None if metadata.get("tokenizer.chat_template") is None else get("chat_template", str),
            token("bos") if metadata.get("tokenizer.ggml.add_bos_token") else None,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json, as transformers
        writes them. Raises QwenMLXError naming the file that is missing or wrong.
        """
        from tokenizers import Tokenizer as Library

        path = folder / "tokenizer.json"
        if not path.exists():
            raise QwenMLXError(
                f"{folder}: tokenizer.json is missing; save the tokenizer with transformers' fast tokenizer."
            )
        data = read_json(path)
        settings, generation, config = (
            read_json(folder / name) if (folder / name).exists() else {}
            for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        )
        try:
            added = data.pop("added_tokens") or []
            special = {token["content"]: token["id"] for token in added if token["content"]}
            control = [token["content"] for token in added if token["special"]]
            # Settings of a training run that some folders carry: obeyed, they would cut or pad every prompt.
            bpe = Library.from_str(json.dumps(data | {"added_tokens": [], "truncation": None, "padding": None}))
            ids = data["model"]["vocab"] | special
            names = [""] * (1 + max(ids.values()))
            for name, i in ids.items():
                names[i] = name
        except Exception as error:  # the library raises bare Exception for a file that is not a tokenizer
            raise QwenMLXError(f"{path}: not a byte-level BPE tokenizer ({error!r}); save it again.") from None

        def named(key: str) -> str | None:
            value = settings.get(key)
            return value.get("content") if isinstance(value, dict) else value

        eos = {special[name] for name in (*END_TOKENS, named("eos_token")) if name in special}
        for value in (generation.get("eos_token_id"), config.get("eos_token_id")):
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and 0 <= i < len(names) for i in values):
                raise QwenMLXError(f"{folder}: eos_token_id is {value!r}, expected ids below {len(names)}.")
            eos |= set(values)
        if not eos:
            raise QwenMLXError(
                f"{folder}: no end token in generation_config.json, config.json or tokenizer_config.json."
            )
        template = settings.get("chat_template")
        if (folder / "chat_template.jinja").exists():
            template = read_text(str(folder / "chat_template.jinja"))
        elif isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        bos = special.get(named("bos_token") or "") if settings.get("add_bos_token") else None
        return cls(bpe, names, special, control, eos, template, bos)

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """From a GGUF file or a folder, without its weights."""
        return cls.from_folder(path) if path.is_dir() else cls.from_gguf(GGUFFile(path).metadata)

    def check_fits(self, vocab_size: int, path: Path) -> None:
        """Raises QwenMLXError if there are tokens for which a model of `vocab_size` has no embedding."""
        if self.vocab_size > vocab_size:
            raise QwenMLXError(
                f"{path}: has {self.vocab_size} tokens, but embeddings for {vocab_size}; they are not of one model."
            )

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text` (NFC-normalised). The names of control and added tokens are ordinary text, unless
        `allow_special`, which is transformers' behaviour. Raises QwenMLXError for a lone surrogate.
        """
        return self._encode_special(text) if allow_special else self._encode_plain(text)

    def _encode_special(self, text: str, left_out: str = "") -> list[int]:
        """Token ids of `text`, its control and added tokens by name; `left_out` is removed from what lies between."""
        ids: list[int] = []
        for piece in self._split.split(text):
            if piece in self.special:
                ids.append(self.special[piece])
            elif piece:
                ids += self._encode_plain(piece.replace(left_out, ""))
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise QwenMLXError(f"The text holds a lone surrogate at {error.start}, which is not a character.") from None
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; control tokens are left out unless skip_special is False. Bytes that are not UTF-8 become
        U+FFFD, ids beyond the vocabulary (padding rows of the embedding) nothing. Raises QwenMLXError if negative.
        """
        return b"".join(self._bytes(i, skip_special) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, i: int) -> bytes:
        """The bytes that a token stands for: of one that is not ordinary text, its name."""
        return self._bytes(i, skip_special=False)

    def _bytes(self, i: int, skip_special: bool) -> bytes:
        if i < 0:
            raise QwenMLXError(f"Token id {i} is negative, expected 0 to {len(self.names) - 1}.")
        if i >= len(self.names) or (skip_special and i in self._control_ids):
            return b""  # the embedding has rows beyond the vocabulary, as padding
        name, table = self.names[i], _byte_of_letter()
        if i in self._special_ids or not table.keys() >= set(name):
            return name.encode()  # a token that is not in the byte alphabet stands for itself
        return bytes(table[letter] for letter in name)

    def detokenizer(self) -> StreamingDetokenizer:
        """A new StreamingDetokenizer."""
        return StreamingDetokenizer(self)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the model's chat template writes it. Raises QwenMLXError if there is no template, or it
        refuses the messages.
        """
        if not self.chat_template:
            raise QwenMLXError("The model has no chat template; give the prompt as it is (--raw, or raw=True).")
        if self.bos_token_id is not None:
            variables = {"bos_token": self.names[self.bos_token_id]} | variables
        return chat_template.render(
            self.chat_template, messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of render_chat's text; a control token's name inside a message or a tool stays text.

        A message may have "ids", the tokens that its content was generated as. They are kept, so that a prompt cache
        that holds them is of use, unless the template changes a content (as DeepSeek-R1's drops thoughts).
        """
        safe, tools, variables = (guarded(value, self._starts) for value in (messages, tools, variables))
        text = self.render_chat(safe, tools, add_generation_prompt, **variables)
        pieces = [text]
        generated = {f"{MARK}{i}{MARK}": i for i, message in enumerate(messages) if message.get("ids") is not None}
        if generated:
            marked = list(safe)
            for mark, i in generated.items():
                marked[i] = {**safe[i], "content": mark}
            marked_text = self.render_chat(marked, tools, add_generation_prompt, **variables)
            split = re.split(f"({MARK}\\d+{MARK})", marked_text)
            if "".join(safe[generated[piece]]["content"] if piece in generated else piece for piece in split) == text:
                pieces = split
        ids: list[int] = []
        for piece in pieces:
            if piece in generated:
                ids += messages[generated[piece]]["ids"]
            else:
                ids += self._encode_special(piece, left_out=GUARD)
        return ids

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja for transformers and mlx-lm."""
        data = json.loads(self._bpe.to_str())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        data["added_tokens"] = [
            {"id": i, "content": name, **flags, "special": i in self._control_ids} for name, i in self.special.items()
        ]
        (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        eos = [name for name in END_TOKENS if self.special.get(name) in self.eos_token_ids]
        eos += [self.names[i] for i in sorted(self.eos_token_ids) if self.names[i] not in eos]
        settings = {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": self.bos_token_id is not None,
            "bos_token": None if self.bos_token_id is None else self.names[self.bos_token_id],
            "eos_token": eos[0],
            "pad_token": eos[-1],
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template:
            settings["chat_template"] = self.chat_template
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


class StreamingDetokenizer:
    """Turns ids into text as they come: `add` returns what is complete, `finish` the rest. Constant work per token."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that `token` completes, perhaps none: never half a character."""
        return self._decoder.decode(self._tokenizer._bytes(token, skip_special=True))

    def finish(self) -> str:
        """Returns what is left: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def check_vocabulary(model: Sequence[str], other: Sequence[str], name: str, what: str = "draft") -> None:
    """Raises QwenMLXError, naming the other, unless both have the same tokens; padding at the end does not count."""
    differ = (i for i, (ours, theirs) in enumerate(zip(model, other)) if ours != theirs)
    same = next(differ, min(len(model), len(other)))
    if any(model[same:]) or any(other[same:]):
        ours, theirs = (repr(names[same]) if same < len(names) else "none" for names in (model, other))
        raise QwenMLXError(
            f"{name} has another vocabulary than the model: its token {same} is {theirs}, expected {ours}; take a "
            f"{what} of the same family, such as a smaller Qwen2.5."
        )


def _bpe(ids: dict[str, int], merges: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    for merge, (first, second) in zip(merges, pairs):
        # The library panics, which no `except Exception` sees, for a result that is not a token.
        if not second or " " in second or first + second not in ids:
            raise GGUFError(
                f"'tokenizer.ggml.merges' holds {merge!r}, which makes no token of the vocabulary; "
                "convert the model again."
            )
    try:
        library = Tokenizer(models.BPE(ids, pairs))
    except Exception as error:  # the library raises bare Exception
        raise GGUFError(
            f"'tokenizer.ggml.merges' does not fit the tokens ({error}); convert the model again."
        ) from None
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    return library


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """GPT-2's printable letter for each byte: itself where printable, else the next free one from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
