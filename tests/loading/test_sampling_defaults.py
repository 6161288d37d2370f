"""The sampling settings that a model brings along, by its metadata, its files and its name."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_mlx import QwenMLXError
from qwen_mlx.loading.sampling_defaults import (
    GREEDY_SETTINGS,
    INSTRUCT_SETTINGS,
    QWQ_SETTINGS,
    R1_SETTINGS,
    folder_defaults,
    gguf_defaults,
)
from tests.helpers.cases import each


def gguf(file: str = "model.gguf", /, **general: Any) -> SimpleNamespace:
    metadata = {"general." + key.replace("__", "."): value for key, value in general.items()}
    return SimpleNamespace(metadata=metadata, path=Path(file))


@each(
    ("file", "expected"),
    [
        (gguf(name="QwQ 32B"), QWQ_SETTINGS),
        (gguf(basename="QwQ", finetune="Preview"), INSTRUCT_SETTINGS),
        (gguf("qwq-32b-q4_k_m.gguf"), QWQ_SETTINGS),
        (gguf(name="Qwen1.5 7B Chat"), INSTRUCT_SETTINGS),
        (gguf("qwen1_5-72b-chat-q3_k_m.gguf", name="models"), INSTRUCT_SETTINGS),
        (gguf("CodeQwen1.5-7B-Chat.gguf"), INSTRUCT_SETTINGS),
        (gguf(basename="DeepSeek-R1-Distill-Qwen"), R1_SETTINGS),
        (gguf(name="DeepScaleR 1.5B Preview"), R1_SETTINGS),
        (gguf(name="OpenThinker2 7B"), R1_SETTINGS),
        (gguf(name="FuseO1 DeepSeekR1 QwQ SkyT1 32B Preview"), R1_SETTINGS),
        (gguf("TinyR1-32B-Preview.gguf"), R1_SETTINGS),
        (gguf("OpenR1-Qwen-7B-Q4_K_M.gguf"), R1_SETTINGS),
        (gguf(basename="STILL-3", finetune="preview"), R1_SETTINGS),
        (gguf(name="OpenReasoning Nemotron 7B"), R1_SETTINGS),
        (gguf("Sky-T1-32B-Preview-Q4_K_M.gguf"), INSTRUCT_SETTINGS),
        (gguf("s1.1-32B.Q4_K_M.gguf"), INSTRUCT_SETTINGS),
        (gguf("Marco-o1-q8_0.gguf"), INSTRUCT_SETTINGS),
        (gguf("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"), INSTRUCT_SETTINGS),
        (gguf("mine.gguf", base_model__count=1, base_model__0__name="Qwen2.5 7B Instruct"), INSTRUCT_SETTINGS),
        # A model's own name goes before the file's and before that of the model it was made from.
        (gguf("qwen2.5-instruct.gguf", name="QwQ"), QWQ_SETTINGS),
        (gguf(name="DeepSeek R1", base_model__count=1, base_model__0__name="Qwen2.5 Instruct"), R1_SETTINGS),
        (gguf("qwen2.5-7b-q8_0.gguf", basename="Qwen2.5", name="Qwen2.5 7B"), GREEDY_SETTINGS),
        (gguf("mine.gguf", base_model__count="many"), GREEDY_SETTINGS),
    ],
)
def test_a_gguf_without_settings_has_its_familys(file: Any, expected: Any):
    assert gguf_defaults(file) == expected


def test_a_template_that_opens_a_thought_is_never_greedy():
    file, start = gguf(), "{{ messages[0].content }}{% if add_generation_prompt %}<|im_start|>assistant\n"
    file.metadata["tokenizer.chat_template"] = f"{start}<think>\n{{% endif %}}"
    assert (gguf_defaults(file).temperature, gguf_defaults(file).top_p) == (0.6, 0.95)
    closed = f"{start}<think>\n\n</think>\n\n{{% endif %}}"
    for other in (closed, start + "{% endif %}{% if '<think>' in x %}{% endif %}", "{% for %}"):
        file.metadata["tokenizer.chat_template"] = other
        assert gguf_defaults(file) == GREEDY_SETTINGS


def test_all_settings_of_a_gguf_are_taken_or_named():
    taken = {"temp": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "penalty_repeat": 1.1}
    taken |= {"xtc_probability": 0.5, "xtc_threshold": 0.2}
    file = gguf(**{f"sampling__{key}": value for key, value in taken.items()})
    settings = gguf_defaults(file)
    values = (settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.repetition_penalty)
    assert (*values, settings.xtc_probability, settings.xtc_threshold) == tuple(taken.values())
    with pytest.warns(UserWarning, match=r"mirostat, penalty_last_n are ignored"):
        gguf_defaults(gguf(sampling__mirostat=2, sampling__penalty_last_n=64, sampling__temp=0.5))


@each(
    ("stored", "expected"),
    [
        ({"temp": -1.0}, (0.0, 0, 1.0, 0.0)),
        ({"temp": 0.5, "top_k": -1, "top_p": 2.0, "min_p": -0.1}, (0.5, 0, 1.0, 0.0)),
        ({"temp": 0.5, "top_k": 0, "xtc_probability": -1.0}, (0.5, 0, 1.0, 0.0)),
    ],
)
def test_a_gguf_switches_settings_off_as_llama_cpp_does(stored: dict[str, Any], expected: tuple[float, ...]):
    settings = gguf_defaults(gguf(**{f"sampling__{key}": value for key, value in stored.items()}))
    assert (settings.temperature, settings.top_k, settings.top_p, settings.min_p) == expected
    assert settings.xtc_probability == 0


def test_a_gguf_with_nonsense_for_a_setting_is_refused():
    for value in (math.nan, "0.6"):
        with pytest.raises(QwenMLXError, match="temperature"):
            gguf_defaults(gguf(sampling__temp=value))


def folder(path: Path, generation: dict[str, Any] | None, config: dict[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


@each(
    "generation",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": None, "top_k": 0},
        {"do_sample": True, "temperature": 0.7, "top_k": 20.0, "top_p": 0.8, "repetition_penalty": 1.05},
        {"do_sample": True, "typical_p": 0.9, "min_p": 0.1, "no_repeat_ngram_size": 3},
        {"do_sample": None, "temperature": 0.6, "top_p": 0.95, "top_k": 50},
        {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1, "no_repeat_ngram_size": 2.0},
    ],
)
def test_generation_config_means_what_transformers_means(tmp_path: Path, generation: dict[str, Any]):
    """The settings with which `generate` would make its logits processors."""
    from transformers import GenerationConfig

    unused = {"temperature", "top_p"} & generation.keys() if generation["do_sample"] is not True else set()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settings = folder_defaults(folder(tmp_path, generation))
    assert len(said) == bool(unused)
    assert all(name in str(said[0].message) for name in unused)
    theirs = GenerationConfig.from_pretrained(tmp_path)
    defaults = theirs._get_default_generation_params()

    def value(name: str) -> Any:
        own = getattr(theirs, name)
        return defaults.get(name) if own is None else own

    assert settings.repetition_penalty == (value("repetition_penalty") or 1)
    assert settings.no_repeat_ngram_size == (value("no_repeat_ngram_size") or 0)
    if value("do_sample"):
        assert (settings.temperature, settings.top_k) == (value("temperature"), value("top_k"))
        assert (settings.top_p, settings.typical_p) == (value("top_p"), value("typical_p"))
        assert settings.min_p == (value("min_p") or 0)
    else:
        assert settings.greedy


@each(
    ("name", "generation", "config", "expected"),
    [
        ("QwQ-32B", None, {}, QWQ_SETTINGS),
        ("x", {"eos_token_id": 1}, {"_name_or_path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"}, R1_SETTINGS),
        ("x", None, {}, GREEDY_SETTINGS),
        ("QwQ-32B", {"do_sample": False}, {}, GREEDY_SETTINGS),
    ],
)
def test_a_folder_without_settings_has_its_familys(tmp_path: Path, name: str, generation, config, expected):
    settings = folder_defaults(folder(tmp_path / name, generation, config))
    assert (settings.temperature, settings.top_p) == (expected.temperature, expected.top_p)


def test_a_folder_is_what_it_is_called_and_not_what_it_lies_in(tmp_path: Path):
    for path, expected in (
        ("chat/QwQ-32B", QWQ_SETTINGS),
        ("instruct/base", GREEDY_SETTINGS),
        ("models--Qwen--QwQ-32B/snapshots/0a1b", QWQ_SETTINGS),
    ):
        (tmp_path / path).mkdir(parents=True)
        assert folder_defaults(tmp_path / path) == expected, path
    (tmp_path / "instruct/base/chat_template.jinja").write_text(
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
    )
    assert folder_defaults(tmp_path / "instruct/base").temperature == R1_SETTINGS.temperature


def test_a_part_of_a_gguf_s_settings_leaves_the_family_s(tmp_path: Path):
    file = gguf(name="QwQ 32B")
    file.metadata["general.sampling.top_k"] = 20
    settings = gguf_defaults(file)
    assert (settings.temperature, settings.top_k, settings.top_p) == (QWQ_SETTINGS.temperature, 20, QWQ_SETTINGS.top_p)


def test_settings_that_are_not_supported_are_named(tmp_path: Path):
    generation = {
        "num_beams": 4,
        "penalty_alpha": 0.0,
        "stop_strings": ["x"],
        "odd": 1,
        "use_cache": True,
        "none": None,
    }
    with pytest.warns(UserWarning, match=r"settings num_beams, stop_strings, odd are ignored"):
        folder_defaults(folder(tmp_path, generation))


@each("value", ["x", 1.5, -1, True])
def test_damaged_settings_are_named(tmp_path: Path, value: Any):
    with pytest.raises(QwenMLXError, match=r"generation_config\.json.*top_k"):
        folder_defaults(folder(tmp_path, {"do_sample": True, "top_k": value}))
    with pytest.raises(QwenMLXError, match=r"generation_config\.json: do_sample is 'x', expected true or false"):
        folder_defaults(folder(tmp_path, {"do_sample": "x"}))
