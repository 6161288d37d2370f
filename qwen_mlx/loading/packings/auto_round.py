"""AutoRound folders: GPTQ's or AWQ's layout under a name of its own, `packing_format`.

Source: AutoRound's inference/backend.py (GPTQ_FORMAT, whose zero points are stored minus one, GPTQ_FORMAT_NO_ZP, whose
are not, and AWQ_FORMAT) and export/export_to_autoround/export.py.
"""

from __future__ import annotations

from typing import Any

from ...errors import QwenMLXError
from . import awq, gptq
from .tensors import Tensors
from .weights import IntegerWeights

_FORMATS: dict[str, tuple[Any, str]] = {
    "auto_round:auto_gptq": (gptq, "gptq"),
    "auto_round": (gptq, "gptq_v2"),
    "auto_round:gptqmodel": (gptq, "gptq_v2"),
    "auto_round:auto_awq": (awq, "gemm"),
}


def check(settings: dict[str, Any], where: str) -> None:
    """Raises QwenMLXError for another layout, or a number of bits that is not read here."""
    layout = settings.get("packing_format", "auto_round:auto_gptq")
    if not isinstance(layout, str) or layout not in _FORMATS:
        raise QwenMLXError(
            f"{where}: AutoRound's packing_format is {layout!r}, expected one of {', '.join(_FORMATS)}; take another "
            "folder of the model."
        )
    method, own = _as_other(settings)
    method.check(own, where)


def read(module: str, shape: tuple[int, ...], tensors: Tensors, settings: dict[str, Any]) -> IntegerWeights | None:
    """A module's weights; None if the folder does not pack it. Raises QwenMLXError for tensors that do not fit."""
    method, own = _as_other(settings)
    weights: IntegerWeights | None = method.read(module, shape, tensors, own)
    return weights


def _as_other(settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The method whose layout it is, and that method's settings; extra_config gives single modules other bits."""
    method, layout = _FORMATS[settings.get("packing_format", "auto_round:auto_gptq")]
    return method, settings | {"checkpoint_format": layout, "dynamic": settings.get("extra_config")}
