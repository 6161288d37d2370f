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


# Errors of sentence-transformers' float32 vectors, against its own with every step in float64: the noise floor. Ours
# are 1.1e-6, 3.2e-7 and 1.1e-7.
FLOORS = {"last": 1.6e-6, "mean, projection": 7.9e-7, "max, normalised": 2.2e-7}


@pytest.mark.parametrize("kinds", FLOORS)
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
    np.testing.assert_allclose(embed(encoder, TEXTS), theirs.encode(TEXTS), rtol=0, atol=4 * FLOORS[kinds])
    queries = embed(encoder, TEXTS, prompt="query", normalize=True, dimensions=8)
    their_queries = theirs.encode(TEXTS, prompt_name="query", truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(queries, their_queries, rtol=0, atol=4 * FLOORS[kinds])


def test_scores_of_pairs(tmp_path: Path):
    folder = without_template(classifier(tmp_path / "m", 1, pad_token_id=260))
    theirs = sentence_transformers.CrossEncoder(str(folder), device="cpu", activation_fn=torch.nn.Identity())
    pairs = [("hello", text) for text in TEXTS]
    # Scores of up to 13.7, whose spacing in float32 is 9.5e-7; they differ by 8 of these.
    np.testing.assert_allclose(score(load_encoder(folder), pairs)[:, 0], theirs.predict(pairs), rtol=0, atol=1.6e-5)
