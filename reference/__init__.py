"""The reference harness and the emulator."""

import qwen_mlx.backend  # noqa: F401  # before MLX, which then finds a fast BLAS
