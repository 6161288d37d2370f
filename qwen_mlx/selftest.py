"""The door of `python -m qwen_mlx.selftest`; the command is cli/selftest.py."""

if __name__ == "__main__":
    from .cli.main import run_module

    run_module("selftest")
