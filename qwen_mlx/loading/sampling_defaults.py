"""A model's own sampling settings: from its GGUF, from generation_config.json, or as its family publishes them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import QwenMLXError, shortened
from ..generation.sampling import SamplingSettings
from ..gguf.reader import GGUFFile
from ..text.files import read_json
from ..text.special_tokens import chat_templates
from ..text.thoughts import THINK_MARKS

# Qwen's settings for its instruction-tuned models (generation_config.json of Qwen2.5-*-Instruct; 1.05 is the value of
# the sizes from 3B on and of Qwen's own documentation), for files without settings of their own.
INSTRUCT_SETTINGS = SamplingSettings(0.7, 20, 0.8, 0.0, 1.05, source="Qwen2.5-Instruct's published settings")
# Qwen's settings for QwQ-32B (its generation_config.json), which repeats itself without end if it is greedy.
QWQ_SETTINGS = SamplingSettings(0.6, 40, 0.95, source="QwQ-32B's published settings")
# DeepSeek's settings for DeepSeek-R1 and its distillations (README of DeepSeek-R1, usage recommendations).
R1_SETTINGS = SamplingSettings(0.6, top_p=0.95, source="DeepSeek-R1's published settings")
GREEDY_SETTINGS = SamplingSettings(source="greedy: no settings in the file and not an instruction-tuned model")

# A model's name, and its family's settings; the first that fits counts. Words are joined by "-".
FAMILIES = (
    (r"fuseo1|(deepseek|tiny|open|z)r1", R1_SETTINGS),  # before QwQ, which FuseO1's names have, too
    (r"qwq-32b-preview|qwq.*preview", INSTRUCT_SETTINGS),
    (r"qwq", QWQ_SETTINGS),
    (
        r"deepseek-r1|r1-distill|deepscaler|deepcoder|openreasoning|openmath-nemotron|acereason|skywork-or1|light-r1|"
        r"vibethinker|openthinker|open-r1|deephermes|reasoning|thinking|still-[23]|\blimo\b",
        R1_SETTINGS,
    ),
    (r"sky-t1|\bs1(\.1)?\b|s1k|marco-o1|bespoke-stratos|smallthinker", INSTRUCT_SETTINGS),
    (r"instruct|\bchat\b|dolphin|hermes|magnum|tower-plus|athene", INSTRUCT_SETTINGS),
)
# GGUF's names of settings (llama.cpp's LLM_KV_GENERAL_SAMPLING_*).
GGUF_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
}
GGUF_PREFIX = "general.sampling."
# Settings of generation_config.json, those of transformers.
FOLDER_NAMES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
# Transformers' settings that would change what is generated, with the values that switch them off.
UNSUPPORTED = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "diversity_penalty": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "sequence_bias": (),
    "dola_layers": (),
    "top_h": (1,),
    "exponential_decay_length_penalty": (),
    "forced_eos_token_id": (),
    "max_length": (20,),
    "max_new_tokens": (),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_return_sequences": (1,),
    "stop_strings": (),
    "token_healing": (False,),
    "watermarking_config": (),
}
# Settings that change no token here: where a file is from, names of tokens, beams' and what transformers gives back.
NO_EFFECT = {
    *("_from_model_config", "transformers_version", "do_sample", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("decoder_start_token_id", "use_cache", "cache_implementation", "early_stopping", "length_penalty"),
    *("remove_invalid_values", "renormalize_logits", "return_dict_in_generate", "output_attentions"),
    *("output_hidden_states", "output_logits", "output_scores"),
}


def gguf_defaults(file: GGUFFile) -> SamplingSettings:
    """The file's `general.sampling.*`, else the settings of the family that its metadata or its name tells, else
    greedy. Warns of a setting that is not supported."""
    metadata = file.metadata
    stored = {key[len(GGUF_PREFIX) :]: value for key, value in metadata.items() if key.startswith(GGUF_PREFIX)}
    own = {GGUF_NAMES[key]: _as_llama_cpp(key, value) for key, value in stored.items() if key in GGUF_NAMES}
    ignored = sorted(stored.keys() - GGUF_NAMES.keys())
    if ignored:
        warnings.warn(f"{file.path.name}: the sampling settings {', '.join(ignored)} are ignored.", stacklevel=2)
    if "temperature" not in own:  # the rest of them says nothing against the family's
        names = [*_described(metadata), file.path.stem]
        family = family_settings(names, str(metadata.get("tokenizer.chat_template", "")))
        if not own:
            return family
        own = {name: getattr(family, name) for name in GGUF_NAMES.values()} | own
    return _settings(own, f"general.sampling of {file.path.name}", file.path)


def _as_llama_cpp(key: str, value: Any) -> Any:
    """A setting beyond its range as llama.cpp's samplers take it: no limit, or for a temperature greedy."""
    if type(value) not in (int, float):
        return value
    if key in ("temp", "top_k", "min_p", "xtc_probability"):
        return max(value, 0)
    return min(value, 1.0) if key == "top_p" else value


def _described(metadata: Mapping[str, Any]) -> Iterable[str]:
    """A GGUF's names for itself, and then for the models it was made from."""
    yield f"{metadata.get('general.basename', '')} {metadata.get('general.finetune', '')}"
    yield str(metadata.get("general.name", ""))
    count = metadata.get("general.base_model.count", 0)
    for i in range(min(count, 8) if isinstance(count, int) else 0):
        yield str(metadata.get(f"general.base_model.{i}.name", ""))


def family_settings(names: Iterable[str], template: str = "") -> SamplingSettings:
    """The settings of the family that the first of `names` belongs to which belongs to any; of a model that nothing
    names but whose chat template opens a thought, DeepSeek-R1's; else greedy."""
    for name in names:
        joined = re.sub(r"[\s_/]+", "-", name.lower())
        for pattern, settings in FAMILIES:
            if re.search(pattern, joined):
                return settings
    if _opens_thought(template):
        return replace(R1_SETTINGS, source="DeepSeek-R1's published settings, as the chat template opens a thought")
    return GREEDY_SETTINGS


def _opens_thought(template: str) -> bool:
    """True if a chat template's generation prompt has a thought's opening mark and not the closing one. The template is
    not run: opening a file runs nothing of it."""
    prompt = template.rpartition("add_generation_prompt")[2].partition("endif")[0]
    return any(opening in prompt and closing not in prompt for opening, closing in THINK_MARKS)


def folder_defaults(folder: Path) -> SamplingSettings:
    """The settings of generation_config.json as transformers means them, else those of the family that config.json or
    the folder's name tells. Warns of a setting that is not supported."""
    path = folder / "generation_config.json"
    raw = read_json(path) if path.exists() else {}
    own = {name: raw[name] for name in FOLDER_NAMES if raw.get(name) is not None}
    if not isinstance(raw.get("do_sample"), bool | None):
        raise QwenMLXError(f"{path}: do_sample is {shortened(repr(raw['do_sample']), 80)}, expected true or false.")
    known = NO_EFFECT | UNSUPPORTED.keys() | set(FOLDER_NAMES)
    ignored = [name for name, off in UNSUPPORTED.items() if raw.get(name) not in (None, *off)]
    ignored += sorted(name for name, value in raw.items() if name not in known and value not in (None, False))
    if ignored:
        warnings.warn(f"{path}: the settings {shortened(', '.join(ignored), 200)} are ignored.", stacklevel=2)
    if raw.get("do_sample"):
        # Transformers' own defaults, for what the file leaves out.
        return _settings({"temperature": 1.0, "top_k": 50} | own, path.name, path)
    penalties: dict[str, Any] = {
        name: own[name] for name in ("repetition_penalty", "no_repeat_ngram_size") if name in own
    }
    neutral = {"temperature": 1, "top_k": 50, "top_p": 1, "min_p": 0, "typical_p": 1}
    if unused := [name for name, off in neutral.items() if own.get(name) not in (None, off)]:
        warnings.warn(
            f"{path}: {', '.join(unused)} of it are not used, since do_sample is not true, as in transformers.",
            stacklevel=2,
        )
    if raw.get("do_sample") is None and not penalties:
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        own_folder = folder.absolute()
        if own_folder.parent.name == "snapshots":  # of the Hub's cache, where a hash stands for the name
            own_folder = own_folder.parent.parent
        settings = family_settings([own_folder.name, str(config.get("_name_or_path", ""))])
        if settings is GREEDY_SETTINGS:
            tokenizer = folder / "tokenizer_config.json"
            templates = chat_templates(folder, read_json(tokenizer) if tokenizer.exists() else {})
            settings = family_settings([], templates.get("default", ""))
        if settings is not GREEDY_SETTINGS:
            return settings
    return _settings(penalties, path.name, path) if path.exists() else GREEDY_SETTINGS


def _settings(values: dict[str, Any], source: str, path: Path) -> SamplingSettings:
    """The settings of a file, in which a whole number may be written as a float."""
    whole = ("top_k", "no_repeat_ngram_size")
    values = {
        name: int(value) if name in whole and isinstance(value, float) and value.is_integer() else value
        for name, value in values.items()
    }
    try:
        return SamplingSettings(**values, source=source)
    except QwenMLXError as error:
        raise QwenMLXError(f"{path}: {error}") from None
