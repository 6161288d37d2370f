"""Records this package's model on a run, for the comparison with Hugging Face's."""

from __future__ import annotations

from typing import Any

from qwen_mlx.backend import mx
from qwen_mlx.model.activations import Sink, recording
from qwen_mlx.model.batch_cache import BatchKVCache, Padding
from qwen_mlx.model.fused import FusedModel
from qwen_mlx.model.qwen2 import Qwen2

from .taps import Run


def record(model: Qwen2, run: Run, sink: Sink) -> None:
    """Runs the model on `run` and hands every tap to `sink`, positions on axis 1.

    Logits and caches are those of a second run, of the fused form that generation uses: it has no taps inside, and is
    compared too.
    """
    watched, unwatched = _cache(model, run), _cache(model, run)
    for call, ids in enumerate(run.calls()):
        with recording(model, lambda name, array, call=call: sink(f"{call}.{name}", array)):
            model(mx.array(ids), watched)
        sink(f"{call}.logits", FusedModel.of(model)(mx.array(ids), unwatched, 0))
        for i, layer in enumerate(unwatched):
            for tap, array in zip(("cache_k", "cache_v"), layer.state):
                sink(f"{call}.layers.{i}.{tap}", array.swapaxes(1, 2))


def _cache(model: Qwen2, run: Run) -> list[Any]:
    if run.padding is None:
        return model.make_cache()
    padding = Padding(run.padding)
    return [BatchKVCache(padding) for _ in model.model.layers]
