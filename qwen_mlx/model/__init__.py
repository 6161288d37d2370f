"""Qwen2: its configuration, its equations, its caches and its fused decoding step."""
