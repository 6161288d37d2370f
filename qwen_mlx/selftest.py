"""The door of `python -m qwen_mlx.selftest`; the command is cli/selftest.py."""

from .cli.selftest import main

if __name__ == "__main__":
    from .cli.command import run

    run(main)
