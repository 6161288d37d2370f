"""The door of `python -m qwen_mlx.embed`; the command is cli/embed.py."""

if __name__ == "__main__":
    from .cli.main import run_module

    run_module("embed")
