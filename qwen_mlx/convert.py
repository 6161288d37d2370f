"""The door of `python -m qwen_mlx.convert`; the command is cli/convert.py."""

from .cli.convert import main

if __name__ == "__main__":
    from .cli.command import run

    run(main)
