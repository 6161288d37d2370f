"""The door of `python -m qwen_mlx.selftest`; the command is cli/selftest.py."""

from .cli.main import run_module

run_module("selftest", __name__)
