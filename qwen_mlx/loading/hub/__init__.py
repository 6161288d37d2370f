"""Models by name: a path, a hub id, or the default model, fetched once into a cache.

It answers `--help` and `--list-models`, so it imports nothing outside the standard library until it must.
"""

from .default import DEFAULT, cache_folder
from .names import CachedModel, cached_models, resolve

__all__ = ["DEFAULT", "CachedModel", "cache_folder", "cached_models", "resolve"]
