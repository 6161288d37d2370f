"""Folders that sentence-transformers saved: its own vectors and scores, from its own files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwen_mlx import embed, load_encoder, score
from reference.lazy import sentence_transformers, st_modules, torch
from tests.helpers.encoders import TEXTS, classifier, encoder_folder


def without_template(folder: Path) -> Path:
    """sentence-transformers sends every text of a new model through its chat template, if it has one."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kinds", ["last", "mean, projection", "max, normalised"])
def test_vectors(tmp_path: Path, kinds: str):
    torch.manual_seed(0)
    pooling, _, more = kinds.partition(", ")
    modules = [st_modules.Transformer(str(without_template(encoder_folder(tmp_path / "m"))))]
    modules.append(st_modules.Pooling(64, pooling_mode={"last": "lasttoken"}.get(pooling, pooling)))
    modules += [st_modules.Dense(64, 24)] if more == "projection" else []
    modules += [st_modules.Normalize()] if more == "normalised" else []
    theirs = sentence_transformers.SentenceTransformer(modules=modules, prompts={"query": "Q: "}, device="cpu")
    theirs.max_seq_length = 16
    theirs.save(str(tmp_path / "saved"))
    encoder = load_encoder(tmp_path / "saved")
    assert max(len(encoder.token_ids(text)) for text in TEXTS) == 16
    np.testing.assert_allclose(embed(encoder, TEXTS), theirs.encode(TEXTS), atol=1e-5)
    queries = embed(encoder, TEXTS, prompt="query", normalize=True, dimensions=8)
    their_queries = theirs.encode(TEXTS, prompt_name="query", truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(queries, their_queries, atol=1e-5)


def test_scores_of_pairs(tmp_path: Path):
    folder = without_template(classifier(tmp_path / "m", 1, pad_token_id=260))
    theirs = sentence_transformers.CrossEncoder(str(folder), device="cpu", activation_fn=torch.nn.Identity())
    pairs = [("hello", text) for text in TEXTS]
    np.testing.assert_allclose(score(load_encoder(folder), pairs)[:, 0], theirs.predict(pairs), atol=2e-5)
