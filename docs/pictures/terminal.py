"""Runs the commands below for real and draws what they wrote: `python docs/pictures/terminal.py`.

Standard error is left out: its speeds are those of the machine that draws.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:q4_k_m"
# A command, and how many of its last lines are shown.
COMMANDS = [
    (
        [
            "generate",
            "--temp",
            "0",
            "--prompt",
            "Write a Python function that reverses a string. Answer with code only.",
        ],
        None,
    ),
    (["convert", "--check", MODEL], 5),
]
PROGRAM = [sys.executable, "-c", "from qwen_mlx.cli.main import main; main()"]


def main() -> None:
    console = Console(record=True, width=112, file=open(os.devnull, "w"))  # noqa: SIM115
    for command, last_lines in COMMANDS:
        done = subprocess.run([*PROGRAM, *command], capture_output=True, text=True, check=True)
        shown = " ".join(f'"{word}"' if " " in word else shlex.quote(word) for word in command)
        pipe = "" if last_lines is None else f" | tail -{last_lines}"
        console.print(Text(f"$ qwen-mlx {shown}{pipe}", style="bold green"))
        lines = done.stdout.rstrip().splitlines()
        console.print(Text("\n".join(lines if last_lines is None else lines[-last_lines:])))
        if command is not COMMANDS[-1][0]:
            console.print()
    Path(__file__).with_suffix(".svg").write_text(console.export_svg(title="qwen-mlx", clear=False))


if __name__ == "__main__":
    main()
