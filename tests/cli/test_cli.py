"""`python -m qwen_mlx.generate` as its user sees it: a process, its two streams and its exit code."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from qwen_mlx.cli import generate
from qwen_mlx.cli.main import dispatch
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.generation.engine import GenerationStats
from reference.small_models import RandomModel, save_folder, write_gguf
from tests.helpers import commands
from tests.helpers.cases import each

COMMAND = [sys.executable, "-W", "default", "-m", "qwen_mlx.generate"]


def run(*arguments: str | Path, stdin: bytes = b"", **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | variables
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, env=environment, timeout=120, check=False
    )


def run_here(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The same in this process, where only its words matter."""
    return commands.run_here(lambda: generate.main([*map(str, arguments)]), stdin)


def refused(result: subprocess.CompletedProcess[bytes], *words: str) -> None:
    """Exit code 2, nothing on standard output, one line on standard error that holds `words`."""
    error = result.stderr.decode()
    assert result.returncode == 2, error
    assert result.stdout == b""
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    for word in words:
        assert word in error


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("small") / "m.gguf", RandomModel(max_position_embeddings=256), T.Q8_0)


def test_help_imports_no_mlx_and_warns_of_nothing():
    result = run("--help")
    assert result.returncode == 0
    assert b"--prompt" in result.stdout
    assert result.stderr == b""
    code = "import sys, runpy; sys.argv = ['x', '--help']\n"
    code += "try: runpy.run_module('qwen_mlx.generate', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "heavy = {'mlx', 'numpy', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
    code += "assert not heavy, heavy"
    checked = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_text_goes_to_standard_output_and_statistics_to_standard_error(small: Path):
    result = run("--model", small, "--prompt", "hello", "--temp", "0", "--max-tokens", "12")
    assert result.returncode == 0, result.stderr
    error = result.stderr.decode()
    assert "generation: 12 tokens" in error
    assert "backend: CPU" in error
    assert "\r" not in error
    # Work of more than ten seconds is named in a line of its own: the first compilation on a busy machine.
    assert len([line for line in error.splitlines() if not line.endswith("...")]) == 1


@pytest.mark.heavy
def test_prompt_from_standard_input_and_file_give_the_same(small: Path, tmp_path: Path):
    file = tmp_path / "prompt.txt"
    file.write_text("héllo wörld\n")
    common = ["--model", small, "--temp", "0", "--max-tokens", "12"]
    texts = {
        run_here(*common, "--prompt", "héllo wörld\n").stdout,
        run(*common, "--prompt", "-", stdin="héllo wörld\n".encode()).stdout,
        run_here(*common, "--prompt-file", file).stdout,
    }
    assert len(texts) == 1
    assert texts != {run_here(*common, "--prompt", "other").stdout}


@pytest.mark.heavy
def test_seed_repeats(small: Path):
    common = ["--model", small, "--temp", "1.5", "--top-k", "0", "--max-tokens", "20", "--prompt", "hello"]
    first, again, other = (run_here(*common, "--seed", seed).stdout for seed in "112")
    assert first == again != other


def test_verbose_says_what_is_used(small: Path):
    error = run_here("--model", small, "--prompt", "x", "--max-tokens", "1", "--top-p", "0.5", "-v").stderr.decode()
    assert str(small) in error
    assert "(float32)" in error
    assert "top_p 0.5" in error
    assert "top_p given, the rest Qwen2.5-Instruct's published settings" in error
    assert "backend: " in error


def test_no_compiler_and_no_path_is_enough(small: Path):
    result = run("--model", small, "--prompt", "hello", "--max-tokens", "3", PATH="/nonexistent")
    assert result.returncode == 0, result.stderr


def test_a_terminal_that_cannot_show_a_character_gets_a_question_mark(small: Path):
    result = run("--model", small, "--prompt", "hello", "--temp", "0", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr


def test_closed_pipe_is_quiet(small: Path):
    process = subprocess.Popen(
        [*COMMAND, "--model", small, "--prompt", "hello", "--temp", "0", "--max-tokens", "200"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read().decode()
    process.wait(60)
    assert "Traceback" not in error
    assert process.returncode == 141


def test_ctrl_c_keeps_what_was_written_and_exits_130(small: Path):
    process = subprocess.Popen(
        [*COMMAND, "--model", small, "--prompt", "hello", "--temp", "0", "--max-tokens", "240"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    first = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert len(first) == 5
    assert b"Traceback" not in error
    assert b"generation: " in error


def test_told_to_stop_before_the_first_token_says_so_and_twice_is_quiet(small: Path):
    """Ctrl-C twice while the model is loading or reading; no statistics of nothing."""
    code = (
        "import atexit, importlib, os, signal\n"
        "from qwen_mlx.cli import command as cli\nfrom qwen_mlx.generation import text as generation\n"
        "def never(*a, **b):\n    os.kill(os.getpid(), signal.SIGINT)\n    yield 0\n"
        "generation.generate_tokens = never; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "main = importlib.import_module('qwen_mlx.cli.generate').main\n"
        f"cli.run(lambda: main(['--model', {str(small)!r}, '--prompt', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode in (130, -signal.SIGINT)
    assert done.stderr == "interrupted before the first token\n"
    written = GenerationStats(prompt_tokens=3, prompt_seconds=1.0, generated_tokens=2, generation_seconds=1.0)
    assert generate.describe_cost(written, False, interrupted=True).endswith("; interrupted")


@pytest.mark.heavy
def test_a_terminal_gets_no_control_characters(tmp_path: Path):
    """This model writes them; a pipe gets its text as it is."""
    path = write_gguf(tmp_path / "m.gguf", RandomModel(8))
    arguments = ["--model", str(path), "--prompt", "hello", "--temp", "0", "--max-tokens", "200"]
    raw = run(*arguments).stdout
    assert set(raw) & {*range(9), *range(11, 32)}
    master, slave = pty.openpty()
    process = subprocess.Popen([*COMMAND, *arguments], stdout=slave, stderr=subprocess.DEVNULL)
    os.close(slave)
    written = b""
    try:
        while piece := os.read(master, 4096):
            written += piece
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0
    text = written.decode().replace("\r\n", "\n")
    assert not {ord(c) for c in text} & {*range(9), *range(11, 32), *range(0x7F, 0xA0)}
    assert len(text) == len(raw.decode())


def test_an_input_without_an_end_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch):
    from qwen_mlx import QwenMLXError
    from qwen_mlx.cli.generate import main
    from qwen_mlx.text import files

    monkeypatch.setattr(files, "LARGEST", 1 << 20)
    for source in (["--prompt-file", "/dev/zero"], ["--prompt-file", "/dev/urandom"]):
        with pytest.raises(QwenMLXError, match="has more than 1 MB"):
            main(["--model", str(small), *source])


def test_bytes_that_are_not_utf8_in_any_argument_are_named(small: Path):
    for name in ("--prompt", "--system", "--stop"):
        result = run("--model", small, "--prompt", "x", name, os.fsdecode(b"ab\xff"))
        refused(result, f"{name}: not valid UTF-8 (byte 0xff at 2)")


def test_progress_line_appears_on_a_terminal_and_is_cleared(small: Path):
    """The line is for work over a second: the clock is moved, the terminal is a real pseudo-terminal."""
    master, slave = pty.openpty()
    code = (
        "import time, sys; real = time.monotonic; time.monotonic = lambda: real() * 1000\n"
        "from qwen_mlx.cli.generate import main\n"
        f"main(['--model', {str(small)!r}, '--prompt', 'x', '--max-tokens', '1'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=slave)
    os.close(slave)
    written = b""
    try:
        while piece := os.read(master, 4096):
            written += piece
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0
    assert b"\rLoading" in written
    assert b"\r\x1b[K" in written


def test_folder_of_safetensors(tmp_path: Path):
    folder = save_folder(tmp_path / "model", RandomModel())
    assert run_here("--model", folder, "--prompt", "hello", "--max-tokens", "3").returncode == 0


def test_list_models_shows_the_default():
    result = run_here("--list-models")
    assert result.returncode == 0
    assert b"Qwen2.5-Coder-0.5B-Instruct" in result.stdout


ARGUMENTS = {
    "no prompt": ([], "--prompt"),
    "max tokens 0": (["--prompt", "x", "--max-tokens", "0"], "--max-tokens is 0"),
    "max tokens text": (["--prompt", "x", "--max-tokens", "many"], "--max-tokens is 'many', expected an integer"),
    "negative seed": (["--prompt", "x", "--seed", "-1"], "--seed is -1"),
    "huge seed": (["--prompt", "x", "--seed", str(2**64)], "--seed is 18446744073709551616"),
    "negative temperature": (["--prompt", "x", "--temp", "-1"], "--temp is -1"),
    "temperature nan": (["--prompt", "x", "--temp", "nan"], "--temp is nan"),
    "top-p 0": (["--prompt", "x", "--top-p", "0"], "--top-p is 0"),
    "top-k -1": (["--prompt", "x", "--top-k", "-1"], "--top-k is -1"),
    "empty prompt": (["--prompt", ""], "empty"),
    "empty raw prompt": (["--prompt", "", "--raw"], "no tokens"),
    "empty stop": (["--prompt", "x", "--stop", ""], "--stop is"),
    "min tokens over max": (["--prompt", "x", "-n", "3", "--min-tokens", "5"], "expected 0 to --max-tokens, 3"),
    "reasoning budget": (["--prompt", "x", "--reasoning-budget", "-1"], "--reasoning-budget is -1"),
    "logprobs": (["--prompt", "x", "--logprobs", "101"], "--logprobs is 101"),
    "yarn": (["--prompt", "x", "--yarn", "-1"], "--yarn is -1"),
    "max kv size": (["--prompt", "x", "--max-kv-size", "4"], "--max-kv-size is 4, expected more than the 4 first"),
    "raw with system": (["--prompt", "x", "--raw", "--system", "s"], "system"),
    "prompt past the context": (["--prompt", "word " * 300], "the model's context 256"),
    "no such prompt file": (["--prompt-file", "/nonexistent/p.txt"], "No such file"),
    "two prompts": (["--prompt", "x", "--prompt-file", "y"], "not allowed with"),
    "unknown option": (["--prompt", "x", "--temperatur", "1"], "--temperatur 1; did you mean --temperature?"),
    "underscore": (["--prompt", "x", "--max_tokens=1"], "did you mean --max-tokens?"),
    "beginning of an option": (["--prompt", "x", "--num-draft", "1"], "did you mean --num-draft-tokens?"),
    "unlike any option": (["--prompt", "x", "--zzz"], "unrecognized arguments: --zzz; see --help"),
    "prompt without its option": (["two words"], "did you mean --prompt 'two words'?"),
    "unknown dtype": (["--prompt", "x", "--dtype", "int8"], "int8', expected one of float32, bfloat16, float16;"),
}


@pytest.mark.heavy
@each("case", ARGUMENTS)
def test_bad_argument(case: str, small: Path):
    arguments, word = ARGUMENTS[case]
    refused(run_here("--model", small, *arguments), word)


MISTAKES_WITHOUT_WEIGHTS = {
    "empty prompt": (["--prompt", ""], "--prompt is empty"),
    "empty input": (["--prompt", "-"], "standard input is empty"),
    "raw with system": (["--prompt", "x", "--raw", "--system", "s"], "leave out --raw"),
    "empty stop": (["--prompt", "x", "--stop", ""], "--stop is"),
}


@pytest.mark.parametrize("case", MISTAKES_WITHOUT_WEIGHTS)
def test_arguments_are_checked_before_weights_are_read(case: str, tmp_path: Path):
    arguments, words = MISTAKES_WITHOUT_WEIGHTS[case]
    (tmp_path / "no_model.gguf").write_text("not a GGUF")
    refused(run_here("--model", tmp_path / "no_model.gguf", *arguments), words)


def test_a_wrong_option_is_answered_with_the_right_one(capsys: pytest.CaptureFixture[str]):
    for line, words in (
        ("generate --promt x", "did you mean --prompt?"),
        ("generate -temp 1", "did you mean --temp?"),
        ("generate --device cpu", "unrecognized arguments: --device cpu; see"),
        ("generate --temp hot", "--temp is 'hot', expected a number; see"),
        ("generate --n-predict 5", "did you mean --max-tokens?"),
        ("evaluate --n-predict 5", "unrecognized arguments: --n-predict 5; see"),
        ("convert --hf-path x --mlx-path y", "did you mean qwen-mlx convert SOURCE OUTPUT?"),
    ):
        with pytest.raises(SystemExit, match="2"):
            dispatch([*line.split(), *(["--text", "x"] if line.startswith("evaluate") else [])])
        assert words in capsys.readouterr().err, line
    for line, words in (
        ("--prompt x", "such as qwen-mlx generate --prompt x;"),
        ("convert a b --group-size 32", "--group-size goes with --quantize"),
        ("fuse a b --adapter c --group-size 32", "--group-size goes with --quantize"),
    ):
        with pytest.raises(QwenMLXError, match=words):
            dispatch(line.split())
    with pytest.raises(SystemExit, match="0"):
        dispatch(["help", "embed"])
    assert "--pooling" in capsys.readouterr().out


def test_a_text_that_max_tokens_cuts_is_said_to_be_cut(small: Path):
    error = run_here("--model", small, "--prompt", "hello", "--temp", "0", "--max-tokens", "1").stderr.decode()
    assert "generation: 1 token; " in error
    assert error.endswith("; cut off by --max-tokens 1\n")
    ended = run_here("--model", small, "--prompt", "hello", "--logit-bias", "64=1e6", "--stop", "a")
    assert "cut off" not in ended.stderr.decode()


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct-GGUF:q4_k_m"),
        ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:q4_k_m"),
        ("qwen2.5-math-7b", "Qwen/Qwen2.5-Math-7B-Instruct"),
    ],
)
def test_a_model_s_short_name_is_answered_with_its_repository(asked: str, meant: str):
    refused(run_here("--model", asked, "--prompt", "x"), f"did you mean {meant}?")


def test_a_model_of_another_family_is_told_where_to_go(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    refused(run_here("--model", tmp_path, "--prompt", "x"), "'qwen3'", "mlx-lm")


def test_invalid_utf8(small: Path):
    refused(run_here("--model", small, "--prompt", "-", stdin=b"abc\xff\xfe"), "standard input", "UTF-8", "0xff at 3")


def test_missing_model():
    refused(run_here("--model", "/nonexistent/model.gguf", "--prompt", "x"), "/nonexistent/model.gguf")


def drop(name: str):
    def edit(writer, tensors):
        del tensors[name]

    return edit


def add(name: str):
    def edit(writer, tensors):
        tensors[name] = (np.zeros((4,), np.float32), T.F32)

    return edit


def reshape(name: str):
    def edit(writer, tensors):
        array, kind = tensors[name]
        tensors[name] = (array[:-1], kind)

    return edit


def remove_field(name: str):
    def edit(writer, tensors):
        del writer.kv_data[0][name]

    return edit


def set_field(name: str, value: object):
    def edit(writer, tensors):
        writer.kv_data[0][name].value = value

    return edit


def without_end(writer, tensors):
    """No token is said to end a text, and none has a name that means it."""
    remove_field("tokenizer.ggml.eos_token_id")(writer, tensors)
    kinds, names = (writer.kv_data[0][f"tokenizer.ggml.{field}"] for field in ("token_type", "tokens"))
    kinds.value = [1] * len(kinds.value)
    names.value = [f"nameless{i}" if str(name).startswith("<|") else name for i, name in enumerate(names.value)]


DAMAGED = {
    "tensor missing": (drop("blk.1.attn_q.bias"), "'blk.1.attn_q.bias'", "missing"),
    "embedding missing": (drop("token_embd.weight"), "'token_embd.weight'", "missing"),
    "tensor extra": (add("blk.0.attn_q.rotation"), "'blk.0.attn_q.rotation'", "not part of"),
    "scale of several elements": (add("blk.0.attn_q.scale"), "'blk.0.attn_q.scale'", "expected one F32"),
    "layer extra": (add("blk.3.attn_norm.weight"), "'blk.3.attn_norm.weight'", "not part of"),
    "wrong shape": (reshape("blk.0.ffn_down.weight"), "'blk.0.ffn_down.weight'", "(63, 160)", "(64, 160)"),
    "other architecture": (set_field("general.architecture", "llama"), "'llama'", "qwen2"),
    "no architecture": (remove_field("general.architecture"), "general.architecture"),
    "theta missing": (remove_field("qwen2.rope.freq_base"), "qwen2.rope.freq_base", "missing"),
    "eps missing": (remove_field("qwen2.attention.layer_norm_rms_epsilon"), "layer_norm_rms_epsilon", "missing"),
    "layers missing": (remove_field("qwen2.block_count"), "qwen2.block_count", "missing"),
    "context missing": (remove_field("qwen2.context_length"), "qwen2.context_length", "missing"),
    "heads 0": (set_field("qwen2.attention.head_count", 0), "num_attention_heads"),
    "kv heads 3": (set_field("qwen2.attention.head_count_kv", 3), "num_key_value_heads"),
    "tokens missing": (remove_field("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens", "missing"),
    "other split rule": (set_field("tokenizer.ggml.pre", "llama-bpe"), "llama-bpe", "qwen2"),
    "end token missing": (without_end, "eos_token_id", "missing"),
    "template missing": (remove_field("tokenizer.chat_template"), "chat template", "--raw"),
}


@pytest.mark.heavy
@each("case", DAMAGED)
def test_damaged_file(case: str, tmp_path: Path):
    edit, *words = DAMAGED[case]
    path = write_gguf(tmp_path / "m.gguf", RandomModel(), edit=edit)
    refused(run_here("--model", path, "--prompt", "x"), *words)


@pytest.mark.heavy
def test_truncated_and_foreign_files(small: Path, tmp_path: Path):
    data = small.read_bytes()
    for name, content, word in (
        ("empty", b"", "empty"),
        ("text", b"hello", "not a GGUF"),
        ("header", data[:100], "truncated"),
        ("half", data[: len(data) // 2], "truncated"),
        ("end", data[:-64], "truncated"),
    ):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        refused(run_here("--model", path, "--prompt", "x"), word, str(path))


def test_standard_output_on_a_full_disk(small: Path):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "--model", small, "--prompt", "x"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"standard output cannot be written" in done.stderr


@pytest.mark.heavy
def test_folder_that_is_no_model(small: Path, tmp_path: Path):
    refused(run_here("--model", small.parent, "--prompt", "x"), "config.json", "m.gguf")
    (tmp_path / "empty").mkdir()
    refused(run_here("--model", tmp_path / "empty", "--prompt", "x"), "config.json")
    folder = save_folder(tmp_path / "model", RandomModel())
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(run_here("--model", folder, "--prompt", "x"), "model.safetensors")
    (folder / "model.safetensors").unlink()
    refused(run_here("--model", folder, "--prompt", "x"), "safetensors")
    (folder / "config.json").write_text("{")
    refused(run_here("--model", folder, "--prompt", "x"), "config.json", "JSON")


def test_progress_is_shown_after_a_second_on_a_terminal(monkeypatch, capsys):
    from qwen_mlx.cli import command

    now = [5.0]
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = command.ProgressLine("Loading")
    for now[0], visible in ((5.0, False), (5.99, False), (6.0, True)):
        line(1, 2)
        assert line.visible == visible
    assert "Loading" in capsys.readouterr().err


def test_long_work_is_named_in_a_pipe_in_one_line_and_short_work_is_not(monkeypatch, capsys):
    """The timer is a real one that fires at once."""
    import threading

    from qwen_mlx.cli import command

    waits, real = [], threading.Timer

    def timer(seconds: float, function):
        waits.append(seconds)
        return real(0, function)

    with command.ProgressLine("Loading m.gguf") as line:
        line(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(command.threading, "Timer", timer)
    with command.ProgressLine("Loading m.gguf") as line:
        line._timer.join()
        line(1, 2)
    assert capsys.readouterr().err == "Loading m.gguf...\n"
    assert waits == [10]
