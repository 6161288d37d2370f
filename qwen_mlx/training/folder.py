"""The folder of a training: the adapter in mlx-lm's or peft's form, the losses, and the state from which it goes on.

Each file is replaced at once and the state last, so that after a kill at any moment the state is of one step, and every
loss up to that step is there.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..backend import mx
from ..errors import QwenMLXError
from ..loading.adapters import mlx_lm, peft
from ..text.files import LEFTOVER, atomic_write, check_folder
from .lora import Factors, LoraSettings

FORMATS = ("mlx-lm", "peft")
STATE, LOSSES, PICTURE = "training_state.safetensors", "losses.csv", "losses.png"
CONFIG = "adapter_config.json"


class Row(NamedTuple):
    """A line of losses.csv: means in nats a token, "" where there is none; tokens: learnt so far."""

    step: int
    loss: float | None
    validation_loss: float | None
    learning_rate: float
    tokens: int


class State(NamedTuple):
    """Where a training stands. arrays: by name, factors and the optimizer's moments; meta: what JSON can say."""

    arrays: dict[str, mx.array]
    meta: dict[str, Any]


def check_output(folder: Path, resume: bool) -> None:
    """Raises QwenMLXError unless a training can write there: a new or empty folder, or one to go on from."""
    if resume:
        if not (folder / STATE).is_file():
            raise QwenMLXError(f"{folder}: has no {STATE} to go on from; begin without --resume, in a new folder.")
        check_folder(folder / STATE, "--adapter")
        return
    if folder.exists() and not folder.is_dir():
        raise QwenMLXError(f"{folder}: is not a folder; give another name.")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    names = {name for name in names if not name.startswith(LEFTOVER)}
    if names and not _ended_in_its_first_save(folder, names):
        fix = "give --resume to go on, or another name" if (folder / STATE).exists() else "give another name"
        raise QwenMLXError(f"{folder}: holds files already; {fix}.")
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise QwenMLXError(f"{folder}: cannot be written, because {parent} is read-only or no folder.")


def _ended_in_its_first_save(folder: Path, names: set[str]) -> bool:
    """True if `names` are the files of a training that was killed before it had a state: no step is lost with them."""
    if LOSSES not in names or not names <= {LOSSES, mlx_lm.WEIGHTS, peft.WEIGHTS, CONFIG}:
        return False
    try:
        return [row.step for row in read_losses(folder)] == [0]
    except QwenMLXError:
        return False


def write_adapter(
    folder: Path,
    factors: Mapping[str, Mapping[str, np.ndarray]],
    settings: LoraSettings,
    form: str,
    base: str,
    n_layers: int,
) -> None:
    """Writes an adapter of `base`, a model of n_layers layers, in one of FORMATS."""
    config: dict[str, Any] = {}
    projections = [key.rpartition(".")[2] for key in settings.keys]
    if form == "mlx-lm":
        names = {"a": "lora_a", "b": "lora_b", "m": "m"}
        tensors = {f"{name}.{names[part]}": array.T for name, pair in factors.items() for part, array in pair.items()}
        parameters = {"rank": settings.rank, "scale": settings.scale, "dropout": settings.dropout}
        kind = "dora" if settings.dora else "lora"
        config |= {"model": base, "fine_tune_type": kind, "num_layers": settings.num_layers or -1}
        config |= {"lora_parameters": {**parameters, "keys": settings.keys}}
        weights = mlx_lm.WEIGHTS
    else:
        names = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
        tensors = {
            f"base_model.model.{name}.{names[part]}": array
            for name, pair in factors.items()
            for part, array in pair.items()
        }
        config |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none"}
        config |= {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": projections}
        config |= {"lora_dropout": settings.dropout, "use_dora": settings.dora, "inference_mode": True}
        if settings.first_layer(n_layers):
            layers = list(range(settings.first_layer(n_layers), n_layers))
            config |= {"layers_to_transform": layers, "layers_pattern": "layers"}
        weights = peft.WEIGHTS
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic_write(folder / weights) as path:
        path.write_bytes(save(contiguous, {"format": "pt"}))
    with atomic_write(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def arrays_of(factors: Factors) -> dict[str, dict[str, np.ndarray]]:
    """Factors as NumPy's arrays."""
    return {name: {part: np.array(array) for part, array in pair.items()} for name, pair in factors.items()}


def write_state(folder: Path, state: State) -> None:
    """Replaces the state."""
    arrays = {name: np.array(array) for name, array in state.arrays.items()}
    with atomic_write(folder / STATE) as path:
        path.write_bytes(save(arrays, {"meta": json.dumps(state.meta)}))


def read_state(folder: Path) -> State:
    """The state that write_state wrote. Raises QwenMLXError for a damaged file."""
    path = folder / STATE
    try:
        with safe_open(path, "numpy") as file:
            meta = json.loads(file.metadata()["meta"])
            names = file.keys()
            if not all(type(meta[name]) is int and meta[name] >= 0 for name in ("step", "tokens")):
                raise ValueError("its counts are no counts")
            return State({name: mx.array(file.get_tensor(name)) for name in names}, meta)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise QwenMLXError(f"{path}: is damaged or not a training's state ({error!r:.200}); begin anew.") from None


def write_losses(folder: Path, rows: Sequence[Row]) -> None:
    """Replaces losses.csv."""
    with atomic_write(folder / LOSSES) as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(["" if value is None else repr(value) for value in row] for row in rows)


def read_losses(folder: Path, last_step: float = math.inf) -> list[Row]:
    """The rows up to a step: a killed training may have written later ones. Raises QwenMLXError for a damaged file."""
    path = folder / LOSSES
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [_row(line) for line in csv.DictReader(file)]
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise QwenMLXError(f"{path}: is damaged or missing ({error!r:.200}); begin anew.") from None
    return [row for row in rows if row.step <= last_step]


def _row(line: Mapping[str, str]) -> Row:
    loss, validation = (float(line[name]) if line[name] else None for name in ("loss", "validation_loss"))
    return Row(int(line["step"]), loss, validation, float(line["learning_rate"]), int(line["tokens"]))


def write_picture(folder: Path, rows: Sequence[Row]) -> bool:
    """Draws losses.png. Returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, marker, points in (
        ("training", "", [(row.step, row.loss) for row in rows if row.loss is not None]),
        ("validation", "o", [(row.step, row.validation_loss) for row in rows if row.validation_loss is not None]),
    ):
        if points:
            axes.plot(*zip(*points), label=label, marker=marker)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    with atomic_write(folder / PICTURE, ".png") as path:
        figure.savefig(path, dpi=120)
    return True
