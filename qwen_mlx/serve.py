"""The door of `python -m qwen_mlx.serve`; the command is cli/serve.py."""

from .cli.main import run_module

run_module("serve", __name__)
