"""The door of `python -m qwen_mlx.chat`; the command is cli/chat.py."""

from .cli.main import run_module

run_module("chat", __name__)
