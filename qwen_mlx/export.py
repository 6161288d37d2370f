"""The door of `python -m qwen_mlx.export`; the command is cli/export.py."""

from .cli.main import run_module

run_module("export", __name__)
