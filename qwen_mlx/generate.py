"""The door of `python -m qwen_mlx.generate`; the command is cli/generate.py."""

from .cli.main import run_module

run_module("generate", __name__)
