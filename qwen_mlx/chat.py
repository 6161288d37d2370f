"""The door of `python -m qwen_mlx.chat`; the command is cli/chat.py."""

if __name__ == "__main__":
    from .cli.main import run_module

    run_module("chat")
