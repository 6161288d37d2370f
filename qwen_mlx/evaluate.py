"""The door of `python -m qwen_mlx.evaluate`; the command is cli/evaluate.py."""

from .cli.evaluate import main

if __name__ == "__main__":
    from .cli.command import run

    run(main)
