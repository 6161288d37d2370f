"""The door of `python -m qwen_mlx.evaluate`; the command is cli/evaluate.py."""

if __name__ == "__main__":
    from .cli.main import run_module

    run_module("evaluate")
