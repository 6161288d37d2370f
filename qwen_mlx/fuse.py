"""The door of `python -m qwen_mlx.fuse`; the command is cli/fuse.py."""

if __name__ == "__main__":
    from .cli.main import run_module

    run_module("fuse")
