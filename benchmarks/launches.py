"""`python -m benchmarks.launches`: primitives that MLX evaluates for a decoded token, ours and mlx-lm's. Needs no GPU.

Both graphs are built as on an Apple GPU, of small models with random weights, and counted in MLX's own export of them.
A kernel's call is one primitive, and so is each of MLX's fused operations (on a CPU MLX would take them apart); views,
which launch nothing but cost the CPU time as well, are counted apart.
"""

from __future__ import annotations

import collections
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.arguments import Parser, require_module
from qwen_mlx import ModelConfig, Qwen2, ops
from qwen_mlx.backend import mx
from qwen_mlx.cli import command as cli
from qwen_mlx.model.fused import FusedModel

Counts = collections.Counter[str]
VIEWS = {"Transpose", "Reshape", "Flatten", "Unflatten", "Broadcast", "Slice", "ExpandDims", "Squeeze", "Split"}


def primitives(outputs: Callable[[], list[mx.array]]) -> Counts:
    """Names and numbers of the primitives that make `outputs`."""
    found: Counts = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:

        def traced(x: mx.array) -> mx.array:
            path = Path(folder) / "graph.dot"
            mx.export_to_dot(str(path), *outputs())
            found.update(re.findall(r'\[label ="(\w+)", shape=rectangle\]', path.read_text()))
            return x + 1

        # While a function is exported, Metal kernels can be called where they cannot run.
        with fused_operations():
            mx.export_function(str(Path(folder) / "function"), traced, mx.array(0))
    return found


@contextmanager
def fused_operations() -> Iterator[None]:
    """Within it each of MLX's fused operations that mlx-lm uses is one primitive, as on a GPU."""

    def stand_in(n_arrays: int) -> Callable[..., mx.array]:
        names = [f"x{i}" for i in range(n_arrays)]
        kernel = mx.fast.metal_kernel(name="fused", input_names=names, output_names=["y"], source="y[0] = x0[0];")

        def fused(*arrays: mx.array, **_: object) -> mx.array:
            x = arrays[0]
            sizes = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [x.shape]}
            return kernel(inputs=list(arrays[:n_arrays]), output_dtypes=[x.dtype], **sizes)[0]

        return fused

    stands_in = {"rms_norm": stand_in(2), "rope": stand_in(1), "scaled_dot_product_attention": stand_in(3)}
    before = {name: getattr(mx.fast, name) for name in stands_in}
    try:
        for name, function in stands_in.items():
            setattr(mx.fast, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(mx.fast, name, function)


def config_of(n_layers: int) -> ModelConfig:
    return ModelConfig(256, 512, n_layers, 4, 2, 64, 512, 1e-6, 1e6, 1024, True)


def ours(n_layers: int) -> Counts:
    """Counts the primitives of a decoding step."""
    model = Qwen2(config_of(n_layers))
    cache = model.make_cache()
    fused = FusedModel.of(model)
    fused(mx.array([[1, 2]]), cache)
    mx.eval(model.parameters(), [layer.recent()[:2] for layer in cache])
    with ops.forced("metal"):
        return primitives(lambda: [fused(mx.array([[3]]), cache), *(layer.recent()[1] for layer in cache)])


def theirs(n_layers: int) -> Counts:
    """Counts those of mlx-lm's model on its own cache."""
    from mlx_lm.models import cache as caches
    from mlx_lm.models import qwen2

    model = qwen2.Model(qwen2.ModelArgs.from_dict(config_of(n_layers).to_hf()))
    cache = caches.make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2]]), cache=cache), [layer.state for layer in cache])
    return primitives(
        lambda: [
            model(mx.array([[3]]), cache=cache),
            *(array for layer in cache for array in (layer.keys, layer.values)),
        ]
    )


def per_layer(count: Callable[[int], Counts]) -> Counts:
    """Counts what one more layer adds."""
    return count(4) - count(3)


def main() -> None:
    """Prints both counts."""
    Parser("launches", __doc__).parse_args()
    require_module("mlx_lm", "pip install -e '.[bench]'")
    for name, count in (("qwen_mlx", ours), ("mlx-lm", theirs)):
        layer = per_layer(count)
        views = sum(layer[view] for view in VIEWS)
        print(f"{name}: {layer.total() - views} and {views} views a layer")
        print(f"  {json.dumps(dict(layer.most_common()))}")


if __name__ == "__main__":
    cli.run(main)
