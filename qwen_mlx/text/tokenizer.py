"""Tokenizer of Qwen2 models: byte-level BPE by the `tokenizers` library, conversations, and streaming text.

Control tokens are split off here and not by the library, so that what a user types is text: `<|im_start|>` in a message
cannot open a turn.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GGUFError, QwenMLXError, refuses_wrong_arguments, shortened
from ..gguf.reader import GGUFFile
from . import chat_template
from .chat_template import MARK
from .files import check_folder, read_json
from .limits import check_ids, check_length, check_parts, is_panic, pieces_for
from .messages import Message
from .special_tokens import (
    END_TOKENS,
    FIM_END_TOKENS,
    GGUF_TOKENS,
    chat_templates,
    end_ids,
    meant_as_control,
    named_tokens,
    post_processor,
    tokens_around,
)
from .taint import Taint, plain
from .thoughts import Thoughts, think_marks
from .token_names import name_splitter, normalized_splitter, split_in_turn
from .vocabulary import SPACE, byte_level, byte_level_bytes, sentencepiece, sentencepiece_bytes, tokenizer_json

SPLIT_NAMES = ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2")  # tokenizer.ggml.pre of the files with Qwen2's rule
OLD_SPLIT_NAMES = (None, "", "default", "gpt-2")  # of files from before there was a name for it
# Arguments of transformers' apply_chat_template that a template would ignore.
NOT_VARIABLES = (
    *("continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding"),
    *("truncation", "max_length", "tokenizer_kwargs", "processor_kwargs"),
)
# An added token takes white space beside it, is a word of its own, or is found in the normalized text.
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
IDEMPOTENT = (None, "NFC", "NFD", "NFKC", "NFKD")  # normalizers that change no text twice
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type; the rest is padding


class Tokenizer:
    """Text to token ids and back.

    names: every token's name by id, "" for ids that only pad. special: name -> id of every token that is not ordinary
    text. eos_token_ids: the tokens that end a generation. prefix_ids, suffix_ids: what stands around a text that is no
    conversation, if the file asks for it. special_tokens: the names of tokens with a role, such as {"bos_token": ...},
    for the chat template. chat_templates: by name, the main one "default". flags: by a special token's name, those of
    FLAGS that it has.
    """

    def __init__(
        self,
        bpe: Any,
        names: Sequence[str],
        special: Mapping[str, int],
        control: Iterable[str],
        eos_token_ids: Iterable[int],
        chat_templates: Mapping[str, str],
        *,
        special_tokens: Mapping[str, str] | None = None,
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
        is_sentencepiece: bool = False,
        flags: Mapping[str, Collection[str]] | None = None,
    ):
        self._bpe = bpe
        self.names = names
        self.special = dict(special)
        self._special_ids = frozenset(self.special.values())
        self._control = tuple(control)
        self._control_ids = frozenset(self.special[name] for name in self._control)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.prefix_ids, self.suffix_ids = tuple(prefix_ids), tuple(suffix_ids)
        self.chat_templates = dict(chat_templates)
        if odd := next((name for name in self.chat_templates if not re.fullmatch(r"[\w-]+", name)), None):
            raise QwenMLXError(f"A chat template's name is {odd!r}, expected letters, digits, - and _.")
        self.special_tokens = dict(special_tokens or {})
        self.think_marks = think_marks(self.special, self.chat_templates.values())
        # A mark of a thought is shown, whether or not its file calls it a control token.
        self._hidden_ids = self._control_ids - {self.special.get(mark) for mark in self.think_marks or ()}
        self.is_sentencepiece = is_sentencepiece
        # SentencePiece puts a space before a text, which is not the text's.
        self._drops_space = is_sentencepiece and b'"Strip"' in ((bpe.decoder and bpe.decoder.__getstate__()) or b"")
        self._bytes_of_name = sentencepiece_bytes if is_sentencepiece else byte_level_bytes
        self._taint = Taint(self._control)
        self._flags = {name: flags for name, flags in (flags or {}).items() if flags and name in self.special}
        self._split = self._splitter(self.special)

    @functools.cached_property
    def _split_control(self) -> Callable[[str], list[str]]:
        return name_splitter(self._control)

    @functools.cached_property
    def _split_others(self) -> Callable[[str], list[str]]:
        return self._splitter(self.special.keys() - set(self._control))

    def _splitter(self, names: Iterable[str]) -> Callable[[str], list[str]]:
        """A function that cuts a text at these names; those with the flag `normalized` are searched for last."""
        names, normalizer = set(names), self._bpe.normalizer
        normalized = {name for name in names if "normalized" in self._flags.get(name, ())} if normalizer else set()
        split = name_splitter(names - normalized)
        return split_in_turn(split, normalized_splitter(normalized, normalizer.normalize_str)) if normalized else split

    @property
    def chat_template(self) -> str | None:
        """The main chat template, if there is one."""
        return self.chat_templates.get("default")

    @property
    def vocab_size(self) -> int:
        """The number of ids that have a token; a model's matrices may have more rows."""
        return len(self.names)

    @classmethod
    @refuses_wrong_arguments
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From a GGUF's `tokenizer.*` metadata. Raises GGUFError naming the field that is missing or wrong."""

        def get(key: str, kind: type, items: type | tuple[type, ...] = object) -> Any:
            value = metadata.get(f"tokenizer.{key}")
            if value is None:
                raise GGUFError(f"metadata field 'tokenizer.{key}' is missing; convert the model again.")
            entries = value if isinstance(value, list) else []
            if not isinstance(value, kind) or not all(isinstance(item, items) for item in entries):
                of = f" of {items.__name__}" if isinstance(items, type) and items is not object else ""
                raise GGUFError(
                    f"metadata field 'tokenizer.{key}' is not a {kind.__name__}{of}; convert the model again."
                )
            return value

        kind = get("ggml.model", str)
        pre = metadata.get("tokenizer.ggml.pre")
        known = pre in SPLIT_NAMES or pre in OLD_SPLIT_NAMES
        if kind not in ("gpt2", "llama") or (kind == "gpt2" and not known):
            raise GGUFError(
                f"the tokenizer is {kind!r} with the split rule {pre!r}, expected 'gpt2' with one of "
                f"{', '.join(SPLIT_NAMES)}, or 'llama'; convert the model again with a newer llama.cpp."
            )
        if kind == "gpt2" and pre not in SPLIT_NAMES:
            warnings.warn(
                f"The file's 'tokenizer.ggml.pre' is {pre!r}, as in old conversions; Qwen2's split rule is used.",
                stacklevel=3,
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

        if CONTROL not in kinds and (control := meant_as_control(names)):
            some = ", ".join(sorted(control)[:3])
            warnings.warn(
                f"The file's 'tokenizer.ggml.token_type' marks no control tokens; {len(control)} are taken for such by "
                f"their names: {some}{', ...' if len(control) > 3 else ''}.",
                stacklevel=3,
            )
            kinds = [CONTROL if name in control else kind for name, kind in zip(names, kinds)]
        special = {name: i for i, name in enumerate(names) if name and kinds[i] in (CONTROL, USER_DEFINED)}
        eos = {i for i in map(token, ("eos", "eot", "eom")) if i is not None}
        eos |= end_ids(special, {kind: token(kind) for kind in FIM_END_TOKENS})
        listed = metadata.get("tokenizer.ggml.eos_token_ids") or []
        if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < len(names) for i in listed):
            raise GGUFError(
                f"metadata field 'tokenizer.ggml.eos_token_ids' is {listed!r:.80}, expected ids below {len(names)}."
            )
        eos |= set(listed)
        if not eos:
            raise GGUFError("metadata field 'tokenizer.ggml.eos_token_id' is missing; convert the model again.")
        ordinary = (NORMAL, UNKNOWN, BYTE) if kind == "llama" else (NORMAL,)
        ids = {name: i for i, name in enumerate(names) if kinds[i] in ordinary}
        if kind == "llama":
            scores = get("ggml.scores", list, (int, float))
            if len(scores) != len(names):
                raise GGUFError(
                    f"'tokenizer.ggml.scores' has {len(scores)} entries, expected {len(names)}, one a token."
                )
            unknown = next((name for i, name in enumerate(names) if kinds[i] == UNKNOWN), None)
            bpe = sentencepiece(ids, scores, unknown, metadata.get("tokenizer.ggml.add_space_prefix", True) is True)
        else:
            bpe = byte_level(ids, get("ggml.merges", list, str))
        # An id of no token, as old conversions have it for what a model lacks, names none.
        named = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in GGUF_TOKENS.items()}
        around = [
            [i] if metadata.get(f"tokenizer.ggml.add_{key}_token", default) and (i := token(key)) is not None else []
            for key, default in (("bos", kind == "llama"), ("eos", False))
        ]
        own = {key.rpartition(".")[2]: key for key in metadata if key.startswith("tokenizer.chat_template.")}
        own |= {"default": "tokenizer.chat_template"} if metadata.get("tokenizer.chat_template") is not None else {}
        return cls(
            bpe,
            [name if kind in (*ordinary, CONTROL, USER_DEFINED) else "" for name, kind in zip(names, kinds)],
            special,
            [name for name, i in special.items() if kinds[i] == CONTROL],
            eos,
            {name: get(key.removeprefix("tokenizer."), str) for name, key in own.items()},
            special_tokens={n: names[i] for n, i in named.items() if isinstance(i, int) and 0 <= i < len(names)},
            prefix_ids=around[0],
            suffix_ids=around[1],
            is_sentencepiece=kind == "llama",
        )

    @classmethod
    @refuses_wrong_arguments
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From tokenizer.json (or vocab.json and merges.txt), tokenizer_config.json, special_tokens_map.json, the chat
        templates' files and generation_config.json, as transformers writes them. Raises QwenMLXError naming the file
        that is missing or wrong.
        """
        from tokenizers import Tokenizer as Library

        settings, generation, config = (
            read_json(folder / name) if (folder / name).exists() else {}
            for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        )
        path, data = folder / "tokenizer.json", tokenizer_json(folder)
        try:
            added = data["added_tokens"]
            special = {token["content"]: token["id"] for token in added if token["content"]}
            control = [token["content"] for token in added if token["special"]]
            # Settings of a training run that some folders carry: obeyed, they would cut or pad every prompt.
            check_parts(data)
            bpe = Library.from_str(json.dumps(data | {"added_tokens": [], "truncation": None, "padding": None}))
            ids = data["model"]["vocab"] | special
            check_ids(ids)
            flags = {token["content"]: {flag for flag in FLAGS if token.get(flag)} for token in added}
            normalized = [name for name in flags if "normalized" in flags[name]]
            if normalized and (data.get("normalizer") or {}).get("type") not in IDEMPOTENT:
                some = ", ".join(normalized[:3]) + ", ..." * (len(normalized) > 3)
                warnings.warn(f"{path}: {some} are read before the text is normalized.", stacklevel=3)
                flags = {name: flags[name] - {"normalized"} for name in flags}
            names = [""] * (1 + max(ids.values()))
            for name, i in ids.items():
                names[i] = name
            named = named_tokens(folder, settings)
            before, after = tokens_around(data, settings, named, special)
            if not all(type(i) is int and 0 <= i < len(names) for i in (*before, *after)):
                raise ValueError(f"its post-processor adds {before + after}")
        except QwenMLXError:
            raise
        except BaseException as error:  # the library raises bare Exception for a file that is not a tokenizer
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise QwenMLXError(
                f"{path}: not a byte-level BPE tokenizer ({shortened(repr(error))}); save it again."
            ) from None

        eos = end_ids(special) | {special[name] for name in (named.get("eos_token"),) if name in special}
        for file, own in (("generation_config.json", generation), ("config.json", config)):
            value = own.get("eos_token_id")
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and 0 <= i < len(names) for i in values):
                raise QwenMLXError(f"{folder / file}: eos_token_id is {value!r:.80}, expected ids below {len(names)}.")
            eos |= set(values)
        if not eos:
            raise QwenMLXError(
                f"{folder}: no end token in generation_config.json, config.json or tokenizer_config.json."
            )
        return cls(
            bpe,
            names,
            special,
            control,
            eos,
            chat_templates(folder, settings),
            special_tokens=named,
            prefix_ids=before,
            suffix_ids=after,
            is_sentencepiece=bool(data["model"].get("byte_fallback")) or _writes_spaces(data.get("decoder")),
            flags=flags,
        )

    @classmethod
    @refuses_wrong_arguments
    def read(cls, path: Path) -> Tokenizer:
        """From a GGUF file or a folder, without its weights."""
        return cls.from_folder(path) if path.is_dir() else cls.from_gguf(GGUFFile(path).metadata)

    @refuses_wrong_arguments
    def check_fits(self, vocab_size: int, path: Path) -> None:
        """Raises QwenMLXError if there are tokens for which a model of `vocab_size` has no embedding."""
        if self.vocab_size > vocab_size:
            raise QwenMLXError(
                f"{path}: has {self.vocab_size} tokens, but embeddings for {vocab_size}; they are not of one model."
            )

    @refuses_wrong_arguments
    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text` (NFC-normalised). The names of control and added tokens are ordinary text, unless
        `allow_special`, which is transformers' behaviour. Raises QwenMLXError for a lone surrogate.
        """
        if not isinstance(text, str):
            raise QwenMLXError(f"The text is {type(text).__name__}, expected a string.")
        return self._encode_special(text) if allow_special else self._encode_plain(text)

    def __call__(self, text: str) -> dict[str, list[int]]:
        """{"input_ids": ..., "attention_mask": ...} of a text, as transformers' tokenizers give it: with what the
        model's file puts before a text, and control tokens by their names. Raises QwenMLXError as encode."""
        ids = self.with_prefix(self.encode(text, allow_special=True))
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def __repr__(self) -> str:
        ends = ", ".join(repr(self.names[i]) for i in sorted(self.eos_token_ids) if i < len(self.names))
        template = "a chat template" if self.chat_templates else "no chat template"
        return f"Tokenizer({self.vocab_size} tokens; a text ends at {ends}; {template})"

    def _encode_special(self, text: str, marked: bool = False) -> list[int]:
        """Token ids of `text`, its control and added tokens by name; of a `marked` one without those control tokens of
        which a user wrote a part."""
        ids: list[int] = []
        pieces = self._marked_pieces(text) if marked else self._pieces(text)
        for i, piece in enumerate(self._with_flags(pieces) if self._flags else pieces):
            if i % 2:
                ids.append(self.special[piece])
            elif piece:
                ids += self._encode_plain(piece)
        return ids

    def _pieces(self, text: str) -> list[str]:
        """The text cut at the names of special tokens: every second piece is one."""
        _check_characters(text)
        return self._split(text)

    def _marked_pieces(self, text: str) -> list[str]:
        """_pieces() of a marked text: added tokens that are no control tokens count whoever wrote them."""
        pieces: list[str] = []
        for i, piece in enumerate(self._split_control(text)):
            pieces += [piece] if i % 2 else self._split_others(plain(piece))
        return pieces

    def _with_flags(self, pieces: list[str]) -> list[str]:
        """The pieces as the flags of the tokens among them mean: white space beside a token is the token's, and one
        that is no word of its own is text."""
        result = [pieces[0]]
        for name, text in zip(pieces[1::2], pieces[2::2]):
            flags, before = self._flags.get(name, ()), result[-1]
            beside = (before or "".join(result[-2:-1]))[-1:] + text[:1]
            if "single_word" in flags and any(map(_is_word, beside)):
                result[-1] += name + text
                continue
            result[-1] = before.rstrip() if "lstrip" in flags else before
            result += [name, text.lstrip() if "rstrip" in flags else text]
        return result

    def _encode_plain(self, text: str) -> list[int]:
        _check_characters(text)
        ids: list[int] = []
        for piece in pieces_for(self._bpe, text):
            try:
                ids += self._bpe.encode(piece, add_special_tokens=False).ids
            except BaseException as error:
                if not is_panic(error):
                    raise
                raise QwenMLXError(f"The tokenizer cannot read the text ({shortened(str(error))}).") from None
        return ids

    @refuses_wrong_arguments
    def check_length(self, text: str, context_length: int) -> None:
        """Raises QwenMLXError for a text that cannot fit into so many tokens, without reading it."""
        check_length(text, iter(self.names), context_length)

    @refuses_wrong_arguments
    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; control tokens are left out unless skip_special is False. Bytes that are not UTF-8 become
        U+FFFD, ids beyond the vocabulary (padding rows of the embedding) nothing. The space that SentencePiece puts
        before a text is left out; a detokenizer, whose text goes on, keeps it. Raises QwenMLXError if negative.
        """
        try:
            text = b"".join(self._bytes(i, skip_special) for i in ids).decode("utf-8", "replace")
            return text.removeprefix(" ") if self._drops_space else text
        except TypeError:
            raise QwenMLXError(f"Token ids are {shortened(repr(ids), 80)}, expected a list of integers.") from None

    @refuses_wrong_arguments
    def token_bytes(self, i: int) -> bytes:
        """The bytes that a token stands for: of one that is not ordinary text, its name."""
        return self._bytes(i, skip_special=False)

    @refuses_wrong_arguments
    def token_text(self, i: int) -> str:
        """token_bytes as text; U+FFFD for bytes that are no character."""
        return self.token_bytes(i).decode("utf-8", "replace")

    def _bytes(self, i: int, skip_special: bool) -> bytes:
        if i < 0:
            raise QwenMLXError(f"Token id {i} is negative, expected 0 to {len(self.names) - 1}.")
        if i >= len(self.names) or (skip_special and i in self._hidden_ids):
            return b""  # the embedding has rows beyond the vocabulary, as padding
        name = self.names[i]
        return name.encode() if i in self._special_ids else self._bytes_of_name(name)

    @refuses_wrong_arguments
    def with_prefix(self, ids: list[int]) -> list[int]:
        """`ids` after prefix_ids, which are put before them once."""
        n = len(self.prefix_ids)
        return ids if tuple(ids[:n]) == self.prefix_ids else [*self.prefix_ids, *ids]

    def detokenizer(self, skip_special: bool = True) -> StreamingDetokenizer:
        """A new StreamingDetokenizer, which leaves control tokens out unless skip_special is False."""
        return StreamingDetokenizer(self, skip_special)

    def thoughts(self, prompt: Sequence[int]) -> Thoughts | None:
        """The reader that tells thoughts from the answer in the text after `prompt`, whose end may open a thought;
        None if the model does not think."""
        if self.think_marks is None:
            return None
        end = self.decode(prompt[-32:], skip_special=False).rstrip()
        return Thoughts(self.think_marks, opened=end.endswith(self.think_marks[0]))

    @refuses_wrong_arguments
    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the model's chat template writes it. variables: the template's own, and transformers'
        `chat_template`, a template or the name of one of the model's. Raises QwenMLXError if there is no template, or
        it refuses the messages.
        """
        source = self._template(tools, variables)
        variables = chat_template.variables_of(tools, add_generation_prompt=add_generation_prompt, **variables)
        return chat_template.render(source, messages, **{**self.special_tokens, **variables})

    def _template(self, tools: Any, variables: dict[str, Any]) -> str:
        """The chat template for a conversation: the one that `variables` ask for, which is taken out of them, else with
        tools the one that is named for them. Raises QwenMLXError if there is none, and for what transformers takes
        beside it and is not done here."""
        other = next((name for name in NOT_VARIABLES if variables.pop(name, None) not in (None, False)), None)
        if other is not None:
            raise QwenMLXError(f"{other} is given, which transformers' apply_chat_template takes; leave it out here.")
        asked = variables.pop("chat_template", None)
        if asked is not None:
            if not isinstance(asked, str):
                raise QwenMLXError(
                    f"chat_template is {type(asked).__name__}, expected a template or a template's name."
                )
            return self.chat_templates.get(asked, asked)
        template = self.chat_templates.get("tool_use" if tools is not None else "default") or self.chat_template
        if template:
            return template
        if self.chat_templates:
            raise QwenMLXError(f"None of the model's chat templates, {', '.join(self.chat_templates)}, is its default.")
        raise QwenMLXError("The model has no chat template; give the prompt as it is (--raw, or raw=True).")

    @refuses_wrong_arguments
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of render_chat's text; a control token's name inside a message or a tool stays text.

        A message may have "ids", the tokens that its content was generated as. They are kept, so that a prompt cache
        that holds them is of use, unless the template changes a content (as DeepSeek-R1's drops thoughts). variables:
        as render_chat's.
        """
        if not variables.pop("tokenize", True):
            raise QwenMLXError(
                "apply_chat_template gives token ids; render_chat gives the text, and generate takes the messages."
            )
        source = self._template(tools, variables)
        variables = chat_template.variables_of(tools, add_generation_prompt=add_generation_prompt, **variables)
        form = chat_template.normalized_for(source, messages, **{**self.special_tokens, **variables})
        text = self._traced(source, form, variables)
        pieces = [text]
        fence = MARK * (1 + max(map(len, re.findall(f"{MARK}+", text)), default=0))  # longer than any of users'
        generated = {f"{fence}{i}{fence}": i for i, message in enumerate(form) if "ids" in message}
        if generated:
            marked = list(form)
            for mark, i in generated.items():
                marked[i] = {**form[i], "content": mark}
            split = re.split(f"({fence}\\d+{fence})", self._traced(source, marked, variables))
            contents: dict[str, str] = {piece: self._taint.mark(form[i]["content"]) for piece, i in generated.items()}
            if "".join(contents.get(piece, piece) for piece in split) == text:
                pieces = split
        ids: list[int] = []
        for piece in pieces:
            ids += form[generated[piece]]["ids"] if piece in generated else self._encode_special(piece, marked=True)
        return ids

    def _traced(self, source: str, messages: list[Message], variables: Mapping[str, Any]) -> str:
        return chat_template.render_traced(source, messages, variables, self.special_tokens, self._taint)

    @property
    def control(self) -> tuple[str, ...]:
        """The names of the control tokens; the other tokens of `special` are shown as text."""
        return self._control

    def library_json(self) -> dict[str, Any]:
        """tokenizer.json's object, without added tokens."""
        data: dict[str, Any] = json.loads(self._bpe.to_str())
        return data

    @refuses_wrong_arguments
    def save(self, folder: Path) -> None:
        """Writes the files of a tokenizer into a folder, as transformers and mlx-lm read them.

        Raises QwenMLXError where there is none.
        """
        check_folder(Path(folder) / "tokenizer.json", "the tokenizer's")
        data = self.library_json()
        data["added_tokens"] = [
            {"id": i, "content": name, "special": i in self._control_ids}
            | {flag: flag in self._flags.get(name, ()) for flag in FLAGS}
            for name, i in self.special.items()
        ]
        if self.prefix_ids or self.suffix_ids:
            around = [{self.names[i]: i for i in ids} for ids in (self.prefix_ids, self.suffix_ids)]
            data["post_processor"] = post_processor(*around)
        (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        eos = [name for name in END_TOKENS if self.special.get(name) in self.eos_token_ids]
        eos += [self.names[i] for i in sorted(self.eos_token_ids) if self.names[i] not in eos]
        settings: dict[str, Any] = {
            # The class of Qwen2 has a split rule of its own.
            "tokenizer_class": "PreTrainedTokenizerFast" if self.is_sentencepiece else "Qwen2Tokenizer",
            "add_bos_token": bool(self.prefix_ids),
            "add_eos_token": bool(self.suffix_ids),
            "bos_token": None,
            "eos_token": eos[0],
            "pad_token": eos[1] if len(eos) > 1 else eos[0],
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        if self.chat_templates:
            texts = [{"name": name, "template": text} for name, text in self.chat_templates.items()]
            settings["chat_template"] = texts if len(texts) > 1 else texts[0]["template"]
        self.save_chat_templates(folder)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    @refuses_wrong_arguments
    def save_chat_templates(self, folder: Path) -> None:
        """Writes chat_template.jinja and additional_chat_templates/NAME.jinja."""
        for name, text in self.chat_templates.items():
            path = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")


class StreamingDetokenizer:
    """Turns ids into text as they come: `add` returns what is complete, `finish` the rest. Constant work per token."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that `token` completes, perhaps none: never half a character."""
        return self._decoder.decode(self._tokenizer._bytes(token, self._skip_special))

    def finish(self) -> str:
        """Returns what is left: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def _is_word(character: str) -> bool:
    """True for a character of words as the `tokenizers` library's regular expressions have them: Unicode's annex C of
    UTS 18, with marks and without superscripts, unlike Python's."""
    kind = unicodedata.category(character)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or character in "\u200c\u200d"


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QwenMLXError(f"The text holds a lone surrogate at {error.start}, which is not a character.") from None


def _writes_spaces(decoder: Any) -> bool:
    """True for a tokenizer.json's decoder that makes spaces of SentencePiece's letter for them."""
    return SPACE in json.dumps(decoder, ensure_ascii=False)


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
