"""Vectors and scores of texts: models with an embedding, a classification or a reward head."""
