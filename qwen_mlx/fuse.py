"""The door of `python -m qwen_mlx.fuse`; the command is cli/fuse.py."""

from .cli.main import run_module

run_module("fuse", __name__)
