"""The door of `python -m qwen_mlx.convert`; the command is cli/convert.py."""

from .cli.main import run_module

run_module("convert", __name__)
