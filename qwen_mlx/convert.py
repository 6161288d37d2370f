"""The door of `python -m qwen_mlx.convert`; the command is cli/convert.py."""

if __name__ == "__main__":
    from .cli.main import run_module

    run_module("convert")
