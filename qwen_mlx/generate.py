"""The door of `python -m qwen_mlx.generate`; the command is cli/generate.py."""

from .cli.generate import main

if __name__ == "__main__":
    from .cli.command import run

    run(main)
