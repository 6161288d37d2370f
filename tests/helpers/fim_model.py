"""A small random model whose vocabulary has the tokens of fill in the middle, as Qwen2.5's has them."""

from __future__ import annotations

import json
from pathlib import Path

from reference.small_models import TOKENS, RandomModel, save_folder

FIM_TOKENS = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]
FIM_IDS = {name: len(TOKENS) + i for i, name in enumerate(FIM_TOKENS)}


def save_fim_folder(folder: Path, **overrides) -> Path:
    """Writes a folder of safetensors; the added tokens are not control tokens, as in Qwen's tokenizer.json."""
    save_folder(folder, RandomModel(**({"vocab_size": len(TOKENS) + len(FIM_TOKENS)} | overrides)))
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    data["added_tokens"] += [{"id": i, "content": name, **flags} for name, i in FIM_IDS.items()]
    path.write_text(json.dumps(data))
    return folder
