"""The door of `python -m qwen_mlx`, which is `qwen-mlx`."""

if __name__ == "__main__":
    from .cli.main import main

    main()
