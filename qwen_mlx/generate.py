"""The door of `python -m qwen_mlx.generate`; the command is cli/generate.py."""

if __name__ == "__main__":
    from .cli.main import run_module

    run_module("generate")
