"""Perplexity of a model, and its divergence from a reference."""
