"""Embedding, classification and reward models: transformers' numbers, and what sentence-transformers' files say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_mlx import QwenMLXError, convert, embed, load, load_encoder, score, step_scores
from qwen_mlx.cli.embed import main as embed_command
from qwen_mlx.cli.score import main as score_command
from reference.lazy import torch, transformers
from reference.small_models import END_OF_TEXT, IM_END, TOKENS, RandomModel, save_folder, write_gguf
from tests.helpers.cases import each
from tests.helpers.encoders import TEXTS, classifier, close_to_exact, encoder_folder
from tests.helpers.foreign import write_safetensors
from tests.helpers.peers import in_float64

ST = "sentence_transformers.models."


def modules(path: Path, *kinds: str, **pooling: object) -> None:
    """modules.json with these modules, and the settings of the pooling."""
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": ST + kind}
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(entries))
    for i, kind in enumerate(kinds[1:], 1):
        (path / f"{i}_{kind}").mkdir()
        if kind == "Pooling":
            (path / f"{i}_{kind}" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64} | pooling))


def theirs_of(path: Path):
    return transformers.Qwen2Model.from_pretrained(path, dtype=torch.float32).eval()


def ids_of(path: Path, text: str) -> list[int]:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids


def expected_of(path: Path, texts: list[str], result: Callable[[np.ndarray, str], Any]) -> list[np.ndarray]:
    """The outcome of `result` on transformers' last hidden states (tokens, hidden_size) of each text alone, in float32
    and with every step in float64."""
    model, both = theirs_of(path), []
    for precise in (model, in_float64(model)):
        with torch.no_grad():
            states = [precise(torch.tensor([ids_of(path, text)])).last_hidden_state[0].numpy() for text in texts]
        both.append(np.stack([result(hidden, text) for hidden, text in zip(states, texts)]))
    return both


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_last_token_normalised_is_transformers_s(tmp_path: Path):
    folder = encoder_folder(tmp_path / "m")
    expected = expected_of(folder, TEXTS, lambda hidden, _: unit(hidden[-1]))
    vectors = embed(load_encoder(folder), TEXTS)
    assert vectors.dtype == np.float32
    close_to_exact(vectors, *expected)
    close_to_exact(embed(load_encoder(folder), TEXTS, batch_size=2), *expected)


POOLED = {
    "pooling_mode_lasttoken": lambda h: h[-1],
    "pooling_mode_mean_tokens": lambda h: h.mean(0),
    "pooling_mode_cls_token": lambda h: h[0],
    "pooling_mode_max_tokens": lambda h: h.max(0),
}


@each("normalize", [True, False])
@each("mode", POOLED)
def test_pooling_is_what_modules_json_says(tmp_path: Path, mode: str, normalize: bool):
    folder = encoder_folder(tmp_path / "m")
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules(folder, *kinds, **dict.fromkeys(POOLED, False) | {mode: True})
    expected = expected_of(folder, TEXTS, lambda hidden, _: POOLED[mode](hidden))
    units = [unit(vectors) for vectors in expected]
    close_to_exact(embed(load_encoder(folder), TEXTS), *(units if normalize else expected))
    close_to_exact(embed(load_encoder(folder), TEXTS, normalize=True), *units)


def test_a_projection_after_pooling(tmp_path: Path):
    folder = encoder_folder(tmp_path / "m")
    modules(folder, "Transformer", "Pooling", "Dense", pooling_mode_mean_tokens=True)
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((24, 64)) / 8).astype(np.float32)
    bias = rng.standard_normal(24).astype(np.float32)
    own = {
        "in_features": 64,
        "out_features": 24,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (folder / "2_Dense" / "config.json").write_text(json.dumps(own))
    write_safetensors(
        folder / "2_Dense" / "model.safetensors", {"linear.weight": ("F32", weight), "linear.bias": ("F32", bias)}
    )
    expected = expected_of(folder, TEXTS, lambda hidden, _: np.tanh(weight @ hidden.mean(0) + bias))
    close_to_exact(embed(load_encoder(folder), TEXTS), *expected)
    assert embed(load_encoder(folder), []).shape == (0, 24)


def test_a_bidirectional_model_sees_what_comes_later(tmp_path: Path):
    folder = encoder_folder(tmp_path / "m", is_causal=False)
    model, expected = theirs_of(folder), []
    vectors = embed(load_encoder(folder), TEXTS, pooling="first", normalize=False)
    for precise, dtype in ((model, torch.float32), (in_float64(model), torch.float64)):
        rows = []
        for ids in (ids_of(folder, text) for text in TEXTS):
            everything = torch.zeros(1, 1, len(ids), len(ids), dtype=dtype)
            with torch.no_grad():
                rows.append(precise(torch.tensor([ids]), attention_mask=everything).last_hidden_state[0, 0].numpy())
        expected.append(np.stack(rows))
    close_to_exact(vectors, *expected)
    causal = embed(load_encoder(encoder_folder(tmp_path / "causal")), TEXTS, pooling="first", normalize=False)
    assert np.abs(causal - vectors).max() > 0.1


def test_gte_s_own_code_is_bidirectional(tmp_path: Path):
    classes = {"AutoModel": "modeling_qwen.Qwen2Model", "AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM"}
    assert not load_encoder(encoder_folder(tmp_path / "a", auto_map=classes)).config.is_causal
    assert load_encoder(encoder_folder(tmp_path / "b", auto_map=classes, is_causal=True)).config.is_causal


def test_prompts_the_longest_input_and_the_end_token(tmp_path: Path):
    folder = encoder_folder(tmp_path / "m")
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "Query: ", "document": ""}, "default_prompt_name": "query"})
    )
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_eos_token": True}))
    encoder = load_encoder(folder)
    assert encoder.token_ids("hello")[-1] == IM_END
    assert encoder.token_ids(f"hello{TOKENS[IM_END]}").count(IM_END) == 1
    assert len(encoder.token_ids("x" * 100)) == 20
    assert encoder.token_ids("x" * 100)[-1] == IM_END
    plain = embed(encoder, ["Query: hello"], prompt="document")
    np.testing.assert_array_equal(embed(encoder, ["hello"]), plain)
    np.testing.assert_array_equal(embed(encoder, ["lo"], prompt="Query: hel"), plain)


def test_dimensions_are_the_first_ones_normalised_again(tmp_path: Path):
    encoder = load_encoder(encoder_folder(tmp_path / "m"))
    whole = embed(encoder, TEXTS, normalize=False)
    np.testing.assert_allclose(embed(encoder, TEXTS, dimensions=16), unit(whole[:, :16]), atol=1e-6)
    with pytest.raises(QwenMLXError, match="dimensions is 65, expected 1 to 64"):
        embed(encoder, TEXTS, dimensions=65)


def test_a_language_model_embeds_too_as_a_folder_and_as_a_gguf(tmp_path: Path):
    model = RandomModel()
    folder, path = save_folder(tmp_path / "m", model), write_gguf(tmp_path / "m.gguf", model)
    expected = expected_of(folder, ["hello x"], lambda hidden, _: unit(hidden[-1]))
    for source in (folder, path):
        close_to_exact(embed(load_encoder(source), ["hello x"]), *expected)


@pytest.mark.parametrize("pad", [None, END_OF_TEXT])
def test_scores_are_transformers_s(tmp_path: Path, pad: int | None):
    folder = classifier(tmp_path / "m", pad_token_id=pad)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [*TEXTS, f"hello{TOKENS[END_OF_TEXT]}{TOKENS[END_OF_TEXT]}"]
    encoder = load_encoder(folder)
    scores = score(encoder, texts, batch_size=3)
    assert encoder.settings.labels == ("label 0", "label 1", "label 2")
    with torch.no_grad():
        expected = [
            np.concatenate([precise(torch.tensor([ids_of(folder, text)])).logits.numpy() for text in texts])
            for precise in (theirs, in_float64(theirs))
        ]
    close_to_exact(scores, *expected)


def test_a_pair_is_one_text_after_the_other_and_a_conversation_is_rendered(tmp_path: Path):
    encoder = load_encoder(classifier(tmp_path / "m"))
    np.testing.assert_array_equal(score(encoder, [("hello", " x")]), score(encoder, ["hello x"]))
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}]
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"
    np.testing.assert_array_equal(score(encoder, [messages]), score(encoder, [text]))


def reward_head(outputs: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    shapes = {
        "score.0.weight": (64, 64),
        "score.0.bias": (64,),
        "score.2.weight": (outputs, 64),
        "score.2.bias": (outputs,),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def in_numpy(head: dict[str, np.ndarray], hidden: np.ndarray) -> np.ndarray:
    inner = np.maximum(hidden @ head["score.0.weight"].T + head["score.0.bias"], 0)
    return inner @ head["score.2.weight"].T + head["score.2.bias"]


def test_a_reward_model_of_two_layers(tmp_path: Path):
    head = reward_head(1)
    folder = encoder_folder(tmp_path / "m", head, bare=False, architectures=["Qwen2ForRewardModel"])
    expected = expected_of(folder, TEXTS, lambda hidden, _: in_numpy(head, hidden[-1]))
    close_to_exact(score(load_encoder(folder), TEXTS), *expected)


def test_a_process_reward_model_scores_each_step(tmp_path: Path):
    head = reward_head(2)
    folder = encoder_folder(tmp_path / "m", head, bare=False, architectures=["Qwen2ForProcessRewardModel"])
    step = TOKENS[END_OF_TEXT]
    texts = [f"hello{step} x{step}", f"a{step}b{step}c{step}", "no step"]
    found = step_scores(load_encoder(folder), texts, step=step)
    assert [row.shape for row in found] == [(2,), (3,), (0,)]

    def odds(hidden: np.ndarray, text: str) -> np.ndarray:
        logits = in_numpy(head, hidden)[np.array(ids_of(folder, text)) == END_OF_TEXT]
        return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))

    expected = [np.concatenate(rows, axis=1)[0] for rows in zip(*(expected_of(folder, [t], odds) for t in texts))]
    close_to_exact(np.concatenate(found), *expected)
    with pytest.raises(QwenMLXError, match="step is '<extra_0>', expected a token of the model's vocabulary"):
        step_scores(load_encoder(folder), texts)
    with pytest.raises(QwenMLXError, match="scores single tokens and no whole text; take step_scores"):
        score(load_encoder(folder), texts)


def test_commands(tmp_path: Path, capsys):
    folder, classes = encoder_folder(tmp_path / "m"), classifier(tmp_path / "c")
    expected = embed(load_encoder(folder), TEXTS)
    (tmp_path / "texts").write_text("\n".join(TEXTS[1:]) + "\n")
    arguments = ["--model", str(folder), "--input", str(tmp_path / "texts"), TEXTS[0]]
    assert embed_command(arguments) == 0
    np.testing.assert_array_equal(np.array(json.loads(capsys.readouterr().out), np.float32), expected)
    assert embed_command([*arguments, "--output", str(tmp_path / "v.npy"), "--dimensions", "8"]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), unit(expected[:, :8]), atol=1e-6)
    assert score_command(["--model", str(classes), "--query", "hello", " x", " y"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in report] == [" x", " y"]
    rows = score(load_encoder(classes), [("hello", " x"), ("hello", " y")])
    assert [[*row["scores"].values()] for row in report] == [[pytest.approx(float(x)) for x in row] for row in rows]
    assert [*report[0]["scores"]] == ["label 0", "label 1", "label 2"]
    with pytest.raises(QwenMLXError, match=r"--output is 'v.txt', expected a name that ends in .npy or .json"):
        embed_command([*arguments, "--output", "v.txt"])


@pytest.mark.parametrize("read", [load, lambda folder: convert(folder, folder.parent / "out")], ids=["load", "convert"])
def test_what_generates_no_text_says_what_it_is(tmp_path: Path, read):
    with pytest.raises(QwenMLXError, match=r"no language head, .*qwen-mlx embed"):
        read(encoder_folder(tmp_path / "m"))
    with pytest.raises(QwenMLXError, match=r"no language head, .*qwen-mlx score"):
        read(classifier(tmp_path / "c"))
    with pytest.raises(QwenMLXError, match="no classification or reward head"):
        score(load_encoder(tmp_path / "m"), ["x"])


def test_labels_are_those_of_the_numbers(tmp_path: Path, capsys):
    names = {"2": "c", "0": "a", "1": "b"}
    assert load_encoder(classifier(tmp_path / "m", id2label=names)).settings.labels == ("a", "b", "c")
    assert load_encoder(classifier(tmp_path / "n", id2label={"0": "a"})).settings.labels == ()
    with pytest.raises(QwenMLXError, match=r"config.json: id2label is \['a'\], expected names by number"):
        load_encoder(classifier(tmp_path / "o", id2label=["a"]))
    for numbers in ("052", "113", "12"):
        with pytest.raises(QwenMLXError, match=r"id2label is \{.*\}, expected names by number, from 0 on"):
            load_encoder(classifier(tmp_path / numbers, id2label=dict.fromkeys([*numbers, f"0{numbers[0]}"], "x")))
    with pytest.raises(QwenMLXError, match=r"config.json: pad_token_id is 'x', expected a token's id"):
        load_encoder(classifier(tmp_path / "p", pad_token_id="x"))
    assert "has names for 1 of the head's 3 labels; none is used" in capsys.readouterr().err


def test_a_vocabulary_without_a_tokenizer_json(tmp_path: Path):
    folder = encoder_folder(tmp_path / "m")
    texts = [*TEXTS, "a<|im_end|>b"]
    expected = embed(load_encoder(folder), texts)
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer.json").unlink()
    np.testing.assert_array_equal(embed(load_encoder(folder), texts), expected)


def test_settings_that_are_not_known_are_said(tmp_path: Path, capsys):
    folder = encoder_folder(tmp_path / "m")
    modules(folder, "Transformer", "Pooling", pooling_mode="mean", odd=1, pooling_mode_cls_token=False)
    load_encoder(folder)
    assert "1_Pooling/config.json: left out, because it is not known here: odd\n" in capsys.readouterr().err


def damage_modules(folder: Path, text: str) -> None:
    (folder / "modules.json").write_text(text)


def damage_dense(folder: Path, **settings: object) -> None:
    modules(folder, "Transformer", "Pooling", "Dense", pooling_mode="mean")
    (folder / "2_Dense" / "config.json").write_text(json.dumps({"in_features": 64, "out_features": 8} | settings))
    arrays = {"linear.weight": (8, 64), "linear.bias": (8,)}
    write_safetensors(
        folder / "2_Dense" / "model.safetensors", {n: ("F32", np.ones(s, np.float32)) for n, s in arrays.items()}
    )


DAMAGE = {
    "not json": (lambda f: damage_modules(f, "{"), r"modules.json: not valid JSON"),
    "no list": (lambda f: damage_modules(f, "{}"), r"modules.json: holds \{\}, expected a list of modules"),
    "another module": (
        lambda f: damage_modules(f, json.dumps([{"type": "x.LSTM", "path": ""}])),
        r"module 'x.LSTM' is not known, expected Transformer, Pooling, Dense or Normalize",
    ),
    "code of its own": (
        lambda f: damage_modules(f, json.dumps([{"type": "custom_st.Transformer", "path": "", "kwargs": ["task"]}])),
        r"module 'custom_st.Transformer' is code of the folder's own, which is not run here; if it does the same as",
    ),
    "a model in a folder": (
        lambda f: damage_modules(f, json.dumps([{"type": f"{ST}Transformer", "path": "0_Transformer"}])),
        r"the Transformer's path is '0_Transformer', expected '', the folder itself",
    ),
    "a projection without its file": (
        lambda f: (damage_dense(f), (f / "2_Dense" / "model.safetensors").rename(f / "2_Dense" / "pytorch_model.bin")),
        r"the projection's file is missing \(pytorch_model.bin, a pickle, is not read\); save the model again",
    ),
    "an activation of its own": (
        lambda f: damage_dense(f, activation_function="modeling.HardTanh.Tanh"),
        r"the projection is \(64, 8\) with modeling.HardTanh.Tanh, expected sizes and torch.nn's",
    ),
    "no pooling": (lambda f: modules(f, "Transformer", "Pooling"), r"pooling is \[\], expected one of"),
    "another pooling": (
        lambda f: modules(f, "Transformer", "Pooling", pooling_mode="attention"),
        r"pooling is \['attention'\], expected one of",
    ),
    "prompts left out": (
        lambda f: modules(f, "Transformer", "Pooling", pooling_mode="mean", include_prompt=False),
        r"include_prompt is false, expected true",
    ),
    "messages": (
        lambda f: (f / "sentence_bert_config.json").write_text('{"modality_config": {"text": {}, "message": {}}}'),
        r"modality_config has 'message', expected 'text' alone",
    ),
    "another order": (
        lambda f: modules(f, "Transformer", "Pooling", "Normalize", "Dense", pooling_mode="mean"),
        r"modules.json: the modules are Transformer Pooling Normalize Dense, expected Transformer, Pooling, any number",
    ),
    "a projection of each token": (
        lambda f: damage_dense(f, module_input_name="token_embeddings"),
        r"2_Dense/config.json: module_input_name is 'token_embeddings', expected 'sentence_embedding'",
    ),
    "a bias that is not used": (lambda f: damage_dense(f, bias=False), r"'linear.bias' is not part of the projection"),
    "a bias that is no bool": (lambda f: damage_dense(f, bias="yes"), r"bias is 'yes', expected True or False"),
    "small letters": (
        lambda f: (f / "sentence_bert_config.json").write_text('{"do_lower_case": true}'),
        r"do_lower_case is True, expected False",
    ),
    "a length": (
        lambda f: (f / "sentence_bert_config.json").write_text('{"max_seq_length": "512"}'),
        r"max_seq_length is '512', expected a positive integer",
    ),
    "a default that is no prompt": (
        lambda f: (f / "config_sentence_transformers.json").write_text('{"default_prompt_name": "q"}'),
        r"'default_prompt_name' is 'q', expected one of the prompts \(none\)",
    ),
    "prompts": (
        lambda f: (f / "config_sentence_transformers.json").write_text('{"prompts": [1]}'),
        r"'prompts' is \[1\], expected texts by name",
    ),
}


@each("case", DAMAGE)
def test_damaged_files_of_sentence_transformers(tmp_path: Path, case: str):
    damage, message = DAMAGE[case]
    folder = encoder_folder(tmp_path / "m")
    damage(folder)
    with pytest.raises(QwenMLXError, match=message):
        load_encoder(folder)


def test_a_head_that_does_not_fit(tmp_path: Path):
    folder = encoder_folder(tmp_path / "m", {"score.weight": np.zeros((3, 63), np.float32)}, bare=False)
    with pytest.raises(QwenMLXError, match=r"the head's 'score' has shape \(3, 63\), expected \(outputs, 64\)"):
        load_encoder(folder)


def test_sizes_that_no_head_has(tmp_path: Path):
    empty = encoder_folder(tmp_path / "empty", {"score.weight": np.zeros((0, 0), np.float32)}, bare=False)
    with pytest.raises(QwenMLXError, match=r"tensor 'score.weight' is not part of this model"):
        load_encoder(empty)
    huge = encoder_folder(tmp_path / "huge")
    modules(huge, "Transformer", "Pooling", "Dense", pooling_mode="mean")
    (huge / "2_Dense" / "config.json").write_text(json.dumps({"in_features": 2**70, "out_features": 8}))
    with pytest.raises(QwenMLXError, match=r"the projection is \(1180591620717411303424, 8\) .*, expected sizes"):
        load_encoder(huge)


@each("wrong", ["", 3, ["a", "b", "c"], []], ids=str)
def test_inputs_that_are_none(tmp_path: Path, wrong):
    with pytest.raises(QwenMLXError, match="an input "):
        score(load_encoder(classifier(tmp_path / "m")), [wrong])
