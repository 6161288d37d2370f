"""Small random Qwen2 models, of transformers or of NumPy alone, written by transformers, gguf-py, safetensors and
tokenizers: none of these shares code with what is tested.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokens() -> list[str]:
    """GPT-2's printable names of the 256 bytes (bytes_to_unicode of its encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + n) for n in range(len(others)))]


TOKENS = [*byte_tokens(), "he", "ll", "hell", "hello", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o"]
END_OF_TEXT, IM_START, IM_END = len(TOKENS) - 3, len(TOKENS) - 2, len(TOKENS) - 1


SETTINGS: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def hf_model(seed: int = 0, **overrides) -> Qwen2ForCausalLM:
    """A random model of transformers; norms and biases are random too (transformers starts them at one and zero)."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**(SETTINGS | overrides))).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.5 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * deviation(name, parameter.shape[-1]))
    return model


def deviation(name: str, columns: int) -> float:
    """Standard deviation of the random values of a matrix."""
    return (0.8 if "embed" in name else 1.2) / columns**0.5


class RandomModel:
    """A random model in NumPy for tests that need a file and not transformers: the same names, shapes and spread as
    hf_model's, other values.
    """

    def __init__(self, seed: int = 0, **overrides: Any):
        settings = SETTINGS | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28} | overrides
        theta = settings.pop("rope_theta")
        settings["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"} | settings.get(
            "rope_parameters", {}
        )
        self.config = SimpleNamespace(**settings)
        rng = np.random.default_rng(seed)
        self._state = {name: self._random(rng, name, shape) for name, shape in self._shapes().items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        c = self.config
        hidden, wide = c.hidden_size, c.intermediate_size
        head_dim = getattr(c, "head_dim", hidden // c.num_attention_heads)
        q, kv = c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, hidden)}
        for n in range(c.num_hidden_layers):
            layer = f"model.layers.{n}."
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, hidden)
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
            shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, q)
            shapes |= {f"{layer}mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
            shapes[f"{layer}mlp.down_proj.weight"] = (hidden, wide)
            if getattr(c, "mlp_bias", False):
                shapes |= {f"{layer}mlp.{name}_proj.bias": (wide,) for name in ("gate", "up")}
                shapes[f"{layer}mlp.down_proj.bias"] = (hidden,)
            shapes |= {f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes["model.norm.weight"] = (hidden,)
        return shapes if c.tie_word_embeddings else shapes | {"lm_head.weight": (c.vocab_size, hidden)}

    @staticmethod
    def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            return (1 + 0.3 * values).astype(np.float32)
        return (values * (0.5 if name.endswith("bias") else deviation(name, shape[-1]))).astype(np.float32)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The weights by Hugging Face's names; tied embeddings have no lm_head."""
        return dict(self._state)

    def save_pretrained(self, folder: Path) -> None:
        """Writes config.json and model.safetensors as transformers does."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._state, folder / "model.safetensors", {"format": "pt"})
        architecture = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
        settings = architecture | {"dtype": "float32"} | vars(self.config)
        (folder / "config.json").write_text(json.dumps(settings, indent=2))


def to_hf(model: RandomModel) -> Qwen2ForCausalLM:
    """transformers' model of the same weights, as they are now."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    theirs = Qwen2ForCausalLM(Qwen2Config(**vars(model.config))).eval().float()
    weights = {name: torch.from_numpy(values.copy()) for name, values in model.state_dict().items()}
    theirs.load_state_dict(weights, strict=not model.config.tie_word_embeddings)
    return theirs


def random_blocks(rng: np.random.Generator, kind: T, shape: tuple[int, int]) -> np.ndarray:
    """Bytes of a quantized matrix: gguf-py's quantizer where it has one, else random codes with sane scales."""
    values = (rng.standard_normal(shape) / shape[1] ** 0.5).astype(np.float32)
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        pass
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(2e-3 / shape[1] ** 0.5 * 8).tobytes(), np.uint8)
    for at in {T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,), T.Q2_K: (80, 82), T.Q3_K: (108,), T.IQ4_XS: (0,)}[kind]:
        raw[..., at : at + 2] = scale
    return raw.reshape(shape[0], -1)


def write_gguf(path: Path, model: Qwen2ForCausalLM | RandomModel, kinds: dict[str, T] | T = T.F32, edit=None) -> Path:
    """Writes `model` with gguf-py; matrices take the type that `kinds` gives for their Hugging Face name, and the
    model's weights become what gguf-py reads back, so that file and model agree exactly. `edit(writer, tensors)` may
    spoil it.
    """
    config, rng = model.config, np.random.default_rng(7)
    n_heads = config.num_attention_heads
    writer = gguf.GGUFWriter(path, "qwen2")
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": n_heads,
        "head_count_kv": config.num_key_value_heads,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "layer_norm_rms_eps": config.rms_norm_eps,
    }
    for name, value in metadata.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_name("Small Random Instruct")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 3) + [3] * 3)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(IM_END)
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    tensors = {}
    state = model.state_dict()
    for hf_name, value in state.items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        kind = T.F32
        if value.ndim == 2:
            kind = kinds.get(hf_name, T.F32) if isinstance(kinds, dict) else kinds
        array = np.asarray(value)  # shares memory, with torch too
        if kind != T.F32:
            block = gguf.GGML_QUANT_SIZES[kind][0]
            assert array.shape[1] % block == 0, f"{hf_name}: rows of {array.shape[1]} for {kind.name}"
            can_quantize = kind in (T.F16, T.BF16)
            array = gguf.quants.quantize(array, kind) if can_quantize else random_blocks(rng, kind, array.shape)
            np.asarray(value)[...] = gguf.quants.dequantize(array, kind)
        tensors[name] = (array, kind)
    if edit is not None:
        edit(writer, tensors)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_folder(folder: Path, model: Qwen2ForCausalLM | RandomModel) -> Path:
    """Writes `model` as transformers does, with a tokenizer.json made by the tokenizers library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model.save_pretrained(folder)
    ordinary = TOKENS[:-3]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(ordinary)}, [tuple(merge.split()) for merge in MERGES])
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS[-3:]])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": TOKENS[IM_END], "chat_template": CHATML, "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
