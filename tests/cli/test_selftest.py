"""The self-test's models and its last sentence; its kernels are in tests/ops."""

from __future__ import annotations

import json
import sys
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qwen_mlx import ops
from qwen_mlx.backend import mx, named_arrays
from qwen_mlx.cli import selftest, selftest_models
from qwen_mlx.loading.hub import default
from reference.emulator import emulate
from reference.lazy import torch, transformers
from tests.helpers.cases import each

RIGHT = [{"case": "rope", "dtype": "float32", "ok": True, "ulp": 0.5, "mlx_ulp": None}]
WRONG = [*RIGHT, {"case": "matvec q4_k", "dtype": "bfloat16", "ok": False, "ulp": float("inf"), "mlx_ulp": None}]
MODELS = {"small model": "right", "default model": "right"}


def test_the_small_model_s_tokens_are_those_of_transformers():
    small, c = selftest_models.small_model(), selftest_models.SMALL
    config = transformers.Qwen2Config(
        **{name: getattr(c, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")},
        **{name: getattr(c, name) for name in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")},
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=True,
    )
    peer = transformers.Qwen2ForCausalLM(config).eval().float()
    weights = {name: torch.tensor(np.array(array)) for name, array in named_arrays(small)}
    assert peer.load_state_dict(weights, strict=False).missing_keys in ([], ["lm_head.weight"])
    ids = list(selftest_models.SMALL_PROMPT + selftest_models.SMALL_TOKENS)
    with torch.no_grad():
        logits = peer(torch.tensor([ids])).logits[0]
    best = logits[len(selftest_models.SMALL_PROMPT) - 1 : -1].topk(2)
    assert best.indices[:, 0].tolist() == list(selftest_models.SMALL_TOKENS)
    assert (best.values[:, 0] - best.values[:, 1]).min() > 1e-3, "noise could decide"


def test_the_small_model_is_right_here():
    assert selftest_models.small_model_fault() is None


def test_the_small_model_is_right_with_kernels(monkeypatch):
    monkeypatch.setattr(selftest_models, "SMALL_TOKENS", selftest_models.SMALL_TOKENS[:4])
    launched = []
    with emulate(checked=False), ops.no_grad(), monkeypatch.context() as patch:  # undone before the emulator is
        make = mx.fast.metal_kernel
        patch.setattr(mx.fast, "metal_kernel", lambda name, **more: launched.append(name) or make(name, **more))
        assert selftest_models.small_model_fault() is None
    assert any("matvec_swiglu" in name for name in launched)


def test_a_wrong_model_is_seen(monkeypatch):
    expected = (*selftest_models.SMALL_TOKENS[:2], 5)
    monkeypatch.setattr(selftest_models, "SMALL_TOKENS", expected)
    assert selftest_models.small_model_fault() == "token 3 of the small model is 198, expected 5"


def test_the_default_model_s_first_tokens(real_gguf, monkeypatch):
    assert selftest_models.default_model_path() == real_gguf
    assert selftest_models.default_model_fault(real_gguf) is None


def test_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_MLX_CACHE", str(tmp_path))
    monkeypatch.setattr(default, "snapshots", lambda repo: [])
    assert selftest_models.default_model_path() is None
    assert list(tmp_path.iterdir()) == []


@each(
    ("rows", "models", "code", "words"),
    [
        (RIGHT, MODELS, 0, ": 1 cases and 2 models."),
        (
            RIGHT,
            MODELS | {"default model": selftest.NOT_HERE},
            0,
            ": 1 cases and 1 model; the default model is not on this",
        ),
        (WRONG, MODELS, 1, ": 1 of 2 cases, the first matvec q4_k in bfloat16."),
        (RIGHT, {"small model": "token 3 is 4"}, 1, ": small model (token 3 is 4)."),
    ],
)
def test_the_last_sentence(rows, models, code, words):
    sentence, status = selftest.conclusion(rows, models)
    assert status == code
    assert sentence.startswith("Wrong on " if code else "Right on ")
    assert words in sentence


def test_a_process_that_a_gpu_ends_is_a_fault():
    part: Future = Future()
    part.set_exception(BrokenExecutor())
    (row,) = selftest._results(part)
    sentence, status = selftest.conclusion([*RIGHT, row], MODELS)
    assert status == 1
    assert "1 of 2 cases, the first a process of the self-test" in sentence


def test_the_command_on_a_stand_in_for_its_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selftest, "_kernels", lambda jobs: WRONG)
    monkeypatch.setattr(selftest, "_models", lambda: MODELS)
    with ops.forced("metal"):
        assert selftest.main(["--json", str(tmp_path / "x.json")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("Wrong on ")
    assert said[-1].endswith(f"Wrote {tmp_path / 'x.json'}.")
    written = json.loads((tmp_path / "x.json").read_text())
    assert (written["failed"], written["models"], written["results"][1]["ulp"]) == (1, MODELS, "inf")


def test_a_model_of_no_trial_is_refused():
    with pytest.raises(selftest.QwenMLXError, match="--model is the model of --trial"):
        selftest.main(["--model", "x.gguf"])
    with pytest.raises(selftest.QwenMLXError, match="No kernel to try: the default device is the CPU"):
        selftest.main(["--trial"])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always looks there")
def test_its_processes_run_no_module_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "multiprocessing.py").write_text("raise SystemExit('not this one')")
    with ProcessPoolExecutor(1, selftest.spawning()) as pool:
        assert pool.submit(len, "ab").result() == 2
