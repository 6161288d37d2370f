"""Qwen2.5 on MLX."""
