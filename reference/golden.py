"""Stores small random models with what transformers computes from them, so that tests compare with it without PyTorch.

    python -m reference.golden  # writes tests/golden

NAME/ holds a model as Hugging Face's folder (weights in float16, which float32 holds exactly), expected.safetensors
the ids of a prompt, transformers' float32 logits of it and the greedy ids that follow, and expected.json the noise of
these logits: their largest distance from the same model's in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from qwen_mlx.cli import command as cli

from .small_models import TOKENS, RandomModel, save_folder

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "equal_heads": {"num_key_value_heads": 4},
    "seven_heads": {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1},
    "theta_1e4": {"rope_theta": 10000.0, "rms_norm_eps": 1e-5},
    "sliding_window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 64},
    "mlp_biases": {"mlp_bias": True},
}
PROMPT, GREEDY = 24, 16


def model_of(name: str) -> RandomModel:
    """The random model of a name, its weights rounded to float16."""
    model = RandomModel(list(MODELS).index(name), **(SMALL | MODELS[name]))
    for values in model.state_dict().values():
        values[...] = values.astype(np.float16)
    return model


def write_models(folder: Path) -> None:
    """Writes every model, without results."""
    for name in MODELS:
        save_folder(folder / name, model_of(name))
        path = folder / name / "model.safetensors"
        weights = {key: values.astype(np.float16) for key, values in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})


def results(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]]:
    """Computes with transformers from each model of the folder: ids, logits (PROMPT, vocabulary), greedy ids, noise."""
    from . import torch_side

    torch = torch_side.torch
    found = {}
    for number, name in enumerate(MODELS):
        model = torch_side.load(folder / name)
        ids = np.random.default_rng(number).integers(0, len(TOKENS) - 3, (1, PROMPT))
        prompt = torch.from_numpy(ids)
        settings = {"max_new_tokens": GREEDY, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            logits, exact = (m(prompt).logits[0].double() for m in (model, torch_side.in_dtype(model, "float64")))
            noise = float((logits - exact).abs().max())
            # With a mask: without one, transformers takes an id that equals pad_token_id for padding.
            greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0]
            best = model(greedy[None]).logits[0, PROMPT - 1 : -1].topk(2)
        assert torch.equal(best.indices[:, 0], greedy[PROMPT:]), f"{name}: the ids are not the likeliest"
        margin = float((best.values[:, 0] - best.values[:, 1]).min())
        assert 0 < noise < 1e-4 * float(exact.abs().max()), name
        assert margin > 100 * noise, f"{name}: noise could decide a greedy id"
        found[name] = ids[0].astype(np.int32), logits.float().numpy(), greedy[PROMPT:].numpy().astype(np.int32), noise
    return found


def main() -> int:
    """Parses the arguments, of which there are none, and writes the models and the results."""
    cli.Parser(prog="python -m reference.golden", description=__doc__).parse_args()
    from . import torch_side

    write_models(FOLDER)
    arrays, about = {}, {}
    for name, (ids, logits, greedy, noise) in results(FOLDER).items():
        arrays |= {f"{name}.ids": ids, f"{name}.logits": logits, f"{name}.greedy": greedy}
        about[name] = {"noise": float(f"{noise:.3g}")}
    save_file(arrays, FOLDER / "expected.safetensors")
    versions = {"torch": torch_side.torch.__version__, "transformers": torch_side.transformers.__version__}
    (FOLDER / "expected.json").write_text(json.dumps({"versions": versions, "models": about}, indent=2) + "\n")
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"wrote {len(MODELS)} models with their results, {size:,} bytes, to {FOLDER}")
    return 0


if __name__ == "__main__":
    cli.run(main)
