"""The door of `python -m qwen_mlx.embed`; the command is cli/embed.py."""

from .cli.main import run_module

run_module("embed", __name__)
