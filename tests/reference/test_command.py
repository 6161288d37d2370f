"""`python -m reference.compare` as its user sees it: table, exit code, JSON, page; and each mistake in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_mlx.errors import QwenMLXError
from reference.compare import main
from reference.small_models import hf_model, save_folder, write_gguf

FULL = [name for name in ("/dev/full",) if os.path.exists(name)]  # Linux's, where every write fails
PROMPT = ["--prompt", "hello hell, ll he!" * 4]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "m", hf_model())


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    return [*PROMPT, "--cache", str(tmp_path / "cache"), "--noise"]


def run(
    *arguments: str | Path, module: str = "reference.compare", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        check=False,
    )


def test_a_right_port_passes_with_table_and_json(folder: Path, quick: list[str], tmp_path: Path, capsys):
    runs = ["--runs", "prefill", "chunked", "decode", "padded"]
    assert main(["--model", str(folder), *quick, "--json", str(tmp_path / "c.json"), *runs]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1].startswith("PASSED: all ")
    for line in ("q_rope", "attn_residual", "KL divergence", "padded, float32"):
        assert line in text
    document = json.loads((tmp_path / "c.json").read_text())
    assert [c["passed"] for c in document["comparisons"]] == [True] * 4
    assert document["comparisons"][0]["taps"]["0.layers.2.gate"]["l2"] < 1e-5
    assert len(document["ids"]) == 36
    assert document["versions"].keys() == {"mlx", "torch", "transformers"}


def test_the_page_holds_everything(folder: Path, quick: list[str], tmp_path: Path):
    assert main(["--model", str(folder), *quick, "--report", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("<picture>") == 3
    assert page.count("data:image/png;base64,iVBOR") == 6  # light and dark
    assert "://" not in page  # nothing is fetched
    names = {f"prefill-{name}-{theme}.png" for name in ("errors", "map", "logits") for theme in ("light", "dark")}
    assert {file.name for file in (tmp_path / "page").glob("*.png")} == names
    for words in ("Passed", "own noise", "KL divergence", "attn_residual", "SHA-256"):
        assert words in page


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


def test_nan_is_a_failure_and_the_json_stays_json(folder: Path, quick: list[str], tmp_path: Path, capsys):
    right = write_gguf(tmp_path / "right.gguf", hf_model())
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    out = ["--json", str(tmp_path / "c.json"), "--report", str(tmp_path / "page")]
    assert main(["--model", str(folder), "--reference", str(right), *quick, *out]) == 1
    assert "first diverging tap is 0.layers.1.up (holds" in capsys.readouterr().out
    text = (tmp_path / "c.json").read_text()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    tap = document["comparisons"][0]["taps"]["0.layers.1.up"]
    assert tap["l2"] is None
    assert "NaN" in tap["problem"]
    # The reference with the NaN: no less a failure.
    assert main(["--model", str(right), "--reference", str(folder), *quick[:-1]]) == 1
    assert "the reference itself holds" in capsys.readouterr().out


def test_the_second_run_takes_the_reference_from_disk(folder: Path, tmp_path: Path, capsys, monkeypatch):
    from reference import torch_side

    arguments = ["--model", str(folder), *PROMPT, "--cache", str(tmp_path / "cache")]
    main(arguments)
    assert "The limits are those of the 0.5B model" in capsys.readouterr().out  # though this one passes
    monkeypatch.setattr(torch_side, "load", lambda *_: pytest.fail("loaded again"))
    main(arguments)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_compared_with_the_reference_s_float32(folder: Path, quick: list[str], dtype: str, tmp_path):
    runs = ["--runs", "prefill", "decode", "padded"]
    assert main(["--model", str(folder), *quick, "--dtype", dtype, *runs, "--json", str(tmp_path / "c.json")]) == 0
    taps = json.loads((tmp_path / "c.json").read_text())["comparisons"][0]["taps"]
    smallest, largest = (0.001, 0.06) if dtype == "bfloat16" else (0.0001, 0.008)  # the dtype's rounding shows, no more
    assert smallest < taps["0.logits"]["l2"] < largest
    assert all(tap["l2"] < largest for tap in taps.values())


def test_mistakes_are_one_sentence_and_exit_code_2(folder: Path, tmp_path: Path, capsys):
    other = save_folder(tmp_path / "other", hf_model(vocab_size=300))
    broken, incomplete, more, pickled = (save_folder(tmp_path / name, hf_model()) for name in "bixp")
    weights = load_file(incomplete / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, incomplete / "model.safetensors", {"format": "pt"})
    weights = load_file(more / "model.safetensors") | {"model.layers.0.self_attn.o_proj.bias": torch.ones(64)}
    save_file(weights, more / "model.safetensors", {"format": "pt"})
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    (tmp_path / "file").write_text("in the way")
    (broken / "model.safetensors").write_bytes(b"nothing")
    for arguments, words in (
        (["--model", folder, "--reference", other], ("vocabulary of 263", "300")),
        (["--model", folder, "--prompt", "hello " * 2000], ("more than the model's context of 512", "--prompt")),
        (["--model", folder, "--tokens", "1"], ("--tokens is 1",)),
        (["--model", folder, "--prompt", ""], ("--prompt is empty",)),
        (["--model", broken, *PROMPT], ("transformers", "cannot load it", "--reference")),
        (["--model", folder, "--reference", pickled], ("transformers", "cannot load it", "--reference")),
        (["--model", folder, "--reference", incomplete], ("finds no model.layers.1.mlp.up_proj.weight", "--reference")),
        (["--model", folder, "--reference", more], ("leaves out model.layers.0.self_attn.o_proj.bias", "--reference")),
        (["--model", folder, "--tokens", "1" + "0" * 12], ("more than the model's context of 512",)),
        *[(["--model", folder, *PROMPT, "--json", full], (f"{full}: cannot be written",)) for full in FULL],
        (["--model", folder, "--json", tmp_path], ("is a folder", "--json")),
        (["--model", folder, "--json", tmp_path / "file" / "c.json"], ("cannot be written",)),
        (["--model", folder, "--report", tmp_path / "file"], ("cannot be written",)),
    ):
        with pytest.raises(QwenMLXError) as error:
            main([*map(str, arguments), "--cache", str(tmp_path / "cache")])
        assert all(word in str(error.value) for word in words), str(error.value)
    for arguments in (["--model", tmp_path / "none.gguf"], ["--dtype", "int8"]):
        found = run(*arguments)
        assert found.returncode == 2
        assert found.stderr.startswith("error: ")
        assert found.stderr.count("\n") == 1


def test_a_prompt_whose_activations_exceed_the_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 10)  # a megabyte
    with pytest.raises(QwenMLXError, match=r"activations of 64 tokens take .* GB and this machine has 0.0"):
        main(["--model", str(folder)])


def test_without_torch_one_sentence_says_what_to_install(folder: Path, tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), "."])
    for module, *arguments in (("reference.compare", "--model", folder, *PROMPT), ("reference.noise",)):
        found = run(*arguments, module=module, env={"PYTHONPATH": paths})
        assert found.returncode == 2
        assert found.stderr.count("\n") == 1
        assert "pip install -e '.[reference]'" in found.stderr
