"""The engines that benchmarks.run compares: each holds the same weights and makes greedy tokens for prompts."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_mlx import Qwen2
from qwen_mlx.backend import mx, nn
from qwen_mlx.generation.engine import Rows, generate_tokens
from qwen_mlx.generation.settings import GenerationSettings

Prompts = Sequence[Sequence[int]]  # of one length
Tokens = Iterator[list[int]]  # one for each prompt at a time


class QwenMLX:
    """This package."""

    name = "qwen_mlx"

    def __init__(self, model: Qwen2):
        self._model = model

    def start(self, prompts: Prompts) -> Tokens:
        if len(prompts) == 1:
            return ([token.id] for token in generate_tokens(self._model, prompts[0], GenerationSettings()))
        return self._batch(prompts)

    def _batch(self, prompts: Prompts) -> Tokens:
        rows = Rows(self._model)
        rows.add(prompts, [GenerationSettings()] * len(prompts))
        while True:
            yield [token.id for token in rows.step()]

    def peak(self) -> int:
        """Bytes at most since the last call."""
        return _mlx_peak()


def mlx_lm_model(model: Qwen2, bits: int | None) -> nn.Module:
    """mlx-lm's model on the arrays of this one, which with `bits` are packed in groups of 64."""
    from mlx_lm.models import qwen2

    other = qwen2.Model(qwen2.ModelArgs.from_dict(model.config.to_hf()))
    if bits:
        nn.quantize(other, group_size=64, bits=bits)
    other.load_weights(list(model.hf_parameters().items()), strict=True)
    mx.eval(other.parameters())
    return other


class MlxLm:
    """mlx-lm's model on the same arrays; with `bits`, its own packing where the model's has no equal in it."""

    name = "mlx-lm"

    def __init__(self, model: Qwen2, bits: int | None):
        self._model = mlx_lm_model(model, bits)
        self._model.eval()

    def start(self, prompts: Prompts) -> Tokens:
        from mlx_lm.generate import generate_step

        if len(prompts) == 1:
            steps = generate_step(mx.array(prompts[0]), self._model, max_tokens=-1)
            return ([token] for token, _ in steps)
        return self._batch(prompts)

    def _batch(self, prompts: Prompts) -> Tokens:
        from mlx_lm.generate import BatchGenerator

        size = len(prompts)
        generator = BatchGenerator(self._model, completion_batch_size=size, prefill_batch_size=size)
        try:
            generator.insert([list(ids) for ids in prompts], [1 << 30] * size)
            while True:
                yield [response.token for response in generator.next_generated()]
        finally:
            generator.close()

    def peak(self) -> int:
        return _mlx_peak()


class Transformers:
    """transformers on the same dense weights; `static`: a cache of fixed size and a compiled forward pass."""

    def __init__(self, model: Qwen2, static: bool):
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        self.name = f"transformers {'static' if static else 'dynamic'}"
        self._torch, self._static = torch, static
        names = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        self._device = next(name for name, there in names.items() if there)
        weights = {name: _torch_tensor(torch, array) for name, array in model.hf_parameters().items()}
        config = Qwen2Config(**model.config.to_hf(), attn_implementation="sdpa")
        with torch.device("meta"):
            self._model = Qwen2ForCausalLM(config)
        self._model.load_state_dict(weights, strict=False, assign=True)
        self._model.tie_weights()
        self._model.model.rotary_emb = type(self._model.model.rotary_emb)(config)  # "meta" left it without values
        self._model = self._model.to(self._device).eval()
        self._forward = torch.compile(self._model, mode="reduce-overhead") if static else self._model

    def start(self, prompts: Prompts) -> Tokens:
        from transformers import StaticCache

        torch = self._torch
        with torch.no_grad():
            ids = torch.tensor(prompts, device=self._device)
            room = ids.shape[1] + 1024
            cache = StaticCache(self._model.config, max_cache_len=room) if self._static else None
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, place = out.past_key_values, ids.shape[1]
            while True:
                tokens = out.logits[:, -1].argmax(-1)
                # Nothing waits for the token on the host before the next step is launched, except its reader.
                made = tokens.tolist()
                yield made
                positions = torch.full((len(prompts), 1), place, device=self._device)
                out = self._forward(
                    tokens[:, None], past_key_values=cache, use_cache=True, position_ids=positions, logits_to_keep=1
                )
                place += 1

    def peak(self) -> int:
        if self._device != "cuda":
            return 0
        peak = self._torch.cuda.max_memory_allocated()
        self._torch.cuda.reset_peak_memory_stats()
        return peak


def _torch_tensor(torch: Any, array: mx.array) -> Any:
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _mlx_peak() -> int:
    peak = mx.get_peak_memory()
    mx.clear_cache()
    mx.reset_peak_memory()
    return peak


def llama_bench(path: Path, prompt: int, tokens: int, repeats: int) -> dict[str, float] | None:
    """Tokens per second of llama.cpp's own llama-bench on a GGUF file, {"prefill", "decode"}; None if not installed."""
    program = shutil.which("llama-bench")
    if program is None:
        return None
    command = [program, "-m", str(path), "-p", str(prompt), "-n", str(tokens), "-r", str(repeats), "-o", "json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {"decode" if row["n_gen"] else "prefill": row["avg_ts"] for row in rows}


def engines_of(model: Qwen2, bits: int | None, fallback: Qwen2, names: Sequence[str]) -> Iterator[Callable[[], Any]]:
    """Makers of the engines named; `fallback`: the one whose weights mlx-lm can hold. Packed weights are no matter for
    transformers, which is left out."""
    makers = {
        "qwen_mlx": lambda: QwenMLX(model),
        "mlx-lm": lambda: MlxLm(fallback, bits),
        "transformers": lambda: Transformers(fallback, static=False),
        "transformers-static": lambda: Transformers(fallback, static=True),
    }
    return (maker for name, maker in makers.items() if name in names and not (bits and name.startswith("transformers")))
