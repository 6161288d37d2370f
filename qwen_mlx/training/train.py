"""The training loop: AdamW on an adapter's factors, with validation, saved so that it can go on after a kill.

mlx-lm's trainer has another end in view: its state is not saved, so that what it resumes begins with fresh moments and
another order of the data. Here the order (data.order_of) and dropout's masks are functions of the seed and the step, so
that factors, moments and the step's number are all that a training is.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import ops
from ..backend import mx, optimizers
from ..errors import QwenMLXError, Stopped
from ..model.layers import matrix_of
from ..model.qwen2 import Qwen2
from . import folder as files
from .data import Batch, Example, batches, digest, order_of
from .folder import Row, State
from .lora import Beside, Dropout, Factors, LoraSettings, module_at, new_factors, put_beside, summed_loss, take_away

SCHEDULES = ("constant", "linear", "cosine")
Report = Callable[[Row, float], None]  # called after each step with its row and the tokens learnt in a second


@dataclass(frozen=True)
class TrainingSettings:
    """A training's course; the names are mlx-lm's.

    iters: steps, each of grad_accumulation_steps batches of batch_size examples. learning_rate: the highest, reached
    after `warmup` steps, then as lr_schedule says, to zero at the end unless constant. val_batches: batches of a
    validation, None for all. grad_checkpoint: compute each layer twice, and keep less. pack_length: tokens of a row
    that holds several examples, which do not see each other; None for one example a row. Raises QwenMLXError for values
    that cannot be.
    """

    iters: int = 1000
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.01
    grad_checkpoint: bool = False
    val_batches: int | None = 25
    steps_per_eval: int = 200
    save_every: int = 100
    pack_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("iters", "batch_size", "grad_accumulation_steps", "steps_per_eval", "save_every")
        for name in (*counts, *(name for name in ("val_batches", "pack_length") if getattr(self, name) is not None)):
            if getattr(self, name) < 1:
                raise QwenMLXError(f"{name} is {getattr(self, name)}, expected 1 or more.")
        if self.lr_schedule not in SCHEDULES:
            raise QwenMLXError(f"lr_schedule is {self.lr_schedule!r}, expected one of {', '.join(SCHEDULES)}.")
        largest = float(np.finfo(np.float32).max)
        if not 0 < self.learning_rate <= largest or not 0 <= self.weight_decay < math.inf:
            rates = f"learning_rate is {self.learning_rate} and weight_decay {self.weight_decay}"
            raise QwenMLXError(f"{rates}, expected a positive float32 and a number that is not negative.")
        if not 0 <= self.warmup <= self.iters or self.seed < 0:
            raise QwenMLXError(f"warmup is {self.warmup} and seed {self.seed}, expected 0 to iters, and 0 or more.")

    def schedule(self) -> Any:
        """The learning rate by step, as MLX's optimizers take it."""
        rate, rest = self.learning_rate, max(1, self.iters - self.warmup)
        after: Any = {
            "constant": lambda step: mx.array(rate),
            "linear": optimizers.linear_schedule(rate, 0.0, rest),
            "cosine": optimizers.cosine_decay(rate, rest),
        }[self.lr_schedule]
        if not self.warmup:
            return rate if self.lr_schedule == "constant" else after
        rising = optimizers.linear_schedule(0.0, rate, self.warmup)
        return optimizers.join_schedules([rising, after], [self.warmup])


def compiles_steps() -> bool:
    """True on a GPU, where mx.compile joins a step's small operations; a CPU's functions compute at once."""
    return mx.default_device() != mx.cpu


class Trainer:
    """A model, the factors beside its matrices, their optimizer, and the number of steps taken."""

    def __init__(self, model: Qwen2, examples: Sequence[Example], lora: LoraSettings, settings: TrainingSettings):
        self.model, self.lora, self.settings = model, lora, settings
        self.factors: Factors = new_factors(model, lora, settings.seed)
        self.step, self.tokens = 0, 0
        self._batches = batches(examples, settings.batch_size, settings.pack_length)
        lengths = {name: mx.array(np.array(parts["m"])) for name, parts in self.factors.items() if "m" in parts}
        self._beside = Beside(lora.scale, lengths)  # copies: mx.compile takes no argument's array for a constant, too
        self._optimizer = optimizers.AdamW(
            settings.schedule(), weight_decay=settings.weight_decay, bias_correction=True
        )
        self._optimizer.init(self.factors)
        traced = mx.compile if compiles_steps() else lambda function: function
        self._loss_and_gradients: Any = traced(mx.value_and_grad(self._share_of_loss))
        self._update: Any = traced(self._updated)
        put_beside(model, self.factors, self._beside)

    def take_step(self) -> Row:
        """Takes one step. The gradient is that of the mean over all tokens of its batches. Raises QwenMLXError for a
        loss that is not finite; the factors are then those of the step before."""
        settings = self.settings
        order = order_of(len(self._batches), settings.seed, self.step * settings.grad_accumulation_steps)
        group = [self._batches[next(order)] for _ in range(settings.grad_accumulation_steps)]
        count = sum(batch.targets.size for batch in group)
        try:
            total, gradients = self._gradients(group, count)
        finally:  # while a gradient is formed, MLX's tracers are there
            self._put_beside()
        loss = total / count
        self._require_finite(loss)
        self.factors, self._optimizer.state = self._update(gradients, self.factors, self._optimizer.state)
        mx.eval(self.factors, self._optimizer.state)
        self._put_beside()
        self.step, self.tokens = self.step + 1, self.tokens + count
        return Row(self.step, loss, None, float(self._optimizer.learning_rate), self.tokens)

    def _gradients(self, group: Sequence[Batch], count: int) -> tuple[float, Any]:
        """The summed loss of several batches, and the gradients of it divided by `count`."""
        total, sums = 0.0, None
        for number, batch in enumerate(group):
            arrays = tuple(None if array is None else mx.array(array) for array in batch)
            value, new = self._loss_and_gradients(self.factors, arrays, mx.array(1 / count), self._key(number))
            sums = new if sums is None else _added(sums, new)
            mx.eval(value, sums)
            total += float(value) * count
        return total, sums

    def _share_of_loss(self, factors: Factors, batch: Any, share: mx.array, key: mx.array | None) -> mx.array:
        dropout = None if key is None else Dropout(self.lora.dropout, key)
        beside = self._beside._replace(dropout=dropout)
        return share * summed_loss(self.model, factors, beside, Batch(*batch), self.settings.grad_checkpoint)

    def _updated(self, gradients: Any, factors: Factors, moments: Any) -> tuple[Factors, Any]:
        self._optimizer.state = moments
        return self._optimizer.apply_gradients(gradients, factors), self._optimizer.state

    def _key(self, number: int) -> mx.array | None:
        """For the dropout of the next step's batch of this number."""
        if not self.lora.dropout:
            return None
        seed = np.random.SeedSequence([self.settings.seed, self.step, number]).generate_state(1)
        return mx.random.key(int(seed[0]))

    def _put_beside(self) -> None:
        """Without a step's dropout."""
        take_away(self.model, self.factors)
        put_beside(self.model, self.factors, self._beside)

    def check(self) -> None:
        """Raises QwenMLXError where the factors give the first batch, of the shortest examples, no finite loss."""
        self._require_finite(self.validate(self._batches[:1]))

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise QwenMLXError(
                f"The loss of step {self.step + 1} is not finite; give a smaller --learning-rate or other data."
            )

    def validate(self, group: Sequence[Batch]) -> float:
        """The mean loss over all tokens of batches."""
        total, count = 0.0, 0
        with ops.no_grad():
            for batch in group:
                total += float(summed_loss(self.model, self.factors, self._beside, batch))
                count += batch.targets.size
        return total / count

    def state(self) -> State:
        """All that a later process needs to go on: take_step there gives the losses that it would give here."""
        moments = self._optimizer.state
        arrays = {"step": moments["step"], "learning_rate": moments["learning_rate"]}
        for name, pair in self.factors.items():
            for part, array in pair.items():
                own = moments[name][part]
                arrays |= {f"{name}.{part}": array, f"{name}.{part}.m": own["m"], f"{name}.{part}.v": own["v"]}
        return State(arrays, {"step": self.step, "tokens": self.tokens})

    def restore(self, state: State) -> None:
        """Goes back to a state. Raises QwenMLXError for one of another adapter."""
        expected = {name: array.shape for name, array in self.state().arrays.items()}
        if {name: array.shape for name, array in state.arrays.items()} != expected:
            raise QwenMLXError("The saved state has other matrices than this adapter; give the settings it began with.")
        moments: dict[str, Any] = {"step": state.arrays["step"], "learning_rate": state.arrays["learning_rate"]}
        for name, pair in self.factors.items():
            moments[name] = {p: {m: state.arrays[f"{name}.{p}.{m}"] for m in ("m", "v")} for p in pair}
            self.factors[name] = {part: state.arrays[f"{name}.{part}"] for part in pair}
        self._optimizer.state = moments
        self.step, self.tokens = int(state.meta["step"]), int(state.meta["tokens"])
        self._put_beside()


def _added(first: Factors, second: Factors) -> Factors:
    return {name: {part: array + second[name][part] for part, array in pair.items()} for name, pair in first.items()}


def train(
    model: Qwen2,
    examples: Sequence[Example],
    folder: Path,
    *,
    validation: Sequence[Example] = (),
    lora: LoraSettings | None = None,
    settings: TrainingSettings | None = None,
    form: str = "mlx-lm",
    base: str = "",
    resume: bool = False,
    report: Report | None = None,
) -> list[Row]:
    """Trains an adapter of a model and writes it to a folder, with losses.csv and the state to go on from.

    model: of load(), without an adapter; it is as before at the end, and load(adapter=folder) gives the trained one.
    form: of folder.FORMATS. base: the model's name for the adapter's configuration. resume: go on from the folder's
    state. It is saved every settings.save_every steps, at the end, and when Ctrl-C or SIGTERM stops the training.
    Returns the rows of losses.csv. Raises QwenMLXError for a folder that cannot be written, for settings or data that
    are not those of the state, and for a loss that is not finite.
    """
    lora, settings = lora or LoraSettings(), settings or TrainingSettings()
    files.check_output(folder, resume)
    trainer = Trainer(model, examples, lora, settings)
    identity = _identity(model, examples, validation, lora, settings) | {"format": form}
    rows: list[Row] = []
    if resume:
        state = files.read_state(folder)
        _check_same(folder, state.meta.get("identity"), identity, settings)
        trainer.restore(state)
        rows = files.read_losses(folder, trainer.step)
        if [row.step for row in rows] != list(range(trainer.step + 1)):
            raise QwenMLXError(f"{folder / files.LOSSES}: lacks some of the {trainer.step} steps; begin anew.")
        if trainer.step > settings.iters:
            raise QwenMLXError(f"{folder}: has {trainer.step} steps already; give --iters {trainer.step} or more.")

    def save() -> None:
        trainer.check()
        # The state is the last, so that what it counts on is there.
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QwenMLXError(f"{folder}: cannot be written ({error.strerror}).") from None
        files.write_losses(folder, rows)
        arrays = files.arrays_of(trainer.factors)
        files.write_adapter(folder, arrays, lora, form, base, len(model.model.layers))
        files.write_state(folder, State(state.arrays, state.meta | {"identity": identity}))

    held_out = batches(validation, settings.batch_size)[: settings.val_batches] if validation else []
    if not resume:
        first = trainer.validate(held_out) if held_out else None
        rows.append(Row(0, None, first, 0.0, 0))
        state = trainer.state()
        save()
        if report:
            report(rows[-1], 0.0)
    saved = trainer.step
    try:
        while trainer.step < settings.iters:
            start, before = time.perf_counter(), trainer.tokens
            row = trainer.take_step()
            rate = (row.tokens - before) / (time.perf_counter() - start)
            last = row.step == settings.iters
            if held_out and (last or row.step % settings.steps_per_eval == 0):
                row = row._replace(validation_loss=trainer.validate(held_out))
            rows.append(row)
            state = trainer.state()
            if last or row.step % settings.save_every == 0:
                save()
                saved = row.step
            if report:
                report(row, rate)
    except (KeyboardInterrupt, Stopped):
        if state.meta["step"] > saved:
            trainer.restore(state)
            rows = [row for row in rows if row.step <= trainer.step]
            save()
        raise
    finally:
        take_away(model, trainer.factors)
    return rows


def _identity(
    model: Qwen2,
    examples: Sequence[Example],
    validation: Sequence[Example],
    lora: LoraSettings,
    settings: TrainingSettings,
) -> dict[str, Any]:
    """All that decides a training's losses, as JSON holds it."""
    weight = model.model.norm.weight
    values = np.array(weight.astype(mx.float32)).tobytes()
    packings = [str(matrix_of(module_at(model, name)).packing) for name in lora.modules(len(model.model.layers))]
    own = hashlib.sha256(f"{model.config!r} {weight.dtype} {packings}".encode() + values)
    course = ("batch_size", "grad_accumulation_steps", "learning_rate", "lr_schedule", "warmup", "weight_decay", "seed")
    identity = {name: getattr(settings, name) for name in (*course, "pack_length")}
    identity |= {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(lora).items()}
    # A decay ends with the last step; without one, more steps may be asked for later.
    identity["iters"] = None if settings.lr_schedule == "constant" else settings.iters
    return identity | {"model": own.hexdigest(), "data": digest(examples), "validation": digest(validation)}


def _check_same(folder: Path, saved: Any, asked: dict[str, Any], settings: TrainingSettings) -> None:
    if not isinstance(saved, dict) or saved.keys() != asked.keys():
        raise QwenMLXError(f"{folder / files.STATE}: is of another version; begin anew.")
    for name, value in asked.items():
        if saved[name] == value:
            continue
        if name in ("model", "data", "validation"):
            fault = {
                "model": "another model, dtype or packing",
                "data": "other examples",
                "validation": "another valid.jsonl",
            }
            raise QwenMLXError(f"{folder}: was begun with {fault[name]}; give what it began with, or begin anew.")
        raise QwenMLXError(f"{folder}: was begun with {name} {saved[name]}, not {value}; give that, or begin anew.")
