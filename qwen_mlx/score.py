"""The door of `python -m qwen_mlx.score`; the command is cli/score.py."""

from .cli.main import run_module

run_module("score", __name__)
