"""The likeliest cause of a divergence: known mistakes are tried on the reference's own values, and one that reproduces
what our model holds, or that undone gives what the reference holds, is named. Sizes of errors are not guessed from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from qwen_mlx.backend import mx
from qwen_mlx.model.qwen2 import Qwen2

from . import mlx_side
from .comparison import to_numpy
from .taps import LAYER_TAPS, Run, split_key

Trace = Mapping[str, np.ndarray]
# A hypothesis explains a divergence if it leaves at most this relative L2, and a tenth of what there was. The rounding
# of a recomputation is far below; two unrelated causes are far above.
EXPLAINED = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.01}
EPS = (1e-5, 1e-6, 1e-8, 1e-12, 0.0, 1e-3, 1e-2)
THETAS = (1e4, 1e5, 5e5, 1e6, 1e7)
PROJECTIONS = {
    "q": ("input_norm", "self_attn.q_proj"),
    "k": ("input_norm", "self_attn.k_proj"),
    "v": ("input_norm", "self_attn.v_proj"),
    "o": ("attn", "self_attn.o_proj"),
    "gate": ("post_norm", "mlp.gate_proj"),
    "up": ("post_norm", "mlp.up_proj"),
    "down": ("act", "mlp.down_proj"),
}
DEALT = "query heads are dealt to key/value heads in turn instead of in groups"
NORMS = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm", "norm": ""}


def diagnose(model: Qwen2, run: Run, theirs: Trace, key: str, dtype: str) -> str | None:
    """Why the tap `key`, the first that diverges, holds what it holds; None if no known mistake explains it."""
    ours: dict[str, np.ndarray] = {}

    def sink(name: str, array: mx.array) -> None:
        if name.startswith(key.rpartition(".")[0]) or name == key:
            ours[name] = to_numpy(array)

    with contextlib.suppress(Exception):  # of the model's: what it reported before is looked at
        mlx_side.record(model, run, sink)
    if key not in ours:
        return None
    found = ours[key]
    if key not in theirs:
        return "our model has more layers than the reference"
    if found.shape != theirs[key].shape:
        return None
    if not np.isfinite(found).all():
        return _not_finite(found)
    if not found.any():
        return "it is all zeros: its weight was never loaded, or nothing was written there"
    limit = min(EXPLAINED[dtype], 0.1 * _distance(run.valid(found, key), run.valid(theirs[key], key)))
    best: tuple[float, str] | None = None
    for text, made, expected in _hypotheses(model, run, ours, theirs, key):
        if made.shape == found.shape:
            made, expected = run.valid(made, key), run.valid(expected, key)
        if (
            made.shape == expected.shape
            and (error := _distance(made, expected)) <= limit
            and (not best or error < best[0])
        ):
            best = error, text
    if best is None and (made := _with_own_weight(model, theirs, key)) is not None:
        made, found = (run.valid(array.reshape(found.shape), key) for array in (made, found))
        if _distance(made, found) <= limit:
            return "the operation is right: its weight or bias is not the reference's"
    return best[1] if best else None


def _distance(made: np.ndarray, expected: np.ndarray) -> float:
    size = np.linalg.norm(expected)
    error = np.linalg.norm(made.astype(np.float64) - expected)
    return float(error / size) if size and np.isfinite(error) else float("inf")


def _not_finite(array: np.ndarray) -> str:
    if np.isnan(array).all():
        return "it is NaN throughout: a weight or scale is NaN, or 0 / 0 was formed"
    if np.isinf(array).any():
        return "it overflows in this dtype, or a weight is infinite"
    return "it is NaN in places: a weight is NaN there, or 0 / 0 or inf - inf was formed"


def _dense(weights: Mapping[str, mx.array], layer: int | None) -> Callable[[str], np.ndarray | None]:
    """The model's parameter of that name, of a layer or the model's own; None if there is none or it is packed."""

    def weight(name: str) -> np.ndarray | None:
        path = name if layer is None or name.startswith(("model.", "lm_head")) else f"model.layers.{layer}.{name}"
        return to_numpy(weights[path]) if path in weights and f"{path[:-6]}scales" not in weights else None

    return weight


def _with_own_weight(model: Qwen2, theirs: Trace, key: str) -> np.ndarray | None:
    """Computes a projection, the head or a norm of the reference's input with the weight that our model holds."""
    call, layer, tap = split_key(key)
    weight, prefix = _dense(model.hf_parameters(), layer), key[: -len(tap)]
    if tap in NORMS:
        x = _norm_input(model, theirs, key).astype(np.float64)
        w = weight(_norm_weight(layer, tap))
        return None if w is None else w * x / np.sqrt((x * x).mean(-1, keepdims=True) + model.config.rms_norm_eps)
    if tap == "logits":
        head = "model.embed_tokens" if model.config.tie_word_embeddings else "lm_head"
        source, module = f"{call}.norm", head
    elif tap in PROJECTIONS:
        source, module = prefix + PROJECTIONS[tap][0], PROJECTIONS[tap][1]
    else:
        return None
    w, bias = weight(f"{module}.weight"), weight(f"{module}.bias")
    return None if w is None else theirs[source] @ w.T + (0 if bias is None else bias)


def _norm_weight(layer: int | None, tap: str) -> str:
    return "model.norm.weight" if tap == "norm" else f"model.layers.{layer}.{NORMS[tap]}.weight"


def _norm_input(model: Qwen2, theirs: Trace, key: str) -> np.ndarray:
    call, layer, tap = split_key(key)
    if tap == "post_norm":
        return theirs[f"{call}.layers.{layer}.attn_residual"]
    before = model.config.num_hidden_layers - 1 if tap == "norm" else layer - 1
    return theirs[f"{call}.layers.{before}.residual" if before >= 0 else f"{call}.embeddings"]


Hypothesis = tuple[str, np.ndarray, np.ndarray]  # text, what it makes, what it must equal


def _hypotheses(model: Qwen2, run: Run, ours: Trace, theirs: Trace, key: str) -> Iterator[Hypothesis]:
    call, layer, tap = split_key(key)
    prefix = key[: -len(tap)]
    found, expected = ours[key], theirs[key]
    yield from _elsewhere(theirs, prefix, key, found, layer)
    weights = model.hf_parameters()
    weight = _dense(weights, layer)
    if tap in PROJECTIONS:
        source, module = PROJECTIONS[tap]
        yield from _projection(weight, module, theirs[prefix + source], found, expected, model)
    elif tap in NORMS:
        yield from _norm(model, weight, theirs, prefix, layer, tap, found)
    elif tap in ("q_rope", "k_rope"):
        yield from _rope(model, theirs[prefix + tap[0]].reshape(found.shape), run, call, found, expected)
    elif tap == "probs":
        for text, probs in _score_variants(theirs[prefix + "q_rope"], theirs[prefix + "cache_k"], run):
            yield text, probs, found
    elif tap == "attn":
        yield from _attn(theirs, prefix, run, found)
    elif tap == "act":
        yield from _act(theirs[prefix + "gate"], theirs[prefix + "up"], found)
    elif tap in ("attn_residual", "residual"):
        parts = ("o", "input_norm") if tap == "attn_residual" else ("down", "post_norm")
        yield (
            "the residual is the norm's output, not the stream before it",
            sum(theirs[prefix + p] for p in parts),
            found,
        )
        yield "the residual is added twice", 2 * expected - theirs[prefix + parts[0]], found
    elif tap == "logits":
        yield from _logits(weights, theirs[f"{call}.norm"], found)
    factor = float((found * expected).sum() / max(float((expected * expected).sum()), 1e-300))
    if abs(factor - 1) > 1e-3:
        yield f"it is the reference times {factor:.6g}", factor * expected, found
    if found.ndim == 3 and found.shape[1] > 2:
        yield "positions are shifted by one", np.roll(expected, 1, 1)[:, 1:], found[:, 1:]
        yield "positions are shifted by one, the other way", np.roll(expected, -1, 1)[:, :-1], found[:, :-1]


def _elsewhere(theirs: Trace, prefix: str, key: str, found: np.ndarray, layer: int | None) -> Iterator[Hypothesis]:
    """Ours may hold what the reference has at another tap: swapped weights, a step left out, the wrong layer."""
    tap = key.rpartition(".")[2]
    places = {} if layer is None else {f"{prefix}{other}": f"{other}" for other in LAYER_TAPS if other != tap}
    call = key.partition(".")[0]
    for other in theirs:
        if other.startswith(f"{call}.layers.") and other.endswith(f".{tap}") and other != key:
            places[other] = f"{tap} of layer {split_key(other)[1]}"
    places[f"{call}.embeddings"] = "embeddings"
    if layer is None:
        last = max((split_key(name)[1] or 0 for name in theirs), default=0)
        places[f"{call}.layers.{last}.residual"] = "residual of the last layer"
    for place, name in places.items():
        if place in theirs and place != key and theirs[place].size == found.size:
            if tap.endswith("_rope") and call != "0" and found.shape[1] == 1:
                continue  # a single token turned by nothing is one turned from position 0: see _rope
            text = f"it holds what the reference has as {name}"
            if {tap, name} in ({"gate", "up"}, {"q", "k"}, {"k", "v"}, {"q", "v"}):
                text = f"{tap} and {name} are swapped"
            elif (name == tap[:1] or "residual" in name) and tap.endswith(("_rope", "norm")):
                text = f"{'RoPE' if tap.endswith('_rope') else 'the norm'} was left out ({text})"
            yield text, theirs[place].reshape(found.shape), found


def _projection(
    weight: Any, module: str, x: np.ndarray, found: np.ndarray, expected: np.ndarray, model: Qwen2
) -> Iterator[Hypothesis]:
    w, bias = weight(f"{module}.weight"), weight(f"{module}.bias")
    # Undoing the mistake must give the reference: its own weights are not at hand.
    rows = expected - found
    mean = rows.reshape(-1, rows.shape[-1]).mean(0)
    if rows.size > rows.shape[-1] and (bias is None or not bias.any()):
        yield "its bias is missing", found + mean, expected
    if w is None:
        return
    b = 0.0 if bias is None else bias
    if w.shape[0] == w.shape[1]:
        yield "its square weight is transposed", x @ w + b, expected
    else:
        yield "its weight was read in the order of the transpose", x @ w.reshape(w.shape[::-1]) + b, expected
    if bias is not None:
        yield "its bias has the wrong sign", x @ w.T - b, expected
        yield "its bias is subtracted", x @ w.T - b, found
        yield "its bias is added twice", x @ w.T + 2 * b, found
        yield "its bias was left out of the computation", x @ w.T, found
    config = model.config
    if module.endswith(("q_proj", "k_proj")):
        half = config.head_dim // 2
        heads = w.shape[0] // config.head_dim
        for text, shape in (("", (heads, half, 2)), (" back", (heads, 2, half))):
            undone = w.reshape(*shape, -1).swapaxes(1, 2).reshape(w.shape)
            yield (
                f"its rows are permuted{text} for interleaved RoPE, as llama.cpp does for Llama",
                x @ undone.T + b,
                expected,
            )
            turned = np.reshape(b, shape).swapaxes(1, 2).reshape(-1) if bias is not None else b
            yield f"weight and bias are permuted{text} for interleaved RoPE", x @ undone.T + turned, expected


def _norm(
    model: Qwen2, weight: Any, theirs: Trace, prefix: str, layer: int | None, tap: str, found: np.ndarray
) -> Iterator[Hypothesis]:
    x, own = _norm_input(model, theirs, prefix + tap).astype(np.float64), _norm_weight(layer, tap)
    w = weight(own)
    square, mean, eps = (x * x).mean(-1, keepdims=True), x.mean(-1, keepdims=True), model.config.rms_norm_eps
    normed = x / np.sqrt(square + eps)
    right, expected = _distance(w * normed, found), theirs[prefix + tap]
    if right < 1e-3:  # the formula is right, so the weight is not
        if (w == 1).all():
            yield "its weight is not applied: it is all ones", w * normed, found
        yield "its weight is applied as 1 + weight, as in Gemma", (w - 1) * normed, expected
        for name, other in model.hf_parameters().items():
            if name.endswith("norm.weight") and name != own:
                yield (
                    f"its weight and another's are swapped: {name} is what belongs here",
                    to_numpy(other) * normed,
                    expected,
                )
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes = {other: np.sqrt(square + other) for other in EPS if other != eps}
        for other, size in sizes.items():
            yield f"eps is {eps:g}, the reference's {other:g}", w * x / size, expected
        texts = {f"eps is {other:g}, expected {eps:g}": size for other, size in sizes.items()}
        for text, size in {**texts, "eps is added outside the root": np.sqrt(square) + eps}.items():
            if _distance(w * x / size, found) <= 0.1 * right:  # else any eps explains what none has done
                yield text, w * x / size, found
    yield "its weight is not applied", normed, found
    yield "its weight is applied as 1 + weight, as in Gemma", (1 + w) * normed, found
    yield "it is LayerNorm: the mean is subtracted", w * (x - mean) / np.sqrt(x.var(-1, keepdims=True) + eps), found
    yield "the sum of squares is not divided by the size", w * x / np.sqrt((x * x).sum(-1, keepdims=True) + eps), found


def _rope(
    model: Qwen2, x: np.ndarray, run: Run, call: int, found: np.ndarray, expected: np.ndarray
) -> Iterator[Hypothesis]:
    rotary = model.model.rotary
    half = x.shape[-1] // 2
    inv_freq = np.array(rotary.inv_freq)
    positions, past = run.positions(call)[..., None], sum(run.chunks[:call])

    def turn(angles: np.ndarray, interleaved: bool = False, scale: float = 1.0) -> np.ndarray:
        cos, sin = np.cos(angles)[..., None, :] * scale, np.sin(angles)[..., None, :] * scale
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
        parts = a * cos - b * sin, b * cos + a * sin
        return np.stack(parts, -1).reshape(x.shape) if interleaved else np.concatenate(parts, -1)

    known = [theta for theta in THETAS if theta != model.config.rope_theta]
    thetas = {f"theta is {theta:g}": theta ** -(np.arange(half) / half) for theta in known}
    frequencies = {"": inv_freq, **thetas}
    for text, freq in frequencies.items():
        angles = positions * freq
        suffix = f", with {text}" if text else ""
        if text:
            yield f"RoPE's {text}, expected {model.config.rope_theta:g}", turn(angles), found
            yield f"RoPE's theta is {model.config.rope_theta:g}, the reference's {text[9:]}", turn(angles), expected
        yield f"RoPE pairs neighbours instead of halves{suffix}", turn(angles, interleaved=True), found
        yield f"RoPE turns the wrong way{suffix}", turn(-angles), found
    for shift in (1, -1):
        yield f"RoPE's positions are off by {shift}", turn((positions + shift) * inv_freq), found
    if past:
        yield (
            "RoPE's positions start at 0 in every call: the cache's offset is not used",
            turn((positions - past) * inv_freq),
            found,
        )
    if run.padding:
        columns = np.arange(past, past + x.shape[1])[:, None]
        yield "RoPE's positions count the padding", turn(columns * inv_freq), found
    plain = model.config.rope_theta ** -(np.arange(half) / half)
    if model.config.rope_scaling is not None:
        if not np.allclose(inv_freq, plain):
            yield "YaRN's factor on cosine and sine is missing", turn(positions * inv_freq), found
        yield "the configuration's RoPE scaling is not applied", turn(positions * plain), found


def _softmax(scores: np.ndarray) -> np.ndarray:
    power = np.exp(scores - scores.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def _score_variants(q: np.ndarray, keys: np.ndarray, run: Run) -> Iterator[tuple[str, np.ndarray]]:
    """(mistake, the probabilities it gives). q (B, L, H, D), keys (B, S, K, D)."""
    length, heads, size = q.shape[1:]
    seen, kv_heads = keys.shape[1:3]
    ahead = np.arange(seen)[None] - np.arange(seen - length, seen)[:, None]

    def mask(hidden: np.ndarray) -> np.ndarray:
        return np.where(hidden, -np.inf, 0.0)[:, None, :]

    causal = mask(ahead > 0)
    scores = np.einsum("blhd,bshd->blhs", q.astype(np.float64), np.repeat(keys, heads // kv_heads, 2))
    scale = size**-0.5
    if length > 1:
        yield "there is no causal mask", _softmax(scores * scale)
        yield "the causal mask is off by one: each token sees the next", _softmax(scores * scale + mask(ahead > 1))
        blind = mask((ahead >= 0) & (np.arange(seen) > 0))
        yield "the causal mask is off by one: no token sees itself", _softmax(scores * scale + blind)
    missing = "the mask of the padding is missing" if run.padding else "the sliding window is missing"
    yield f"{missing}: every earlier key is seen", _softmax(scores * scale + causal)
    yield "scores are not scaled by 1 / sqrt(head_dim)", _softmax(scores + causal)
    yield "scores are scaled twice", _softmax(scores * scale**2 + causal)
    yield "scores are scaled by 1 / sqrt(hidden_size)", _softmax(scores * (size * heads) ** -0.5 + causal)
    if 1 < kv_heads < heads:
        tiled = np.einsum("blhd,bshd->blhs", q.astype(np.float64), np.tile(keys, (1, 1, heads // kv_heads, 1)))
        yield DEALT, _softmax(tiled * scale + causal)


def _attn(theirs: Trace, prefix: str, run: Run, found: np.ndarray) -> Iterator[Hypothesis]:
    """found (B, L, H D). A fused operation makes its own probabilities, so mistakes in those show here too."""
    q, probs, keys, values = (theirs[prefix + tap] for tap in ("q_rope", "probs", "cache_k", "cache_v"))
    groups = probs.shape[2] // values.shape[2]
    repeated, tiled = np.repeat(values, groups, 2), np.tile(values, (1, 1, groups, 1))

    def out(weights: np.ndarray, values: np.ndarray, order: str = "blhd") -> np.ndarray:
        return np.einsum(f"blhs,bshd->{order}", weights, values).reshape(found.shape)

    yield "query heads are dealt to value heads in turn instead of in groups", out(probs, tiled), found
    yield "the output's heads and their elements are transposed", out(probs, repeated, "bldh"), found
    for text, variant in _score_variants(q, keys, run):
        yield text, out(variant, tiled if text == DEALT else repeated), found


def _act(gate: np.ndarray, up: np.ndarray, found: np.ndarray) -> Iterator[Hypothesis]:
    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 0.5 * (1 + np.tanh(x / 2))

    tanh_gelu = 0.5 * gate * (1 + np.tanh(0.7978845608028654 * (gate + 0.044715 * gate**3)))
    yield "silu is applied to up instead of gate", gate * up * sigmoid(up), found
    yield "silu is missing", gate * up, found
    yield "gelu stands for silu", tanh_gelu * up, found
    yield "the quick gelu stands for silu", gate * sigmoid(1.702 * gate) * up, found
    yield "relu stands for silu", np.maximum(gate, 0) * up, found
    yield "sigmoid stands for silu", sigmoid(gate) * up, found
    yield "up is added instead of multiplied", gate * sigmoid(gate) + up, found
    yield "up is left out", gate * sigmoid(gate), found


def _logits(weights: Mapping[str, Any], norm: np.ndarray, found: np.ndarray) -> Iterator[Hypothesis]:
    embeddings = weights.get("model.embed_tokens.weight")
    if "lm_head.weight" in weights and embeddings is not None:
        yield (
            "the head uses the embeddings though the model has a head of its own",
            norm @ to_numpy(embeddings).T,
            found,
        )
