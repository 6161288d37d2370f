"""Folders whose matrices another library packed: AWQ, GPTQ, AutoRound, compressed-tensors, bitsandbytes, FP8.

config.json's `quantization_config` names the method. Integers with 16-bit scales become MLX's affine quantization, the
same numbers bit for bit, where a group of theirs is a whole number of MLX's; everything else becomes dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import QwenMLXError, shortened
from ...text.files import read_json
from . import auto_round, awq, bitsandbytes, compressed_tensors, fp8, gptq
from .tensors import Tensors
from .weights import ForeignParameter, IntegerWeights, TableWeights

__all__ = ["ForeignParameter", "Method", "Tensors", "find_method"]

_METHODS = {
    "auto-round": auto_round,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "fbgemm_fp8": fp8,
    "fp8": fp8,
    "gptq": gptq,
    "intel/auto-round": auto_round,
    "modelopt": fp8,
}
# Settings that are read here, or only say how the folder was made or how its own library runs it.
_NAMES = """
act_bits act_data_type act_dynamic act_group_aware act_group_size act_sym activation_scale_ub activation_scheme amp
autoround_version backend batch_size bits block_name_to_quantize cache_block_outputs checkpoint_format config_groups
damp_auto_increment damp_percent data_type dataset dequantize desc_act disable_exllama do_fuse dynamic
enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input exclude_modules exllama_config extra_config fmt
format fuse_max_seq_len global_compression_ratio gradient_accumulate_steps group_size ignore ignored_layers
is_marlin_format iters kv_cache_quant_algo kv_cache_scheme lm_head load_in_4bit load_in_8bit low_gpu_mem_usage lr
max_input_length meta minmax_lr model_file_base_name model_name_or_path model_seqlen
module_name_preceding_first_block modules_in_block_to_quantize modules_to_fuse modules_to_not_convert mse nsamples
pack_dtype packing_format pad_token_id producer q_group_size quant_algo quant_method quantization_status quantizer
scale_dtype scale_fmt seqlen sparsity_config static_groups super_bits super_group_size sym to_quant_block_names
tokenizer transform_config true_sequential use_cuda_fp16 use_exllama uuid version w_bit weight_block_size zero_point
"""
_KNOWN = frozenset(_NAMES.split())
# The files of AutoGPTQ, AutoAWQ and ModelOpt beside a config.json that says nothing.
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Settings of one method alone, by which a configuration that names none is recognised.
_SIGNS = {
    "config_groups": "compressed-tensors",
    **dict.fromkeys(("desc_act", "true_sequential", "damp_percent", "checkpoint_format"), "gptq"),
    "weight_block_size": "fp8",
    "quant_algo": "modelopt",
    "w_bit": "awq",
    "zero_point": "awq",
}
# A module's activations, which stay as they are here.
_ACTIVATIONS = (
    *("input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "output_scale", "activation_scale"),
    *("q_scale", "k_scale", "v_scale"),
)
_Read = Callable[[str, tuple[int, ...], Tensors, dict[str, Any]], "IntegerWeights | TableWeights | None"]


@dataclass(frozen=True)
class Method:
    """A folder's packing. settings: its `quantization_config`."""

    name: str
    settings: dict[str, Any]
    read: _Read

    def parameter(self, name: str, shape: tuple[int, ...], tensors: Tensors) -> ForeignParameter | None:
        """The parameter `name` (Hugging Face's), taken out of `tensors`; None if it is not packed. Raises QwenMLXError
        for a tensor that is missing or does not fit."""
        if len(shape) != 2:
            return None
        weights = self.read(name.removesuffix(".weight"), shape, tensors, self.settings)
        return None if weights is None else ForeignParameter.of(name, shape, weights)

    def drop_activations(self, modules: list[str], tensors: Tensors) -> bool:
        """Takes the scales of the modules' activations; True if there are some, or the configuration asks for them."""
        owners = {*modules, *(module.rpartition(".")[0] for module in modules)}  # a cache's scales are of self_attn
        names = [f"{owner}.{kind}" for owner in sorted(owners) for kind in _ACTIVATIONS]
        groups = self.settings.get("config_groups")
        asked = [group for group in (groups.values() if isinstance(groups, dict) else ()) if isinstance(group, dict)]
        said = any(group.get("input_activations") for group in asked) or "activation_scheme" in self.settings
        said = said or bool(self.settings.get("kv_cache_scheme")) or self.settings.get("act_bits", 16) != 16
        return tensors.drop(*names) or said

    @property
    def unknown_settings(self) -> list[str]:
        """The names of settings that say something and are not known here."""
        own = ("bnb_4bit_", "llm_int8_", "_load_in_")  # of bitsandbytes, whose tensors say all that counts
        names = (key for key, value in self.settings.items() if value is not None and value not in (False, "", [], {}))
        return sorted(name for name in names if name not in _KNOWN and not name.startswith(own))


def find_method(folder: Path) -> Method | None:
    """The method that packed a folder's matrices; None where none did, or MLX's own.

    Raises QwenMLXError naming config.json, the method and those that are read, for another one.
    """
    where = folder / "config.json"
    config = read_json(where)
    settings = config.get("quantization_config")
    if settings is None:
        settings = config.get("compression_config")  # of compressed-tensors' first releases
    for name, other in _OWN_FILES.items():
        if settings is None and (folder / name).is_file():
            where = folder / name
            own = read_json(where)
            inner = own.get("quantization")
            settings = {"quant_method": other, **(inner if isinstance(inner, dict) else own)}
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise QwenMLXError(f"{where}: 'quantization_config' is {settings!r}, expected an object.")
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):  # transformers takes these for bitsandbytes', too
        settings = {"quant_method": "bitsandbytes", **settings}
    if "quant_method" not in settings:
        hint = next((f" ({key!r} is a setting of {of})" for key, of in _SIGNS.items() if key in settings), "")
        of_mlx = "quantization" in config or ({"group_size", "bits"} <= settings.keys() and not hint)
        if of_mlx or not settings:
            return None  # mlx-lm repeats its `quantization` there
        raise QwenMLXError(
            f"{where}: 'quantization_config' has no 'quant_method' but {shortened(', '.join(map(str, settings)), 80)}"
            f"{hint}, expected one of {', '.join(sorted(_METHODS))}; write the method's name there."
        )
    name = settings["quant_method"]
    method = _METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise QwenMLXError(
            f"{where}: quant_method is {name!r}, expected one of {', '.join(sorted(_METHODS))}; take the original "
            "model or another packing of it."
        )
    method.check(settings, str(where))
    return Method(str(name), settings, method.read)
