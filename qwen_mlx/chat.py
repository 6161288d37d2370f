"""The door of `python -m qwen_mlx.chat`; the command is cli/chat.py."""

from .cli.chat import main

if __name__ == "__main__":
    from .cli.command import run

    run(main)
