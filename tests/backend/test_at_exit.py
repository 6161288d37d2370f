"""A daemon thread that generates while the interpreter ends."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, tempfile, threading, time
from pathlib import Path
import qwen_mlx
from reference.small_models import RandomModel, write_gguf

model, tokenizer = qwen_mlx.load(write_gguf(Path(tempfile.mkdtemp()) / "m.gguf", RandomModel()))
tokens = []

def work():
    while True:
        for chunk in qwen_mlx.stream_generate(model, tokenizer, [1, 2, 3], max_tokens=20):
            tokens.append(chunk)

for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
while len(tokens) < int(sys.argv[1]):
    time.sleep(0.001)
"""


@pytest.mark.parametrize("tokens", [1, 9, 30])
def test_the_process_ends_without_a_signal(tokens: int):
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(tokens)], capture_output=True, text=True, timeout=300)
    said = [line for line in run.stderr.splitlines() if not line.startswith("Compiling ")]
    assert (run.returncode, said) == (0, [])
