"""Qwen2.5 of the published sizes with random weights: what the benchmarks run where no file is present."""

from __future__ import annotations

from qwen_mlx import ModelConfig, Qwen2, ops
from qwen_mlx.backend import mx, nn
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.model.layers import QuantizedEmbedding, QuantizedLinear
from qwen_mlx.text.tokenizer import Tokenizer
from qwen_mlx.text.vocabulary import byte_level

# hidden, intermediate, layers, heads, kv heads, vocabulary, tied: Qwen2.5's published config.json files
SHAPES = {
    "tiny": (256, 512, 2, 4, 2, 1000, False),  # no published size: to try the benchmarks
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
}


def config_of(size: str) -> ModelConfig:
    """The configuration of a published size."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[size]
    return ModelConfig(
        hidden, intermediate, layers, heads, kv_heads, hidden // heads, vocabulary, 1e-6, 1e6, 32768, tied
    )


def dtype() -> mx.Dtype:
    """The dtype that load() gives weights on the current default device."""
    return mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16


def random_model(size: str, bits: int | None) -> Qwen2:
    """Weights small enough for finite activations; with `bits`, matrices packed in groups of 64."""
    model = Qwen2(config_of(size))
    model.set_dtype(dtype())
    mx.eval(model.parameters())
    if bits:
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            arrays = mx.quantize(module.weight, group_size=64, bits=bits)
            rows, columns = module.weight.shape
            matrix = ops.Matrix(ops.Packing("affine", bits, 64), rows, columns, tuple(arrays))
            new = QuantizedEmbedding(matrix, dtype()) if isinstance(module, nn.Embedding) else QuantizedLinear(matrix)
            if "bias" in module:
                new.bias = module.bias
            mx.eval(new.parameters())
            *path, last = name.split(".")
            parent = model
            for part in path:
                parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
            setattr(parent, last, new)
    return model


def raw_model(size: str) -> Qwen2:
    """Random Q4_K and Q6_K blocks as in llama.cpp's Q4_K_M: Q6_K for the head and, in half of the layers, v and
    down_proj. Raises QwenMLXError for a size whose rows are no whole blocks of 256."""
    config = config_of(size)
    if config.hidden_size % 256:
        raise QwenMLXError(f"{size} has rows of {config.hidden_size} elements, which Q4_K packs by 256: take 1.5B.")
    model = Qwen2(config)
    model.set_dtype(dtype())
    vocabulary, hidden, intermediate = config.vocab_size, config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    model.model.embed_tokens = QuantizedEmbedding(random_blocks("q4_k", vocabulary, hidden), dtype())
    if not config.tie_word_embeddings:
        model.lm_head = QuantizedLinear(random_blocks("q6_k", vocabulary, hidden))
    for n, layer in enumerate(model.model.layers):
        eighth = config.num_hidden_layers // 8
        finer = "q6_k" if n < eighth or n >= 7 * eighth or (n - eighth) % 3 == 2 else "q4_k"
        attention, mlp = layer.self_attn, layer.mlp
        for owner, name, kind, rows, columns in (
            (attention, "q_proj", "q4_k", hidden, hidden),
            (attention, "k_proj", "q4_k", kv, hidden),
            (attention, "v_proj", finer, kv, hidden),
            (attention, "o_proj", "q4_k", hidden, hidden),
            (mlp, "gate_proj", "q4_k", intermediate, hidden),
            (mlp, "up_proj", "q4_k", intermediate, hidden),
            (mlp, "down_proj", finer, hidden, intermediate),
        ):
            new = QuantizedLinear(random_blocks(kind, rows, columns))
            if "bias" in owner[name]:
                new.bias = owner[name].bias
            owner[name] = new
        mx.eval(model.parameters())
    return model


def byte_tokenizer(size: int) -> Tokenizer:
    """A vocabulary of `size` tokens that reads a text as its bytes; the other tokens are words for what random weights
    write, and the last one ends a text."""
    from tokenizers import pre_tokenizers

    end = "<|endoftext|>"
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"word{i}" for i in range(size - 257)), end]
    ids = {name: i for i, name in enumerate(names[:-1])}
    return Tokenizer(byte_level(ids, []), names, {end: size - 1}, [end], [size - 1], {})


def random_blocks(kind: str, rows: int, columns: int) -> ops.Matrix:
    """A matrix of random codes, and scales that keep its values within 0.05."""
    words = lambda *shape: mx.random.randint(0, 2**31 - 1, shape).astype(mx.uint32)  # noqa: E731
    if kind == "q4_k":
        blocks = words(rows, columns // 256, 36)
        blocks[..., 0] = mx.array([5e-5, 5e-5 * 7.5], mx.float16).view(mx.uint32)
        return ops.Matrix(ops.Packing(kind), rows, columns, (blocks,))
    parts = [words(rows, columns // share) for share in (8, 16, 64)]
    factors = mx.full((rows, columns // 256), 1e-5, mx.float16)
    return ops.Matrix(ops.Packing(kind), rows, columns, (*parts, factors))
