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

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from benchmarks.parallel import SHAPES, config_of, table
from qwen_mlx import convert
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.parallel.shards import Shard, rank_bytes
from reference.small_models import RandomModel, save_folder, write_gguf
from tests.helpers import parallel_worker
from tests.helpers.cases import each

ROOT = Path(__file__).parents[2]
# mlx.launch waits until it can read from a rank or write to it, which it always can: a core for nothing.
LAUNCHER = """
import select
from mlx._distributed_utils import launch
launch.select = lambda read, write, _, seconds: (select.select(read, [], [], min(seconds, 0.02))[0], write, [])
launch.main()
"""
linux = pytest.mark.linux  # finds the ranks' process ids in /proc
pytestmark = pytest.mark.heavy  # each test starts processes


class Launch:
    """`n` ranks of a command."""

    def __init__(self, n: int, *command: str | Path):
        os.environ.setdefault("PYTHONPATH", str(ROOT))
        self._stdin, self.write = os.pipe()  # never closed: the launcher spins at the end of its input
        port = next(port for port in iter(lambda: random.randrange(20000, 32000), None) if _free(port, n))
        arguments = [
            sys.executable,
            "-c",
            LAUNCHER,
            "-n",
            str(n),
            "--starting-port",
            str(port),
            "--backend",
            "ring",
            "--",
        ]
        self.process = subprocess.Popen(
            list(map(str, [*arguments, sys.executable, *command])),
            stdin=self._stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def finish(self, seconds: float = 300) -> tuple[int, str, str]:
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
    code, out, err = Launch(n, "-m", "tests.helpers.parallel_worker", tmp_path / "jobs.json", tmp_path).finish()
    files = [tmp_path / f"{rank}.json" for rank in range(n)]
    assert all(file.exists() for file in files), (code, out, err)
    return [json.loads(file.read_text()) for file in files]


SIZES = {size: config_of(size) for size in SHAPES}
RATIOS = [(28, 4), (12, 2), (16, 2), (40, 8), (4, 4), (4, 1)]  # queries to keys: all of Qwen2.5's, and the extremes


def add_mlp_biases(writer, tensors) -> None:
    rng = np.random.default_rng(1)
    for name in [
        name for name in tensors if ".ffn_" in name and name.endswith(("gate.weight", "up.weight", "down.weight"))
    ]:
        bias = rng.standard_normal(tensors[name][0].shape[0]).astype(np.float32)
        tensors[name.replace("weight", "bias")] = (bias, T.F32)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> list[dict]:
    """Small random models: dense ones of every head ratio, and packed ones."""
    folder = tmp_path_factory.mktemp("models")
    made = []
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 160}
    for heads, kv in RATIOS:
        tied = heads == 12
        model = RandomModel(
            heads, num_attention_heads=heads, num_key_value_heads=kv, head_dim=8, tie_word_embeddings=tied, **small
        )
        path = save_folder(folder / f"{heads}to{kv}", model)
        made.append({"name": f"{heads} heads, {kv} keys", "model": str(path)})
    made[0]["kinds"] = ["greedy", "sampled", "batch"]
    path = write_gguf(folder / "biases.gguf", RandomModel(5, **small), edit=add_mlp_biases)
    made.append({"name": "MLP biases", "model": str(path)})
    # Two heads of 64 a rank of two: o_proj is cut within Q4_K's and Q6_K's blocks of 256, down_proj between them.
    wide = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 1024}
    for kind in (T.Q4_K, T.Q6_K, T.Q8_0):
        path = write_gguf(
            folder / f"{kind.name}.gguf", RandomModel(3, tie_word_embeddings=kind == T.Q6_K, **wide), kind
        )
        made.append({"name": kind.name, "model": str(path), "quantized": True})
    made[-3]["kinds"] = ["greedy", "step"]
    made.append({"name": "Q4_K dense", "model": str(folder / "Q4_K.gguf"), "quantized": False})
    convert(folder / "Q8_0.gguf", folder / "affine", quantize=4)
    made.append({"name": "4 bits", "model": str(folder / "affine"), "quantized": True})
    return made


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_compute_what_one_process_computes(jobs, n, tmp_path):
    if n == 4:  # on two cores a sum of four ranks takes 50 ms: their waiting threads keep the cores busy
        # Of two key heads each is on two ranks; the packed rows are cut within a block.
        jobs = [job for job in jobs if job["name"] in ("28 heads, 4 keys", "12 heads, 2 keys", "Q4_K", "4 bits")]
        assert len(jobs) == 4
        jobs = [job | {"tokens": 3, "chunk": 16, "kinds": ["greedy"]} for job in jobs]
    ranks = run_jobs(tmp_path, n, jobs)
    for job in jobs:
        kinds = [kind for kind in job.get("kinds", ["greedy"]) if kind in ("greedy", "batch")]
        alone = parallel_worker.run(job | {"kinds": kinds}, None)
        for rank, results in enumerate(ranks):
            found = results[job["name"]]
            assert found.get("greedy") == alone["greedy"], (job["name"], rank, found)
            assert found.get("batch") == alone.get("batch"), (job["name"], rank)
            assert found.get("step", 0) < 2e-5, (job["name"], rank)
            assert found.get("sampled") == ranks[0][job["name"]].get("sampled"), (job["name"], rank)
    if n == 2:
        assert ranks[0][jobs[0]["name"]]["communication"] > 0
        assert "step" in ranks[0]["Q4_K"]


def test_real_model_on_two_ranks(real_gguf, tmp_path):
    """The same six greedy tokens, from ranks that each took at most 1.15 times their share of memory."""
    job = {"name": "real", "model": str(real_gguf), "quantized": False, "tokens": 6, "chunk": 512}
    job["prompt"] = [151644, 872, 198, 7985, 264, 4285, 13027, 729, 13, 151645, 198, 151644, 77091, 198]
    ranks = run_jobs(tmp_path, 2, [job])
    alone = parallel_worker.run(job, None)
    for results in ranks:
        assert results["real"]["greedy"] == alone["greedy"]
        assert 0.45 < results["real"]["bytes"] / alone["bytes"] < 0.55
        assert results["real"]["peak"] < 1.15 * alone["bytes"] / 2


@each(
    ("size", "counts"),
    [("0.5B", "2 or 14"), ("1.5B", "2, 4, 6 or 12"), ("7B", "2, 4 or 28"), ("72B", "2, 4, 8, 16, 32 or 64")],
)
def test_counts_that_do_not_divide_the_heads_are_refused_naming_those_that_do(size, counts):
    config = SIZES[size]
    with pytest.raises(QwenMLXError) as caught:
        Shard(0, 3 if size != "1.5B" else 5, config)
    assert (
        f"{config.num_attention_heads} heads and {config.num_key_value_heads} key/value heads evenly; "
        f"start {counts} ranks" in str(caught.value)
    )


@each("size", SIZES)
def test_ranks_hold_every_part_once_and_their_heads_read_their_keys(size):
    config = SIZES[size]
    shapes = config.parameter_shapes()
    for n in (n for n in range(2, config.num_attention_heads + 1) if config.num_attention_heads % n == 0):
        try:
            shards = [Shard(rank, n, config) for rank in range(n)]
        except QwenMLXError:
            continue
        for name in ("model.embed_tokens.weight", *(name for name in shapes if name.startswith("model.layers.0."))):
            held = [[range(size)[part] for part, size in zip(shard.cut(name), shapes[name])] for shard in shards]
            for axis, whole in enumerate(map(range, shapes[name])):
                parts = [one[axis] for one in held]
                if all(part == whole for part in parts):
                    continue
                joined = [i for part in parts for i in part]
                copies = max(1, n // config.num_key_value_heads) if ".k_proj" in name or ".v_proj" in name else 1
                assert sorted(joined) == sorted([*whole] * copies), name
        group = config.num_attention_heads // config.num_key_value_heads
        for shard in shards:
            heads, kv = shard.heads, shard.kv_heads
            local = shard.local
            for i, head in enumerate(range(heads.start, heads.stop)):
                assert head // group == kv.start + i // (local.num_attention_heads // local.num_key_value_heads)


def test_accounting_is_what_a_rank_holds(jobs, tmp_path):
    """On one rank alone: no group is needed to read a shard."""
    from mlx.utils import tree_flatten

    from qwen_mlx.backend import mx
    from qwen_mlx.loading.checkpoint import open_checkpoint
    from qwen_mlx.loading.load import fill
    from qwen_mlx.model.qwen2 import Qwen2

    checkpoint = open_checkpoint(Path(next(job["model"] for job in jobs if job["name"] == "Q8_0")))
    config = checkpoint.config
    sizes = []
    for rank in range(4):
        shard = Shard(rank, 4, config)
        model = Qwen2(shard.local)
        fill(model, checkpoint.parts(shard.cut), dtype=mx.float32, packed=True)
        sizes.append(sum(array.nbytes for _, array in tree_flatten(model.parameters())))
    scales = 16 if mx.default_device() == mx.cpu else 2 * 32  # a block as it lies has one in float16, MLX's group two
    assert max(sizes) == rank_bytes(config, 4, lambda name: 8 + scales / 32, itemsize=4)


def test_table_of_the_docs_is_the_code_s():
    text = (ROOT / "docs/parallel.md").read_text()
    assert table() == text.partition("<!-- table -->\n")[2].partition("<!-- end -->")[0]


def command(jobs: list[dict], *more: str) -> list[str]:
    """A generation that goes on for long."""
    return ["-m", "qwen_mlx.generate", "--model", jobs[0]["model"], "--prompt", "hello", "--temp", "0", *more]


def test_command_line_prints_once_and_the_end_is_quiet(jobs):
    code, out, err = Launch(2, *command(jobs, "--max-tokens", "5")).finish()
    alone = subprocess.run(
        [sys.executable, *command(jobs, "--max-tokens", "5")], capture_output=True, text=True, check=True
    )
    assert (code, out) == (0, alone.stdout)
    # A busy machine takes so long that the command says what it waits for.
    lines = [line for line in err.splitlines() if not line.startswith(("Loading ", "Compiling "))]
    said = re.fullmatch(r"prompt: .* tok/s; communication: (\d+)% of the time; .*", "\n".join(lines))
    assert said, err
    assert 0 < int(said[1]) <= 100


@linux
@pytest.mark.parametrize(
    ("rank", "how"),
    [
        (0, signal.SIGKILL),
        (1, signal.SIGSTOP),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_all_and_is_named(jobs, rank, how):
    launch = Launch(2, *command(jobs, "--max-tokens", "500"))
    assert launch.process.stdout.read(1)  # it generates
    ranks = launch.ranks()
    os.kill(ranks[rank], how)
    _, _, err = launch.finish()
    said = re.findall(r"error:.*?; all ranks end\.", err)  # MLX's own lines may follow without a newline between
    verb = "has died" if how == signal.SIGKILL else "has not answered for 6 s"
    name = f"rank {rank} of 2 (process {ranks[rank]} on {socket.gethostname()})"
    assert said == [f"error: {name} {verb}; all ranks end."], err
    assert err.count("error:") == 1, err
    for pid in ranks.values():  # no orphan
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@linux
def test_ranks_that_are_all_stopped_go_on(jobs):
    """Ctrl-Z and fg: nobody takes it for a death."""
    launch = Launch(2, *command(jobs, "--max-tokens", "20"))
    assert launch.process.stdout.read(1)
    ranks = launch.ranks()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in ranks.values():
            os.kill(pid, number)
        time.sleep(8 if number == signal.SIGSTOP else 0)
    _, _, err = launch.finish()
    assert "error:" not in err
    assert "generation: 20 tokens" in err


@linux
def test_ctrl_c_ends_all_ranks(jobs):
    launch = Launch(2, *command(jobs, "--max-tokens", "500"))
    assert launch.process.stdout.read(1)
    ranks = launch.ranks()
    os.killpg(launch.process.pid, signal.SIGINT)
    _, _, err = launch.finish()
    assert "error:" not in err
    assert "rank 0 exited with code 130" in err
    for pid in ranks.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_refusals_come_from_rank_0_alone(jobs, tmp_path):
    """Each before any weights are read: too many ranks, an argument, files that differ."""
    _, out, err = Launch(2, *command(jobs[:1], "--temp", "-1")).finish()
    assert out == ""
    assert err.count("error:") == 1
    assert "--temp is -1.0" in err
    three = {"name": "three", "model": jobs[0]["model"]}
    for results in run_jobs(tmp_path, 3, [three]):
        assert "3 ranks cannot share this model's 28 heads and 4 key/value heads" in results["three"]["error"]


def test_files_that_differ_are_refused_by_digest(jobs, tmp_path):
    """Rank 1 sees another file under the same name, as on another machine."""
    name = Path("model.gguf")
    source = Path(next(job["model"] for job in jobs if job["name"] == "Q8_0"))
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        data = bytearray(source.read_bytes())
        data[-1] ^= rank
        (tmp_path / str(rank) / name).write_bytes(data)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom qwen_mlx.cli import command as cli\nfrom qwen_mlx.cli.generate import main\n"
        f"os.chdir(os.path.join({str(tmp_path)!r}, os.environ['MLX_RANK']))\n"
        "cli.run(lambda: main(['--model', 'model.gguf', '--prompt', 'hi']))\n"
    )
    _, out, err = Launch(2, script).finish()
    assert out == ""
    assert err.count("error:") == 1
    assert re.search("error: Rank 1 differs from rank 0 in the model's files at .*: [0-9a-f]{64} instead of", err), err


def test_an_error_of_one_rank_is_told_by_rank_0(jobs, tmp_path):
    """Rank 1's machine lacks the file."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom qwen_mlx.cli import command as cli\nfrom qwen_mlx.cli.generate import main\n"
        f"model = {jobs[0]['model']!r} if os.environ['MLX_RANK'] == '0' else './no-such.gguf'\n"
        "cli.run(lambda: main(['--model', model, '--prompt', 'hi']))\n"
    )
    _, _, err = Launch(2, script).finish()
    assert err.count("error:") == 1
    assert re.search(r"error: rank 1 of 2 \(process \d+ on .*\): .*no-such.gguf", err), err


def test_chat_reads_on_rank_0(jobs, tmp_path):
    """A conversation with tools of its own commands: the same text as alone, saved once."""
    lines = f"hello\n/save {tmp_path}/one.json\nhell\n/retry\n/load {tmp_path}/one.json\nhello\n/exit\n"
    arguments = ["-m", "qwen_mlx.chat", "--model", jobs[0]["model"], "--temp", "0", "--max-tokens", "5"]
    launch = Launch(2, *arguments)
    os.write(launch.write, lines.encode())
    _, out, err = launch.finish()
    alone = subprocess.run([sys.executable, *arguments], input=lines, capture_output=True, text=True, check=True)
    assert out == alone.stdout
    assert "error:" not in err
    assert err.count("messages in") == 1
    assert re.search(r"5 written, .* tok/s, \d+% of the time in communication", err)
