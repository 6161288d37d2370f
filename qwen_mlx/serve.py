"""The door of `python -m qwen_mlx.serve`; the command is cli/serve.py."""

if __name__ == "__main__":
    from .cli.main import run_module

    run_module("serve")
