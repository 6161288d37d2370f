"""Special tokens by what they mean: those that end a text, those that stand around a text, and those with a name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import QwenMLXError
from .files import read_json, read_text

# Names of tokens that end a text in any model (llama.cpp's list of end-of-generation tokens, llama-vocab.cpp). The
# first is what instruction-tuned Qwen2 models end a turn with.
END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "<|eot_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
)
# Names of the padding, the repository and the file separator of fill-in-the-middle: after them a model begins
# something else. A vocabulary's first name of each kind counts.
FIM_END_TOKENS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Qwen2Tokenizer's own defaults in transformers, for a tokenizer_config.json that does not name the token.
DEFAULT_TOKENS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
# GGUF's names of the same tokens, as it spells them.
GGUF_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}


def end_ids(special: Mapping[str, int], given: Mapping[str, int | None] | None = None) -> set[int]:
    """The ids of the special tokens whose names mean an end. `given`: ids of fim_pad, fim_rep and fim_sep by a file's
    own word, which goes before the names."""
    ids = {special[name] for name in END_TOKENS if name in special}
    for kind, names in FIM_END_TOKENS.items():
        own = (given or {}).get(kind)
        ids |= {own} if own is not None else set([special[name] for name in names if name in special][:1])
    return ids


def named_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that a folder gives a name, such as bos_token: tokenizer_config.json's, special_tokens_map.json's and
    Qwen2Tokenizer's defaults, with transformers' precedence. A name without a token is left out."""
    path = folder / "special_tokens_map.json"
    others = read_json(path) if path.exists() else {}
    merged = others | dict(settings) if "added_tokens_decoder" in settings else dict(settings) | others
    for more in (settings.get("extra_special_tokens"), settings.get("model_specific_special_tokens")):
        merged |= more if isinstance(more, dict) else {}
    named = {name: _content(value) for name, value in (DEFAULT_TOKENS | merged).items() if name.endswith("_token")}
    return {name: text for name, text in named.items() if text is not None}


def added_tokens(
    data: Mapping[str, Any], settings: Mapping[str, Any], named: Mapping[str, str], rows: int | None = None
) -> list[dict[str, Any]]:
    """tokenizer.json's added tokens with those of tokenizer_config.json, as transformers adds them: each of
    added_tokens_decoder, whose flags count, the tokens with a role, and the lists of special tokens; a new one gets the
    next free id. Warns of a role's token that has none of the model's `rows` embeddings, and leaves it out."""
    vocabulary = data["model"]["vocab"]
    tokens = {token["content"]: token for token in data.get("added_tokens") or [] if token["content"]}
    free = 1 + max([*vocabulary.values(), *(token["id"] for token in tokens.values())], default=-1)
    listed = settings.get("added_tokens_decoder") or {}
    more = [listed[i] for i in sorted(listed, key=int)]
    roles = [named[name] for name in (*GGUF_TOKENS, *named) if name in named]  # transformers has this order, too
    known = {*vocabulary, *tokens, *(token["content"] for token in more)}
    unknown = [text for text in dict.fromkeys(roles) if text not in known and text not in DEFAULT_TOKENS.values()]
    free_rows = len(unknown) if rows is None else max(0, rows - free)
    if len(unknown) > free_rows:
        warnings.warn(
            f"The tokens {', '.join(unknown[free_rows:])!r:.80} that tokenizer_config.json gives a role are not in the "
            "vocabulary, and the model has no embeddings for them; they are text.",
            stacklevel=4,
        )
    known.update(unknown[:free_rows])
    more += [{"content": text, "special": True} for text in roles if text in known]
    for name in ("extra_special_tokens", "additional_special_tokens"):
        extra = settings.get(name) or []
        texts = map(_content, extra.values() if isinstance(extra, dict) else extra)
        more += [{"content": text, "special": True} for text in texts if text]
    for token in more:
        text = token["content"]
        i = tokens[text]["id"] if text in tokens else vocabulary.get(text, free)
        free = max(free, i + 1)
        own = token if len(token) > 2 else {**tokens.get(text, {}), **token}
        special = bool(own.get("special"))
        flags = {name: bool(own.get(name)) for name in ("single_word", "lstrip", "rstrip")}
        normalized = bool(own.get("normalized", not special))
        tokens[text] = {"id": i, "content": text, **flags, "normalized": normalized, "special": special}
    return sorted(tokens.values(), key=lambda token: token["id"])


def meant_as_control(names: Iterable[str]) -> set[str]:
    """Names that say of a token that it is a control token, in a vocabulary that does not mark any: those that end a
    text, and those of a control token's form."""
    ends = {*END_TOKENS, *(name for names in FIM_END_TOKENS.values() for name in names)}
    return {name for name in names if name in ends or re.fullmatch(r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>", name)}


def _content(value: Any) -> str | None:
    """The text of a token that is written as a string or as an object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def tokens_around(
    data: Mapping[str, Any], settings: Mapping[str, Any], named: Mapping[str, str], special: Mapping[str, int]
) -> tuple[list[int], list[int]]:
    """The ids before and after a text: as tokenizer.json's post-processor adds them, which alone counts for
    transformers 5; where it adds none, as tokenizer_config.json's add_bos_token and add_eos_token say. Raises for a
    post-processor of another form."""
    before: list[int] = []
    after: list[int] = []
    processor = data.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing":
            at = before
            for item in step["single"]:
                if "Sequence" in item:
                    at = after
                else:
                    at.extend(step["special_tokens"][item["SpecialToken"]["id"]]["ids"])
        elif step.get("type") in ("BertProcessing", "RobertaProcessing"):
            before.append(step["cls"][1])
            after.append(step["sep"][1])
    if not before and not after:
        for ids, name in ((before, "bos_token"), (after, "eos_token")):
            ids += [special[named[name]]] if settings.get(f"add_{name}") and named.get(name) in special else []
    return before, after


def post_processor(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer.json's form of the tokens around a text, by name."""

    def pieces(names: Iterable[str], kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": name, "type_id": kind}} for name in names]

    texts = [[*pieces(before, i), {"Sequence": {"id": "AB"[i], "type_id": i}}, *pieces(after, i)] for i in (0, 1)]
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in {**before, **after}.items()}
    return {"type": "TemplateProcessing", "single": texts[0], "pair": texts[0] + texts[1], "special_tokens": tokens}


def chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a folder by name, the main one as "default": chat_template.jinja and
    additional_chat_templates/NAME.jinja, else tokenizer_config.json's."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    files = {name: path for name, path in files.items() if path.exists()}
    for path in files.values():
        if not path.is_file():  # a pipe would be waited for
            raise QwenMLXError(f"{path}: is not a regular file; download the folder again.")
    templates = {name: read_text(str(path)) for name, path in files.items()}
    own = settings.get("chat_template")
    if templates or own is None:
        return templates
    if isinstance(own, str):
        return {"default": own}
    entries = own if isinstance(own, list) else [own]
    pairs: list[Any] = [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]
    if len(pairs) < len(entries) or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise QwenMLXError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a list of {{name, template}}."
        )
    return dict(pairs)
