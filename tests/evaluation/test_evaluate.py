"""Perplexity and divergence: the same numbers as an independent computation with transformers in torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from qwen_mlx import QwenMLXError, load
from qwen_mlx.cli.evaluate import main
from qwen_mlx.evaluation.perplexity import evaluate, exponential, mean, windows
from reference.lazy import torch
from reference.small_models import END_OF_TEXT, TOKENS, RandomModel, hf_model, write_gguf
from tests.helpers.cases import each

TEXT = "hello world, hello hell; the llama says hello to all of the world. " * 6


def by_transformers(model, ids: list[int], context: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-ln p of every token but the first, and ln p of all tokens there, in float64: Hugging Face's recipe of labels
    that are -100 where a window before has scored them."""
    losses, laws, scored = [], [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = torch.tensor([ids[begin:end]])
        labels = window.clone()
        labels[0, : scored - begin] = -100
        with torch.no_grad():
            logits = model(window).logits[:, :-1].double()
        keep = labels[0, 1:] != -100
        law = torch.log_softmax(logits[0][keep], -1)
        laws.append(law)
        losses.append(-law.gather(1, labels[0, 1:][keep][:, None])[:, 0])
        scored = end
        if end == len(ids):
            break
    return torch.cat(losses), torch.cat(laws)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    """A model and the one it came from, in files and in transformers."""
    folder = tmp_path_factory.mktemp("evaluate")
    models = {name: hf_model(max_position_embeddings=256) for name in ("original", "small")}
    with torch.no_grad():
        for parameter in models["small"].parameters():  # about what 4 bits do
            parameter *= 1 + 0.15 * torch.randn_like(parameter)
    return models, {name: write_gguf(folder / f"{name}.gguf", model) for name, model in models.items()}


@each(("context", "stride", "chunk"), [(64, 32, 23), (64, 63, 23), (16, 1, 512), (200, 7, 23), (256, 128, 512)])
def test_perplexity_and_divergence_equal_transformers(pair, context: int, stride: int, chunk: int):
    theirs, files = pair
    (model, tokenizer), (reference, _) = load(files["small"]), load(files["original"])
    ids = tokenizer.encode(TEXT)[:230]
    losses, laws = by_transformers(theirs["small"], ids, context, stride)
    reference_losses, reference_laws = by_transformers(theirs["original"], ids, context, stride)
    assert len(losses) == len(ids) - 1  # every token but the first, once
    kl = (reference_laws.exp() * (reference_laws - laws)).sum(-1)
    same = (reference_laws.argmax(-1) == laws.argmax(-1)).double()
    assert 0 < same.mean() < 1

    seen = []
    arguments = {"context": context, "stride": stride, "prefill_step_size": chunk}
    found = evaluate(model, ids, reference=reference, progress=lambda *at: seen.append(at), **arguments)
    assert (found.tokens, found.scored) == (230, 229)
    assert seen[-1] == (229, 229)
    nll, error = mean_and_error(losses)
    for estimate, expected in (
        (found.nll, (nll, error)),
        (found.perplexity, (math.exp(nll), math.exp(nll) * error)),
        (found.divergence.reference_perplexity, (math.exp(reference_losses.mean().item()), None)),
        (found.divergence.kl, mean_and_error(kl)),
        (found.divergence.agreement, mean_and_error(same)),
    ):
        assert estimate.value == pytest.approx(expected[0], rel=1e-5)
        if expected[1] is not None:
            assert estimate.error == pytest.approx(expected[1], rel=1e-4)


def test_a_model_is_no_distance_from_itself(pair):
    model, tokenizer = load(pair[1]["small"])
    found = evaluate(model, tokenizer.encode(TEXT)[:100], reference=model, context=64)
    assert (found.divergence.kl.value, found.divergence.agreement.value) == (0, 1)
    assert found.divergence.reference_perplexity == found.perplexity


def test_rows_of_padding_do_not_count(pair, tmp_path: Path):
    """A reference whose embedding has rows beyond the vocabulary, as the larger models of a family have."""
    theirs, files = pair
    padded = hf_model(max_position_embeddings=256)
    padded.resize_token_embeddings(theirs["original"].config.vocab_size + 9)

    def pad(writer, tensors) -> None:
        for key, rest in (("tokens", [f"[PAD{i}]" for i in range(9)]), ("token_type", [5] * 9)):
            entry = writer.kv_data[0][f"tokenizer.ggml.{key}"]
            entry.value = [*entry.value, *rest]

    reference, tokenizer = load(write_gguf(tmp_path / "padded.gguf", padded, edit=pad))
    model, _ = load(files["small"])
    ids = tokenizer.encode(TEXT)[:60]
    found = evaluate(model, ids, reference=reference, context=64)
    _, laws = by_transformers(theirs["small"], ids, 64, 32)
    _, wide = by_transformers(padded, ids, 64, 32)
    cut = torch.log_softmax(wide[:, : laws.shape[1]], -1)
    assert found.divergence.kl.value == pytest.approx((cut.exp() * (cut - laws)).sum(-1).mean().item(), rel=1e-5)
    assert main(["--model", str(files["small"]), "--reference", str(tmp_path / "padded.gguf"), "--text", __file__]) == 0


def test_windows_score_every_token_but_the_first_once():
    for n, context, stride in ((2, 2, 1), (7, 3, 2), (100, 10, 9), (100, 10, 1), (64, 64, 32), (65, 64, 32)):
        scored = []
        for start, end, first in windows(n, context, stride):
            assert start < first
            assert end - start <= context
            assert first - start >= min(context - stride, first)
            scored += range(first, end)
        assert scored == list(range(1, n))


def test_a_mean_and_its_exponential_have_their_standard_errors():
    values = np.random.default_rng(0).normal(5, 1, 1000)
    found = mean(values)
    assert found.value == pytest.approx(values.sum() / 1000, rel=1e-14)
    assert found.error == pytest.approx(math.sqrt(((values - found.value) ** 2).sum() / 999 / 1000), rel=1e-9)
    assert exponential(found).value == pytest.approx(math.exp(found.value))
    assert exponential(found).error == pytest.approx(math.exp(found.value) * found.error)
    assert math.isnan(mean(values[:1]).error)
    assert exponential(mean(values + 1000)).value == math.inf


def test_command_line_writes_the_same_numbers(pair, tmp_path: Path, capfd):
    theirs, files = pair
    text, report = tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text(TEXT)
    models = ["--model", str(files["small"]), "--reference", str(files["original"])]
    assert main([*models, "--text", str(text), "--context", "64", "--tokens", "150", "--json", str(report)]) == 0
    out, err = capfd.readouterr()
    found = json.loads(report.read_text())
    ids = load(files["small"])[1].encode(TEXT)[:150]
    losses, _ = by_transformers(theirs["small"], ids, 64, 32)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(losses.mean().item()), rel=1e-5)
    assert (found["tokens"], found["scored"], found["context"], found["stride"]) == (150, 149, 64, 32)
    assert f"perplexity: {found['perplexity']['value']:.0f}" in out
    assert "150 tokens, 149 scored; windows of 64 every 32" in out
    assert "KL divergence from the reference: 0." in out
    assert err == ""


def test_a_bos_that_the_file_asks_for_comes_first(pair, tmp_path: Path, capfd):
    """Then the text's own first token is scored too."""
    bos = write_gguf(
        tmp_path / "m.gguf",
        hf_model(max_position_embeddings=256),
        edit=lambda writer, tensors: writer.add_add_bos_token(True),
    )
    (tmp_path / "text.txt").write_text("hello world")
    assert main(["--model", str(bos), "--text", str(tmp_path / "text.txt"), "--json", str(tmp_path / "r.json")]) == 0
    ids = load(bos)[1].encode("hello world")
    losses, _ = by_transformers(pair[0]["original"], [END_OF_TEXT, *ids], 256, 128)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["scored"] == len(ids)
    assert found["nll"]["value"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_mistakes_are_one_sentence(pair, tmp_path: Path):
    files = pair[1]
    text = tmp_path / "text.txt"
    text.write_text("hello world")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff")
    (tmp_path / "one.txt").write_text("a")

    def spoil(writer, tensors) -> None:
        entry = writer.kv_data[0]["tokenizer.ggml.tokens"]
        entry.value = [*TOKENS[:5], TOKENS[6], TOKENS[5], *TOKENS[7:]]

    other = write_gguf(tmp_path / "other.gguf", RandomModel(), edit=spoil)
    model = ["--model", str(files["small"])]
    for arguments, match in (
        (["--text", str(tmp_path / "no.txt")], r"--text .*no\.txt: cannot be read \(No such file"),
        (["--text", str(tmp_path)], "cannot be read"),
        (["--text", str(tmp_path / "empty.txt")], r"empty\.txt: is empty"),
        (["--text", str(tmp_path / "bytes.txt")], r"not valid UTF-8 \(byte 0xff at 2\)"),
        (["--text", str(tmp_path / "one.txt")], "The text has 1 tokens, expected 2 or more"),
        (["--text", str(text), "--context", "1"], "--context is 1, expected 2 tokens or more"),
        (["--text", str(text), "--context", "8", "--stride", "8"], "--stride is 8, expected"),
        (["--text", str(text), "--stride", "0"], "--stride is 0, expected"),
        (["--text", str(text), "--tokens", "1"], "--tokens is 1, expected 2"),
        (["--text", str(text), "--context", "257"], r"small\.gguf has 256: take a smaller one, or extend .*--yarn 4"),
        (["--text", str(text), "--stride", "256"], "stride is 256, expected 1 to 255"),
        (["--text", str(text), "--json", str(tmp_path / "no" / "r.json")], "its folder does not exist"),
        (["--text", str(text), "--json", str(tmp_path)], "is not a regular file"),
        (["--text", str(text), "--reference", str(other)], r"--reference .*other\.gguf has another vocabulary"),
    ):
        with pytest.raises(QwenMLXError, match=match):
            main([*model, *arguments])
    with pytest.raises(SystemExit) as error:
        main(model)
    assert error.value.code == 2
    loaded = load(files["small"])[0]
    with pytest.raises(QwenMLXError, match="holds token id 500"):
        evaluate(loaded, [1, 500])
    loaded.model.norm.weight = loaded.model.norm.weight * math.nan
    with pytest.raises(QwenMLXError, match="not finite"):
        evaluate(loaded, [1, 2, 3])


def test_real_file_equals_transformers_to_four_digits(real_gguf: Path, real_hf):
    model, tokenizer = load(real_gguf)
    text = Path(__file__).read_text()
    ids = tokenizer.encode(text)[:160]
    losses, _ = by_transformers(real_hf, ids, 96, 48)
    found = evaluate(model, ids, context=96)
    nll, error = mean_and_error(losses)
    print(found, math.exp(nll), error)
    assert found.perplexity.value == pytest.approx(math.exp(nll), rel=1e-5)
    assert found.nll.error == pytest.approx(error, rel=1e-4)
