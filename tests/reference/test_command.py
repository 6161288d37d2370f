"""`python -m reference.compare` as its user sees it: table, exit code, JSON, page; and each mistake in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from reference.compare import main
from tests.small_models import hf_model, save_folder, write_gguf

PROMPT = ["--prompt", "hello hell, ll he!" * 4]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "m", hf_model())


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    return [*PROMPT, "--cache", str(tmp_path / "cache"), "--noise"]


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "reference.compare", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        check=False,
    )


def test_a_right_port_passes_with_table_json_and_page(folder: Path, quick: list[str], tmp_path: Path, capsys):
    out = ["--json", str(tmp_path / "c.json"), "--report", str(tmp_path / "page")]
    runs = ["--runs", "prefill", "chunked", "decode", "padded"]
    assert main(["--model", str(folder), *quick, *out, *runs]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1].startswith("PASSED: all ")
    for line in ("q_rope", "attn_residual", "KL divergence", "padded, float32"):
        assert line in text
    document = json.loads((tmp_path / "c.json").read_text())
    assert [c["passed"] for c in document["comparisons"]] == [True] * 4
    assert document["comparisons"][0]["taps"]["0.layers.2.gate"]["l2"] < 1e-5
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("<picture>") == 12
    assert page.count("data:image/png;base64,iVBOR") == 24
    assert "://" not in page  # nothing is fetched
    assert len(list((tmp_path / "page").glob("*.png"))) == 24


def test_a_wrong_port_fails_and_names_tap_and_cause(folder: Path, quick: list[str], tmp_path: Path, capsys):
    right = write_gguf(tmp_path / "right.gguf", hf_model())
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.{}_proj.weight".format
    weights[name("gate")], weights[name("up")] = weights[name("up")].clone(), weights[name("gate")].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    page = tmp_path / "page"
    assert main(["--model", str(folder), "--reference", str(right), *quick, "--report", str(page)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "first diverging tap is 0.layers.1.gate" in last
    assert "likeliest cause: gate and up are swapped" in last
    assert "gate and up are swapped" in (page / "report.html").read_text()


def test_the_second_run_takes_the_reference_from_disk(folder: Path, tmp_path: Path, capsys, monkeypatch):
    from reference import torch_side

    arguments = ["--model", str(folder), *PROMPT, "--cache", str(tmp_path / "cache")]
    main(arguments)
    monkeypatch.setattr(torch_side, "load", lambda *_: pytest.fail("loaded again"))
    main(arguments)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_compared_with_the_reference_s_float32(folder: Path, quick: list[str], dtype: str, tmp_path):
    main(["--model", str(folder), *quick, "--dtype", dtype, "--json", str(tmp_path / "c.json")])
    taps = json.loads((tmp_path / "c.json").read_text())["comparisons"][0]["taps"]
    smallest, largest = (0.001, 0.06) if dtype == "bfloat16" else (0.0001, 0.008)  # the dtype's rounding shows, no more
    assert smallest < taps["0.logits"]["l2"] < largest
    assert all(tap["l2"] < largest for tap in taps.values())


def test_mistakes_are_one_sentence_and_exit_code_2(folder: Path, tmp_path: Path, capsys):
    from qwen_mlx.errors import QwenMLXError

    other = save_folder(tmp_path / "other", hf_model(vocab_size=300))
    broken = save_folder(tmp_path / "broken", hf_model())
    (broken / "model.safetensors").write_bytes(b"nothing")
    for arguments, words in (
        (["--model", folder, "--reference", other], ("vocabulary of 263", "300")),
        (["--model", folder, "--prompt", "hello " * 2000], ("more than the model's context of 512", "--prompt")),
        (["--model", folder, "--tokens", "1"], ("--tokens is 1",)),
        (["--model", folder, "--prompt", ""], ("--prompt is empty",)),
        (["--model", broken, *PROMPT], ("transformers", "cannot load it", "--reference")),
    ):
        with pytest.raises(QwenMLXError) as error:
            main([*map(str, arguments), "--cache", str(tmp_path / "cache")])
        assert all(word in str(error.value) for word in words), str(error.value)
    for arguments in (["--model", tmp_path / "none.gguf"], ["--dtype", "int8"]):
        found = run(*arguments)
        assert found.returncode == 2
        assert found.stderr.startswith("error: ")
        assert found.stderr.count("\n") == 1


def test_without_torch_one_sentence_says_what_to_install(folder: Path, tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), "."])
    found = run("--model", folder, *PROMPT, env={"PYTHONPATH": paths})
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "pip install -e '.[reference]'" in found.stderr
