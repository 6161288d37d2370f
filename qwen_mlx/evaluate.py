"""The door of `python -m qwen_mlx.evaluate`; the command is cli/evaluate.py."""

from .cli.main import run_module

run_module("evaluate", __name__)
