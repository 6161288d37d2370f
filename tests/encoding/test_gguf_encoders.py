"""Embedding models and rerankers as GGUF: the pooling, the direction and the head that the file has."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from qwen_mlx import GGUFError, QwenMLXError, convert, embed, load, load_encoder, score
from qwen_mlx.backend import mx
from reference.small_models import END_OF_TEXT, IM_END, RandomModel, save_folder, write_gguf
from tests.helpers.cases import each
from tests.helpers.encoders import TEXTS, classifier

T = gguf.GGMLQuantizationType
HEAD = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)  # the head of helpers.encoders.classifier


def gguf_of(path: Path, tensors: dict | None = None, tied: bool = True, **fields) -> Path:
    """A small model's GGUF with more tensors and `qwen2.` fields."""

    def edit(writer: gguf.GGUFWriter, own: dict) -> None:
        own |= tensors or {}
        for name, value in fields.items():
            key = f"qwen2.{name.replace('__', '.')}"
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
            add[type(value)](key, value)

    return write_gguf(path, RandomModel(tie_word_embeddings=tied), edit=edit)


def same_folder(path: Path, **config) -> Path:
    return save_folder(path, RandomModel(tie_word_embeddings=True, **config))


@each(("kind", "pooling"), [(0, "last"), (1, "mean"), (2, "first"), (3, "last")])
def test_the_pooling_is_the_file_s(tmp_path: Path, kind: int, pooling: str):
    expected = embed(load_encoder(same_folder(tmp_path / "m")), TEXTS, pooling=pooling)
    vectors = embed(load_encoder(gguf_of(tmp_path / "m.gguf", pooling_type=kind)), TEXTS)
    np.testing.assert_array_equal(vectors, expected)  # the same weights, so the same sums


def test_a_file_whose_attention_is_not_causal_sees_what_comes_later(tmp_path: Path):
    path = gguf_of(tmp_path / "m.gguf", attention__causal=False, pooling_type=1)
    expected = embed(load_encoder(same_folder(tmp_path / "m", is_causal=False)), TEXTS, pooling="mean")
    np.testing.assert_array_equal(embed(load_encoder(path), TEXTS), expected)
    causal = embed(load_encoder(same_folder(tmp_path / "causal")), TEXTS, pooling="mean")
    assert np.abs(causal - expected).max() > 0.01


def test_the_end_token_that_the_file_asks_for_is_added_once(tmp_path: Path):
    def edit(writer: gguf.GGUFWriter, own: dict) -> None:
        writer.add_add_eos_token(True)

    encoder = load_encoder(write_gguf(tmp_path / "m.gguf", RandomModel(), edit=edit))
    assert encoder.token_ids("hello")[-1] == IM_END
    assert encoder.token_ids("hello<|im_end|>").count(IM_END) == 1


@pytest.mark.parametrize("end", [True, False])
def test_a_pair_is_what_llama_cpp_s_server_makes_of_it(tmp_path: Path, end: bool):
    """format_prompt_rerank: query, end, separator, document, end; or the template with both put in."""

    def read(name: str, template: str | None = None, **fields):
        def edit(writer: gguf.GGUFWriter, own: dict) -> None:
            writer.add_add_eos_token(end)
            for key, value in fields.items():
                getattr(writer, f"add_{key}")(value)
            if template is not None:
                writer.add_chat_template([{"name": "rerank", "template": template}])

        return load_encoder(write_gguf(tmp_path / name, RandomModel(), edit=edit))

    plain, ends = read("plain.gguf"), [IM_END] if end else []
    query, document = (plain.tokenizer.encode(text) for text in ("hel", "lo"))
    assert plain.token_ids(["hel", "lo"]) == [*query, *ends, *document, *ends]
    separated = read("sep.gguf", add_sep_token=True, sep_token_id=END_OF_TEXT)
    assert separated.token_ids(["hel", "lo"]) == [*query, *ends, END_OF_TEXT, *document, *ends]
    filled = read("t.gguf", "<|im_start|>Q: {query} D: {document}<|im_end|>")
    expected = plain.tokenizer.encode("<|im_start|>Q: {document} D: lo<|im_end|>", allow_special=True)
    assert filled.token_ids(["{document}", "lo"]) == expected
    with pytest.raises(GGUFError, match=r"'tokenizer.ggml.seperator_token_id' is 9999, expected 0 to 262"):
        read("bad.gguf", add_sep_token=True, sep_token_id=9999)


@pytest.mark.parametrize("kind", [T.F32, T.Q8_0], ids=["float32", "q8_0"])
def test_a_classification_head_gives_the_folder_s_scores(tmp_path: Path, kind: T):
    head = HEAD if kind == T.F32 else gguf.quants.quantize(HEAD, kind)
    values = HEAD if kind == T.F32 else gguf.quants.dequantize(head, kind)
    labels = ["bad", "good", "best"]
    path = gguf_of(
        tmp_path / "m.gguf",
        {"cls.output.weight": (head, kind)},
        tied=False,
        pooling_type=4,
        classifier__output_labels=labels,
    )
    encoder = load_encoder(path)
    assert encoder.settings.labels == tuple(labels)
    expected = score(load_encoder(classifier(tmp_path / "c", head=values)), TEXTS)
    np.testing.assert_array_equal(score(encoder, TEXTS), expected)  # of the values that gguf-py reads


READ = {"load": load, "convert": lambda path: convert(path, path.parent / "out")}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_what_generates_no_text_says_what_it_is(tmp_path: Path, read):
    with pytest.raises(QwenMLXError, match=r"no language head, .*qwen-mlx embed"):
        read(gguf_of(tmp_path / "e.gguf", pooling_type=3))
    with pytest.raises(QwenMLXError, match=r"no language head, .*qwen-mlx score"):
        read(gguf_of(tmp_path / "c.gguf", {"cls.output.weight": (HEAD, T.F32)}, pooling_type=4))
    with pytest.raises(QwenMLXError, match=r"reads each token with those after it, .*qwen-mlx embed"):
        read(gguf_of(tmp_path / "b.gguf", attention__causal=False))
    assert not (tmp_path / "out").exists()


def test_a_file_with_both_heads_says_which_is_left_out(tmp_path: Path, capsys):
    path = gguf_of(tmp_path / "m.gguf", {"cls.output.weight": (HEAD, T.F32)}, tied=False)
    plain = gguf_of(tmp_path / "plain.gguf", tied=False)
    ids = mx.array([[1, 2, 3]])
    np.testing.assert_array_equal(np.array(load(path)[0](ids)), np.array(load(plain)[0](ids)))
    scores = score(load_encoder(path), TEXTS)
    np.testing.assert_array_equal(scores, score(load_encoder(classifier(tmp_path / "c", head=HEAD)), TEXTS))
    assert capsys.readouterr().err.count("texts come from 'output.weight', scores from 'cls.output.weight'") == 2
    with pytest.raises(QwenMLXError, match=r"qwen-mlx score"):
        load(gguf_of(tmp_path / "r.gguf", {"cls.output.weight": (HEAD, T.F32)}, tied=False, pooling_type=4))


def test_a_language_model_that_also_embeds_generates(tmp_path: Path):
    path = gguf_of(tmp_path / "m.gguf", tied=False, pooling_type=3)
    assert load(path)[0].config.vocab_size == len(load_encoder(path).tokenizer.names)


DAMAGE = {
    "a pooling": ({}, {"pooling_type": 9}, r"'qwen2.pooling_type' is 9, expected 0 \(last\), 1 \(mean\)"),
    "a pooling's type": ({}, {"pooling_type": "mean"}, r"'qwen2.pooling_type' is 'mean', expected"),
    "a direction": ({}, {"attention__causal": 2}, r"is_causal is 2, expected true or false"),
    "labels": ({}, {"classifier__output_labels": [1, 2]}, r"output_labels' is \[1, 2\], expected a list of texts"),
    "a head's shape": ({"cls.output.weight": (HEAD[:, :63], T.F32)}, {}, r"'score' has shape \(3, 63\), expected"),
    "a bias alone": ({"cls.output.bias": (HEAD[0, :3], T.F32)}, {}, r"'score' has shape None, expected"),
    "two layers": ({"cls.weight": (HEAD, T.F32)}, {}, r"'cls.weight' is of a classification head of several layers"),
    "integers": ({"cls.output.weight": (np.ones((3, 64), np.int8), T.I8)}, {}, r"type I8, which holds no weights"),
}


@each("case", DAMAGE)
def test_damage_is_one_sentence(tmp_path: Path, case: str):
    tensors, fields, message = DAMAGE[case]
    with pytest.raises(QwenMLXError, match=message) as caught:
        load_encoder(gguf_of(tmp_path / "m.gguf", tensors, **fields))
    assert isinstance(caught.value, GGUFError) or "shape" in message
    assert str(tmp_path / "m.gguf") in str(caught.value)
