"""Runs the commands below for real and draws what they wrote: `python docs/pictures/terminal.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = [
    ["-m", "qwen_mlx.generate", "--prompt", "Write a Python function that reverses a string.", "--max-tokens", "100"],
    ["-m", "qwen_mlx.generate", "--prompt", "Hi", "--top-p", "0"],
]


def main() -> None:
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    for command in COMMANDS:
        shown = " ".join(f'"{word}"' if " " in word else word for word in command)
        console.print(Text(f"$ python {shown}", style="bold green"))
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        console.print(Text(done.stdout.rstrip()))
        console.print(Text(done.stderr.strip() + "\n", style="dim"))
    Path(__file__).with_suffix(".svg").write_text(console.export_svg(title="qwen_mlx", clear=False))


if __name__ == "__main__":
    main()
