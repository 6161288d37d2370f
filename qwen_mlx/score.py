"""The door of `python -m qwen_mlx.score`; the command is cli/score.py."""

if __name__ == "__main__":
    from .cli.main import run_module

    run_module("score")
