"""The memory of an Apple GPU: what a model needs of it, and that macOS leaves the model there."""

from __future__ import annotations

import sys

from ..backend import mx

MOST = 0.9  # of what macOS recommends as a GPU's working set: mlx-lm warns from there on, too


def prepare(nbytes: int) -> None:
    """Lets MLX keep everything that it holds wired, up to macOS's own limit, and says on standard error where a model
    of so many bytes hardly fits. Elsewhere than on Metal there is nothing to do.

    Without it macOS may compress or evict the weights of a large model between tokens. macOS 14 ignores the limit.
    """
    if mx.default_device() == mx.cpu or not mx.metal.is_available():
        return
    limit = int(mx.device_info().get("max_recommended_working_set_size", 0))
    if not limit:
        return
    if nbytes > MOST * limit:
        print(
            f"qwen_mlx: the model has {nbytes / 1e9:.1f} GB and macOS recommends at most {limit / 1e9:.1f} GB for the "
            "GPU of this machine, so that it will be slow; take a smaller one, or one in fewer bits.",
            file=sys.stderr,
        )
    mx.set_wired_limit(limit)
