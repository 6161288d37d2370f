"""The shape of a Qwen2 model, read from GGUF metadata or from a Hugging Face config.json, and validated. A GGUF must
say everything; what a config.json leaves out is what transformers takes for it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import GGUFError, QwenMLXError, refuses_wrong_arguments
from ..gguf.reader import GGUFFile
from ..text.files import read_json

SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
)
# transformers' values for what config.json leaves out (Qwen2Config).
HF_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MAX_LAYERS = 1000  # the largest Qwen2 has 80
TRAINED_CONTEXT = 32768  # tokens: what Qwen2.5 was trained on, and its documentation's original_max_position_embeddings
DOCUMENTED_YARN = 4  # Qwen's documentation: 131,072 tokens
LARGEST_CONTEXT = DOCUMENTED_YARN * TRAINED_CONTEXT  # tokens that config.json gives a Qwen2.5 but for Qwen2.5-1M
MOST_YARN = 32  # the largest factor of Peng et al. 2023
# A GGUF's rotary settings that are read here (None), or may only have the value that changes nothing.
GGUF_ROPE_FIELDS: dict[str, float | None] = {
    **dict.fromkeys(("rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type")),
    **dict.fromkeys(("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned")),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")),
    **dict.fromkeys(("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")),
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}


@dataclass(frozen=True)
class RopeScaling:
    """The way to positions beyond the trained context. Field names as in Hugging Face's config.json.

    `type` is "linear" (positions divided by `factor`) or "yarn" (Peng et al. 2023, arXiv:2309.00071).
    `attention_factor` None means YaRN's own 0.1 ln(factor) + 1.
    """

    type: str
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            optional = name == "attention_factor" and value is None
            if not optional and (not _is_number(value) or value <= 0):
                raise QwenMLXError(f"rope scaling's {name} is {value!r}, expected a positive number.")
        if self.beta_fast < self.beta_slow:
            raise QwenMLXError(
                f"rope scaling's beta_fast is {self.beta_fast!r} and its beta_slow {self.beta_slow!r}, expected the "
                "larger one first; swap them."
            )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that tells one Qwen2 checkpoint from another; sizes are in elements, context in tokens."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None
    mlp_bias: bool = False
    o_proj_bias: bool = False
    lm_head_bias: bool = False
    sliding_window: int | None = None  # tokens, for the layers from max_window_layers on
    max_window_layers: int = 0
    is_causal: bool = True  # False: each token sees all others, in some embedding models

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise QwenMLXError(f"{name} is {value!r}, expected a positive integer.")
        if self.num_hidden_layers > MAX_LAYERS:
            raise QwenMLXError(f"num_hidden_layers is {self.num_hidden_layers}, expected at most {MAX_LAYERS}.")
        if self.sliding_window is not None and (not isinstance(self.sliding_window, int) or self.sliding_window < 1):
            raise QwenMLXError(f"sliding_window is {self.sliding_window!r}, expected a positive integer.")
        if not isinstance(self.max_window_layers, int):
            raise QwenMLXError(f"max_window_layers is {self.max_window_layers!r}, expected an integer.")
        for name in ("tie_word_embeddings", "mlp_bias", "o_proj_bias", "lm_head_bias", "is_causal"):
            if not isinstance(getattr(self, name), bool):
                raise QwenMLXError(f"{name} is {getattr(self, name)!r}, expected true or false.")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise QwenMLXError(f"{name} is {value!r}, expected a positive number.")
        if self.rope_theta <= 1:
            raise QwenMLXError(f"rope_theta is {self.rope_theta!r}, expected more than 1 (Qwen2.5 has 1000000).")
        if self.num_attention_heads % self.num_key_value_heads:
            raise QwenMLXError(
                f"num_attention_heads is {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise QwenMLXError(f"head_dim is {self.head_dim}, expected an even number (RoPE rotates pairs).")

    @property
    def context_length(self) -> int:
        """Tokens the model can attend to: with rope scaling its factor times the original, as Qwen documents YaRN."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        extended = int(self.rope_scaling.original_max_position_embeddings * self.rope_scaling.factor)
        return max(self.max_position_embeddings, extended)

    @property
    def _yarn_original(self) -> int:
        if self.rope_scaling is not None:
            return self.rope_scaling.original_max_position_embeddings
        if self.max_position_embeddings > LARGEST_CONTEXT:  # Qwen2.5-1M, which was trained on all of it
            return self.max_position_embeddings
        return min(self.max_position_embeddings, TRAINED_CONTEXT)

    @refuses_wrong_arguments
    def with_yarn(self, factor: float) -> ModelConfig:
        """The same model with YaRN by `factor`, as Qwen documents it: from the 32,768 tokens that Qwen2.5 was trained
        on (fewer if the model has fewer; what its own YaRN says) to `factor` times as many. Short texts lose a little.

        Raises QwenMLXError for a factor that is not above 1 and at most 32, a model with other scaling, or one whose
        context is already as long.
        """
        if not _is_number(factor) or not 1 < factor <= MOST_YARN:
            raise QwenMLXError(f"yarn is {factor!r}, expected more than 1 and at most {MOST_YARN}; Qwen documents 4.")
        own = self.rope_scaling
        if own is not None and own.type != "yarn":
            raise QwenMLXError(f"yarn is {factor:g}, but the model has {own.type} rope scaling; leave yarn out.")
        extended = int(self._yarn_original * factor)
        if extended <= self.max_position_embeddings and own is None:
            raise QwenMLXError(
                f"yarn is {factor:g}, which gives {extended} tokens, but the model's context is "
                f"{self.max_position_embeddings} already; leave yarn out."
            )
        beta = {} if own is None else {"beta_fast": own.beta_fast, "beta_slow": own.beta_slow}
        scaling = RopeScaling("yarn", float(factor), self._yarn_original, **beta)
        return replace(self, rope_scaling=scaling, max_position_embeddings=self._yarn_original)

    @refuses_wrong_arguments
    def suggest_yarn(self, n_tokens: int) -> str:
        """The advice that makes room for `n_tokens`: the end of an error's sentence."""
        factor = max(DOCUMENTED_YARN, math.ceil(n_tokens / self._yarn_original))
        scaled = self.rope_scaling is not None and (self.rope_scaling.type != "yarn")
        scaled = scaled or self.max_position_embeddings > LARGEST_CONTEXT  # no one documents YaRN for Qwen2.5-1M
        if scaled or factor > MOST_YARN or int(factor * self._yarn_original) <= self.context_length:
            return "shorten it"
        return f"shorten it, or extend the context with --yarn {factor} (in Python: load(..., yarn={factor}))"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face's parameter names and shapes, (out, in) for matrices, in the order of the forward pass."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}"
            shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
            for name, size in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                shapes[f"{layer}.self_attn.{name}.weight"] = (size, hidden)
                shapes[f"{layer}.self_attn.{name}.bias"] = (size,)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q)
            if self.o_proj_bias:
                shapes[f"{layer}.self_attn.o_proj.bias"] = (hidden,)
            shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
            for name, size, width in (("gate_proj", mlp, hidden), ("up_proj", mlp, hidden), ("down_proj", hidden, mlp)):
                shapes[f"{layer}.mlp.{name}.weight"] = (size, width)
                if self.mlp_bias:
                    shapes[f"{layer}.mlp.{name}.bias"] = (size,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
            if self.lm_head_bias:
                shapes["lm_head.bias"] = (self.vocab_size,)
        return shapes

    def to_hf(self) -> dict[str, Any]:
        """The same as a Hugging Face config.json of a Qwen2ForCausalLM."""
        config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", **asdict(self)}
        config["use_sliding_window"] = self.sliding_window is not None
        for name in ("mlp_bias", "o_proj_bias", "lm_head_bias"):
            if not config[name]:
                del config[name]
        if self.is_causal:
            del config["is_causal"]
        scaling = {key: value for key, value in (config.pop("rope_scaling") or {}).items() if value is not None}
        if scaling:
            config["rope_scaling"] = {"rope_type": scaling.pop("type"), **scaling}
        return config

    def to_gguf(self) -> dict[str, Any]:
        """The same as the `qwen2.*` metadata of a GGUF; what its tensors say is left out. Raises QwenMLXError for a
        sliding window, which llama.cpp's Qwen2 does not have."""
        if self.sliding_window is not None and self.max_window_layers < self.num_hidden_layers:
            raise QwenMLXError(
                f"layers from {self.max_window_layers} on attend within {self.sliding_window} tokens, which a GGUF of "
                "this architecture cannot say; use the folder as it is."
            )
        fields: dict[str, Any] = {
            "block_count": self.num_hidden_layers,
            "context_length": self.max_position_embeddings,
            "embedding_length": self.hidden_size,
            "feed_forward_length": self.intermediate_size,
            "attention.head_count": self.num_attention_heads,
            "attention.head_count_kv": self.num_key_value_heads,
            "rope.freq_base": float(self.rope_theta),
            "attention.layer_norm_rms_epsilon": float(self.rms_norm_eps),
        }
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
            fields |= dict.fromkeys(names, self.head_dim)
        if self.rope_scaling is not None:
            scaling = self.rope_scaling
            fields |= {
                "rope.scaling.type": scaling.type,
                "rope.scaling.factor": float(scaling.factor),
                "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
            }
            if scaling.attention_factor is not None:
                own = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0  # see from_gguf
                fields["rope.scaling.attn_factor"] = scaling.attention_factor / own
            if (scaling.beta_fast, scaling.beta_slow) != (32, 1):
                betas = (float(scaling.beta_fast), float(scaling.beta_slow))
                fields |= dict(zip(("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"), betas))
        if not self.is_causal:
            fields["attention.causal"] = False
        return {f"qwen2.{name}": value for name, value in fields.items()}

    @classmethod
    @refuses_wrong_arguments
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Reads the `qwen2.*` metadata; vocabulary size, tied head and FFN biases are what the tensors say.

        Raises GGUFError naming the key for another architecture, a missing key or a value of the wrong type.
        """
        metadata, where = file.metadata, file.path
        architecture = metadata.get("general.architecture")
        if architecture != "qwen2":
            raise GGUFError(
                f"{where}: general.architecture is {architecture!r}, expected 'qwen2' (Qwen2, Qwen2.5 and the "
                "distillations that share it); llama.cpp runs others."
            )

        def get(key: str, kind: type, default: Any = None, required: bool = True) -> Any:
            value = metadata.get(f"qwen2.{key}", default)
            if value is None and required:
                raise GGUFError(f"{where}: metadata field 'qwen2.{key}' is missing; convert the model again.")
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise GGUFError(f"{where}: metadata field 'qwen2.{key}' is {value!r}, expected {kind.__name__}.")
            return value

        embeddings = file.tensors.get("token_embd.weight")
        if embeddings is None or len(embeddings.shape) != 2:
            raise GGUFError(
                f"{where}: tensor 'token_embd.weight' (vocabulary, hidden) is missing; convert the model again."
            )
        hidden_size = get("embedding_length", int)
        num_attention_heads = get("attention.head_count", int)
        head_dim = get(
            "attention.key_length", int, hidden_size // num_attention_heads if num_attention_heads > 0 else 0
        )
        if get("attention.value_length", int, head_dim) != head_dim:
            raise GGUFError(
                f"{where}: qwen2.attention.value_length differs from the key length, {head_dim}; Qwen2 has one."
            )
        neutral = {f"qwen2.{name}": value for name, value in GGUF_ROPE_FIELDS.items()}
        for key, value in metadata.items():
            if key.startswith("qwen2.rope.") and neutral.get(key, value) is not None and neutral.get(key) != value:
                raise GGUFError(
                    f"{where}: metadata field {key!r:.80} is {value!r:.80}, a rotary setting that no qwen2 model has; "
                    "convert the model again."
                )
        rope_dim = get("rope.dimension_count", int, head_dim)
        if rope_dim != head_dim:
            raise GGUFError(f"{where}: qwen2.rope.dimension_count is {rope_dim}, expected the head size {head_dim}.")
        context_length = get("context_length", int)
        num_hidden_layers = get("block_count", int)
        if num_hidden_layers > len(file.tensors):  # before anything is made for each layer
            raise GGUFError(
                f"{where}: metadata field 'qwen2.block_count' is {num_hidden_layers}, but the file holds "
                f"{len(file.tensors)} tensors; it is damaged, download it again."
            )
        # llama.cpp reads them so: a factor without a type is linear, and 0 is none.
        scaling, scaling_type = None, metadata.get("qwen2.rope.scaling.type", "linear")
        if scaling_type not in ("none", "linear", "yarn"):
            raise GGUFError(
                f"{where}: qwen2.rope.scaling.type is {scaling_type!r}, expected 'none', 'linear' or 'yarn'."
            )
        old_factor = get("rope.scale_linear", float, required=False)
        factor = get("rope.scaling.factor", float, old_factor, required=False) or 1.0
        try:
            if scaling_type == "yarn" or (scaling_type == "linear" and factor != 1):
                own = get("rope.scaling.attn_factor", float, required=False)
                second = get("rope.scaling.yarn_attn_factor", float, required=False)
                own = second if own is None else own * (1.0 if second is None else second)  # ggml multiplies both
                scaling = RopeScaling(
                    type=scaling_type,
                    factor=factor,
                    original_max_position_embeddings=get("rope.scaling.original_context_length", int, context_length),
                    # ggml multiplies YaRN's own factor by the file's; transformers' replaces it.
                    attention_factor=own * (0.1 * math.log(factor) + 1) if own and factor > 1 else own,
                    beta_fast=get("rope.scaling.yarn_beta_fast", float, 32.0),
                    beta_slow=get("rope.scaling.yarn_beta_slow", float, 1.0),
                )
            return cls(
                hidden_size=hidden_size,
                intermediate_size=get("feed_forward_length", int),
                num_hidden_layers=num_hidden_layers,
                num_attention_heads=num_attention_heads,
                num_key_value_heads=get("attention.head_count_kv", int),
                head_dim=head_dim,
                vocab_size=embeddings.shape[0],
                rms_norm_eps=get("attention.layer_norm_rms_epsilon", float),
                rope_theta=get("rope.freq_base", float),
                max_position_embeddings=context_length,
                # A head with a bias is one of its own, even where its matrix is the embedding's.
                tie_word_embeddings=not {"output.weight", "output.bias"} & file.tensors.keys(),
                rope_scaling=scaling,
                mlp_bias=any(f"blk.0.ffn_{name}.bias" in file.tensors for name in ("gate", "up", "down")),
                o_proj_bias="blk.0.attn_output.bias" in file.tensors,
                lm_head_bias="output.bias" in file.tensors,
                is_causal=metadata.get("qwen2.attention.causal", True),
            )
        except GGUFError:
            raise
        except QwenMLXError as error:
            raise GGUFError(f"{where}: {error}") from None

    @classmethod
    @refuses_wrong_arguments
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads `config.json` as transformers writes it, before and since version 5 (`rope_parameters`).

        Raises QwenMLXError naming the file and the key.
        """
        path = folder / "config.json"
        if not path.exists():
            ggufs = sorted(file.name for file in folder.glob("*.gguf"))
            hint = f"; give the file in it: {ggufs[0]}" if ggufs else ""
            raise QwenMLXError(f"{folder}: has no config.json, so it is not a model folder{hint}.")
        raw = read_json(path)

        def get(key: str, default: Any = None) -> Any:
            value = raw.get(key, default)
            return HF_DEFAULTS[key] if value is None else value

        if raw.get("model_type") != "qwen2":
            raise QwenMLXError(
                f"{path}: model_type is {raw.get('model_type')!r}, expected 'qwen2' (Qwen2, Qwen2.5 and the "
                "distillations that share it); mlx-lm runs others."
            )
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
            raise QwenMLXError(f"{path}: hidden_act is {raw['hidden_act']!r}, expected 'silu'.")
        rope: dict[str, Any] = {}
        for name in ("rope_parameters", "rope_scaling"):  # what is edited by hand, as Qwen's README says, wins
            given = raw.get(name) or {}
            if not isinstance(given, dict):
                raise QwenMLXError(f"{path}: the rope parameters are {given!r}, expected an object.")
            by_layer = sorted(key for key, value in given.items() if isinstance(value, dict))
            if by_layer:
                raise QwenMLXError(
                    f"{path}: {name} has settings by kind of layer ({by_layer[0]!r:.80}), expected one for all; no "
                    "Qwen2 has several."
                )
            theta = raw.get("rope_theta")
            if given and "rope_theta" in rope and "rope_theta" not in given and theta is None:
                theta = rope["rope_theta"]
                warnings.warn(
                    f"{path}: rope_scaling has no 'rope_theta', so rope_parameters' {theta!r:.20} counts; transformers "
                    f"would take {HF_DEFAULTS['rope_theta']:g}: move the settings into rope_parameters.",
                    stacklevel=2,
                )
            rope = ({} if theta is None else {"rope_theta": theta}) | given if given else rope
        if not isinstance(raw.get("use_sliding_window", False), bool):
            raise QwenMLXError(f"{path}: use_sliding_window is {raw['use_sliding_window']!r}, expected true or false.")
        rope_theta = rope.get("rope_theta", get("rope_theta"))
        try:
            sizes = {name: get(name) for name in SIZES if name != "head_dim"}
            if raw.get("num_key_value_heads", HF_DEFAULTS) is None:
                sizes["num_key_value_heads"] = sizes["num_attention_heads"]
            config = cls(
                **sizes,
                head_dim=raw.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"],
                rms_norm_eps=get("rms_norm_eps"),
                rope_theta=rope_theta,
                tie_word_embeddings=get("tie_word_embeddings"),
                rope_scaling=_rope_scaling(rope, sizes["max_position_embeddings"], path),
                mlp_bias=raw.get("mlp_bias", False),
                o_proj_bias=raw.get("o_proj_bias", False),
                lm_head_bias=raw.get("lm_head_bias", False),
                sliding_window=raw.get("sliding_window") if raw.get("use_sliding_window") else None,
                max_window_layers=raw.get("max_window_layers", 28),  # transformers' default
                is_causal=raw.get("is_causal", not _is_gte(raw)),
            )
            _check_layer_types(raw.get("layer_types"), config)
            return config
        except (QwenMLXError, TypeError, ZeroDivisionError, OverflowError) as error:
            message = str(error)
            raise QwenMLXError(message if str(path) in message else f"{path}: {message}") from None


def _is_gte(raw: Mapping[str, Any]) -> bool:
    """True for gte-Qwen2, whose own code (modeling_qwen.py) attends in both directions unless told otherwise."""
    classes = raw.get("auto_map")
    return isinstance(classes, dict) and str(classes.get("AutoModel")).endswith("modeling_qwen.Qwen2Model")


def _rope_scaling(rope: Mapping[str, Any], context_length: int, path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "yarn"):
        raise QwenMLXError(
            f"{path}: rope type is {kind!r:.80}, expected 'default', 'linear' or 'yarn'; mlx-lm runs others."
        )
    if rope.get("truncate", True) is not True:
        raise QwenMLXError(
            f"{path}: rope scaling sets 'truncate' to {rope['truncate']!r}, which Qwen2.5 models do not use."
        )
    if "factor" not in rope:
        raise QwenMLXError(f"{path}: rope scaling of type {kind!r} has no 'factor'.")
    optional = {key: rope[key] for key in ("attention_factor", "beta_fast", "beta_slow") if rope.get(key) is not None}
    original = rope.get("original_max_position_embeddings") or context_length
    factor = rope["factor"]
    if factor is None and kind == "yarn" and _is_number(original) and original > 0:
        factor = context_length / original
    scales = {key: rope[key] for key in ("mscale", "mscale_all_dim") if rope.get(key) is not None}
    if scales and not (kind == "yarn" and len(scales) == 2 and all(_is_number(v) and v > 0 for v in scales.values())):
        raise QwenMLXError(
            f"{path}: rope scaling sets {scales!r:.80}, expected positive numbers for both mscale and mscale_all_dim, "
            "of YaRN, or neither."
        )
    if scales and "attention_factor" not in optional and _is_number(factor) and factor > 1:
        one, other = (0.1 * scale * math.log(factor) + 1 for scale in scales.values())
        optional["attention_factor"] = one / other
    return RopeScaling(kind, factor, original, **optional)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_layer_types(layer_types: Any, config: ModelConfig) -> None:
    """transformers writes each layer's kind of attention: it must be what sliding_window and max_window_layers say."""
    slides = config.sliding_window is not None
    said = [
        "sliding_attention" if slides and i >= config.max_window_layers else "full_attention"
        for i in range(config.num_hidden_layers)
    ]
    if layer_types is not None and layer_types != said:
        raise QwenMLXError("layer_types contradicts sliding_window and max_window_layers; only their pattern is known.")
