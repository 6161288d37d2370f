"""Embedding, classification and reward models: transformers' numbers, and what sentence-transformers' files say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwen_mlx import QwenMLXError, convert, embed, load, load_encoder, score, step_scores
from qwen_mlx.cli.embed import main as embed_command
from qwen_mlx.cli.score import main as score_command
from reference.lazy import torch, transformers
from reference.small_models import END_OF_TEXT, IM_END, TOKENS, RandomModel, save_folder, to_hf, write_gguf
from tests.helpers.cases import each
from tests.helpers.encoders import TEXTS, classifier, encoder_folder
from tests.helpers.foreign import write_safetensors

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


def hidden_states(path: Path, text: str) -> np.ndarray:
    """transformers' last hidden states of one text alone, (tokens, hidden_size)."""
    with torch.no_grad():
        return theirs_of(path)(torch.tensor([ids_of(path, text)])).last_hidden_state[0].numpy()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_last_token_normalised_is_transformers_s(tmp_path: Path):
    folder = encoder_folder(tmp_path / "m")
    expected = np.stack([unit(hidden_states(folder, text)[-1]) for text in TEXTS])
    vectors = embed(load_encoder(folder), TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    np.testing.assert_allclose(embed(load_encoder(folder), TEXTS, batch_size=2), expected, atol=2e-6)


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
    expected = np.stack([POOLED[mode](hidden_states(folder, text)) for text in TEXTS])
    vectors = embed(load_encoder(folder), TEXTS)
    np.testing.assert_allclose(vectors, unit(expected) if normalize else expected, atol=1e-5)
    np.testing.assert_allclose(embed(load_encoder(folder), TEXTS, normalize=True), unit(expected), atol=2e-6)


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
    expected = np.stack([np.tanh(weight @ hidden_states(folder, text).mean(0) + bias) for text in TEXTS])
    np.testing.assert_allclose(embed(load_encoder(folder), TEXTS), expected, atol=1e-5)


def test_a_bidirectional_model_sees_what_comes_later(tmp_path: Path):
    folder = encoder_folder(tmp_path / "m", is_causal=False)
    model = theirs_of(folder)
    vectors = embed(load_encoder(folder), TEXTS, pooling="first", normalize=False)
    for vector, text in zip(vectors, TEXTS):
        ids = ids_of(folder, text)
        everything = torch.zeros(1, 1, len(ids), len(ids))
        with torch.no_grad():
            expected = model(torch.tensor([ids]), attention_mask=everything).last_hidden_state[0, 0].numpy()
        np.testing.assert_allclose(vector, expected, atol=2e-5)
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
    with torch.no_grad():
        theirs = to_hf(model).model(torch.tensor([ids_of(folder, "hello x")])).last_hidden_state[0, -1].numpy()
    for source in (folder, path):
        np.testing.assert_allclose(embed(load_encoder(source), ["hello x"])[0], unit(theirs), atol=2e-6)


@pytest.mark.parametrize("pad", [None, END_OF_TEXT])
def test_scores_are_transformers_s(tmp_path: Path, pad: int | None):
    folder = classifier(tmp_path / "m", pad_token_id=pad)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [*TEXTS, f"hello{TOKENS[END_OF_TEXT]}{TOKENS[END_OF_TEXT]}"]
    encoder = load_encoder(folder)
    scores = score(encoder, texts, batch_size=3)
    assert encoder.settings.labels == ("label 0", "label 1", "label 2")
    for row, text in zip(scores, texts):
        with torch.no_grad():
            expected = theirs(torch.tensor([ids_of(folder, text)])).logits[0].numpy()
        np.testing.assert_allclose(row, expected, atol=2e-5)


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
    expected = np.stack([in_numpy(head, hidden_states(folder, text)[-1]) for text in TEXTS])
    np.testing.assert_allclose(score(load_encoder(folder), TEXTS), expected, rtol=1e-5, atol=1e-4)


def test_a_process_reward_model_scores_each_step(tmp_path: Path):
    head = reward_head(2)
    folder = encoder_folder(tmp_path / "m", head, bare=False, architectures=["Qwen2ForProcessRewardModel"])
    step = TOKENS[END_OF_TEXT]
    texts = [f"hello{step} x{step}", f"a{step}b{step}c{step}", "no step"]
    found = step_scores(load_encoder(folder), texts, step=step)
    for row, text in zip(found, texts):
        logits = in_numpy(head, hidden_states(folder, text))[np.array(ids_of(folder, text)) == END_OF_TEXT]
        odds = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
        np.testing.assert_allclose(row, (odds / odds.sum(-1, keepdims=True))[:, 1], atol=2e-5)
    with pytest.raises(QwenMLXError, match="step is '<extra_0>', expected a token of the model's vocabulary"):
        step_scores(load_encoder(folder), texts)


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


def damage_modules(folder: Path, text: str) -> None:
    (folder / "modules.json").write_text(text)


DAMAGE = {
    "not json": (lambda f: damage_modules(f, "{"), r"modules.json: not valid JSON"),
    "no list": (lambda f: damage_modules(f, "{}"), r"modules.json: holds \{\}, expected a list of modules"),
    "another module": (
        lambda f: damage_modules(f, json.dumps([{"type": "x.LSTM", "path": ""}])),
        r"module 'x.LSTM' is not known, expected Transformer, Pooling, Dense or Normalize",
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
    modules(huge, "Transformer", "Dense")
    (huge / "1_Dense" / "config.json").write_text(json.dumps({"in_features": 2**70, "out_features": 8}))
    with pytest.raises(QwenMLXError, match=r"the projection is \(1180591620717411303424, 8\) .*, expected sizes"):
        load_encoder(huge)


@each("wrong", ["", 3, ["a", "b", "c"], []], ids=str)
def test_inputs_that_are_none(tmp_path: Path, wrong):
    with pytest.raises(QwenMLXError, match="an input "):
        score(load_encoder(classifier(tmp_path / "m")), [wrong])
