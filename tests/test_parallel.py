"""A model on several ranks: processes of this machine, started by mlx.launch and connected by MLX's ring."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T

from qwen_mlx import convert
from qwen_mlx.config import ModelConfig
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.shards import Shard, rank_bytes

from . import parallel_worker
from .small_models import hf_model, save_folder, write_gguf

ROOT = Path(__file__).parents[1]
LAUNCH = Path(sys.executable).with_name("mlx.launch")


class Launch:
    """`n` ranks of a command."""

    def __init__(self, n: int, *command: str | Path):
        os.environ.setdefault("PYTHONPATH", str(ROOT))
        self._stdin, self.write = os.pipe()  # never closed: the launcher spins at the end of its input
        port = next(port for port in iter(lambda: random.randrange(20000, 32000), None) if _free(port, n))
        arguments = [LAUNCH, "-n", str(n), "--starting-port", str(port), "--backend", "ring", "--"]
        self.process = subprocess.Popen(
            list(map(str, [*arguments, sys.executable, *command])),
            stdin=self._stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def finish(self, seconds: float = 120) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=seconds)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            for end in (self._stdin, self.write):
                os.close(end)
        return self.process.returncode, out, err

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that run."""
        found = {}
        for status in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = status.read_bytes().split(b"\0")
                parent = int((status.parent / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            rank = next((entry[9:] for entry in variables if entry.startswith(b"MLX_RANK=")), None)
            if rank is not None and parent == self.process.pid:
                found[int(rank)] = int(status.parent.name)
        return found


def _free(port: int, n: int) -> bool:
    for one in range(port, port + n):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", one)) == 0:
                return False
    return True


def run_jobs(tmp_path: Path, n: int, jobs: list[dict]) -> list[dict]:
    """Every rank's results."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    code, out, err = Launch(n, ROOT / "tests/parallel_worker.py", tmp_path / "jobs.json", tmp_path).finish()
    files = [tmp_path / f"{rank}.json" for rank in range(n)]
    assert all(file.exists() for file in files), (code, out, err)
    return [json.loads(file.read_text()) for file in files]


RATIOS = [(28, 4), (12, 2), (16, 2), (40, 8), (4, 4), (4, 1)]  # queries to keys: all of Qwen2.5's, and the extremes


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> list[dict]:
    """Small random models: dense ones of every head ratio, and packed ones."""
    folder = tmp_path_factory.mktemp("models")
    made = []
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 160}
    for heads, kv in RATIOS:
        tied = heads == 12
        model = hf_model(
            heads, num_attention_heads=heads, num_key_value_heads=kv, head_dim=8, tie_word_embeddings=tied, **small
        )
        path = save_folder(folder / f"{heads}to{kv}", model)
        made.append({"name": f"{heads} heads, {kv} keys", "model": str(path)})
    made[0]["kinds"] = ["greedy", "sampled", "batch"]
    # Two heads of 64 a rank of two: o_proj is cut within Q4_K's and Q6_K's blocks of 256, down_proj between them.
    wide = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 1024}
    for kind in (T.Q4_K, T.Q6_K, T.Q8_0):
        path = write_gguf(folder / f"{kind.name}.gguf", hf_model(3, tie_word_embeddings=kind == T.Q6_K, **wide), kind)
        made.append({"name": kind.name, "model": str(path), "quantized": True})
    made.append({"name": "Q4_K dense", "model": str(folder / "Q4_K.gguf"), "quantized": False})
    convert(folder / "Q8_0.gguf", folder / "affine", quantize=4)
    made.append({"name": "4 bits", "model": str(folder / "affine"), "quantized": True})
    return made


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_compute_what_one_process_computes(jobs, n, tmp_path):
    if n == 4:  # on two cores a sum of four ranks takes 50 ms: their waiting threads keep the cores busy
        jobs = [job | {"tokens": 3, "chunk": 16} for job in jobs]
    ranks = run_jobs(tmp_path, n, jobs)
    for job in jobs:
        alone = parallel_worker.run({**job, "kinds": [k for k in job.get("kinds", ["greedy"]) if k != "sampled"]}, None)
        for rank, results in enumerate(ranks):
            found = results[job["name"]]
            assert found.get("greedy") == alone["greedy"], (job["name"], rank, found)
            assert found.get("batch") == alone.get("batch"), (job["name"], rank)
            assert found.get("sampled") == ranks[0][job["name"]].get("sampled"), (job["name"], rank)
    assert ranks[0][jobs[0]["name"]]["communication"] > 0


def test_real_model_on_two_ranks(real_gguf, tmp_path):
    """The same 16 greedy tokens, from ranks that each took at most 1.15 times their share of memory."""
    job = {"name": "real", "model": str(real_gguf), "quantized": False, "tokens": 16, "chunk": 512}
    job["prompt"] = [151644, 872, 198, 7985, 264, 4285, 13027, 729, 13, 151645, 198, 151644, 77091, 198]
    ranks = run_jobs(tmp_path, 2, [job])
    alone = parallel_worker.run(job, None)
    for results in ranks:
        assert results["real"]["greedy"] == alone["greedy"]
        assert 0.45 < results["real"]["bytes"] / alone["bytes"] < 0.55
        assert results["real"]["peak"] < 1.15 * alone["bytes"] / 2


def command(jobs: list[dict], *more: str) -> list[str]:
    """A generation that goes on for long."""
    return ["-m", "qwen_mlx.generate", "--model", jobs[0]["model"], "--prompt", "hello", "--temp", "0", *more]


def test_command_line_prints_once_and_the_end_is_quiet(jobs):
    code, out, err = Launch(2, *command(jobs, "--max-tokens", "5")).finish()
    alone = subprocess.run(
        [sys.executable, *command(jobs, "--max-tokens", "5")], capture_output=True, text=True, check=True
    )
    assert (code, out) == (0, alone.stdout)
    said = re.fullmatch(r"prompt: .* tok/s; communication: (\d+)% of the time; .*\n", err)
    assert said, err
    assert 0 < int(said[1]) <= 100


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_all_and_is_named(jobs, rank, how):
    launch = Launch(2, *command(jobs, "--max-tokens", "500"))
    assert launch.process.stdout.read(1)  # it generates
    ranks = launch.ranks()
    os.kill(ranks[rank], how)
    start = time.monotonic()
    code, _, err = launch.finish(30)
    assert time.monotonic() - start < 10
    said = [line for line in err.splitlines() if line.startswith("error:")]
    verb = "has died" if how == signal.SIGKILL else "has not answered for 7 s"
    name = f"rank {rank} of 2 (process {ranks[rank]} on {socket.gethostname()})"
    assert said == [f"error: {name} {verb}; all ranks end."], err
    for pid in ranks.values():  # no orphan
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_ctrl_c_ends_all_ranks(jobs):
    launch = Launch(2, *command(jobs, "--max-tokens", "500"))
    assert launch.process.stdout.read(1)
    ranks = launch.ranks()
    os.killpg(launch.process.pid, signal.SIGINT)
    start = time.monotonic()
    _, _, err = launch.finish(30)
    assert time.monotonic() - start < 10
    assert "error:" not in err
    assert "rank 0 exited with code 130" in err
    for pid in ranks.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
