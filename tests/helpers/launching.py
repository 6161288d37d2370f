"""A launch in one call."""

from __future__ import annotations

import mlx.core as mx

from reference.emulator import emulate


def run(body: str, inputs: dict, outputs: dict, grid=(1, 1, 1), threadgroup=(1, 1, 1), template=None, **options):
    """One launch. outputs: name to (shape, dtype). Returns one array, or a list of them."""
    names = ("checked", "order", "seed", "contract", "flush", "max_threads")
    settings = {key: options.pop(key) for key in names if key in options}
    init_value = options.pop("init_value", None)
    with emulate(**settings):
        kernel = mx.fast.metal_kernel(
            name="k", input_names=list(inputs), output_names=list(outputs), source=body, **options
        )
        results = kernel(
            inputs=list(inputs.values()),
            template=template,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[shape for shape, _ in outputs.values()],
            output_dtypes=[dtype for _, dtype in outputs.values()],
            init_value=init_value,
        )
    return results[0] if len(results) == 1 else results


I = "uint i = thread_position_in_grid.x; "  # noqa: E741
