"""The training loop: what it changes, that accumulation and checkpointing change nothing, and how it goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from safetensors.numpy import load_file, save_file

from qwen_mlx import QwenMLXError, load
from qwen_mlx.backend import mx
from qwen_mlx.training.data import batches
from qwen_mlx.training.folder import LOSSES, STATE, read_losses
from qwen_mlx.training.lora import Beside, Dropout, LoraSettings, new_factors, summed_loss
from qwen_mlx.training.train import Trainer, TrainingSettings, train
from reference.small_models import RandomModel, write_gguf
from tests.helpers.cases import each
from tests.helpers.training import random_examples

EXAMPLES = random_examples([9, 30, 24, 17, 40, 33, 22, 28])
LORA = LoraSettings(4, 6.0)
RESUMED = LoraSettings(4, 6.0, dropout=0.2, dora=True)
QUICK = {"iters": 6, "batch_size": 2, "learning_rate": 3e-3, "save_every": 2, "steps_per_eval": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("base") / "m.gguf", RandomModel(num_hidden_layers=2), T.Q8_0)


def model_of(base: Path, packed: bool = True, dtype: str = "float32"):
    return load(base, dtype=dtype, quantized=packed)[0]


def course(**changes) -> TrainingSettings:
    return TrainingSettings(**{**QUICK, **changes})


def losses(rows) -> list[tuple]:
    return [tuple(row) for row in rows]


@each("form, packed", [("mlx-lm", True), ("peft", False)])
def test_training_lowers_the_loss_and_load_reads_the_adapter(tmp_path: Path, base: Path, packed: bool, form: str):
    model, out = model_of(base, packed), tmp_path / "out"
    before = {name: np.array(array) for name, array in model.hf_parameters().items()}
    lora = LoraSettings(4, 6.0, ("v_proj", "o_proj", "down_proj"), 1)
    rows = train(model, EXAMPLES, out, validation=EXAMPLES[:3], lora=lora, settings=course(), form=form)
    assert [row.step for row in rows] == list(range(7))
    assert [row.step for row in rows if row.validation_loss is not None] == [0, 2, 4, 6]
    assert rows[-1].validation_loss < rows[0].validation_loss - 0.05
    after = model.hf_parameters()
    assert after.keys() == before.keys()
    assert all(np.array_equal(np.array(after[name]), value) for name, value in before.items())
    tuned = load(base, dtype="float32", quantized=packed, adapter=out)[0]
    beside = {name for name in tuned.hf_parameters() if "lora" in name}
    names = [f"model.layers.1.{name}" for name in ("mlp.down_proj", "self_attn.o_proj", "self_attn.v_proj")]
    assert beside == ({f"{name}.lora_{part}" for name in names for part in "ab"} if packed else set())
    total = sum(float(summed_loss(tuned, {}, Beside(1.0), batch)) for batch in batches(EXAMPLES[:3], 2))
    count = sum(len(example.ids) - example.n_prompt for example in EXAMPLES[:3])
    assert total / count == pytest.approx(rows[-1].validation_loss, rel=1e-4)
    assert losses(read_losses(out, 99)) == losses(rows)


def test_accumulated_and_checkpointed_gradients_are_those_of_one_batch(base: Path):
    """Equal but for the order of sums, in factors after three steps."""
    examples = random_examples([20, 30, 25, 31])
    results = []
    for changes in (
        {"batch_size": 4},
        {"batch_size": 2, "grad_accumulation_steps": 2},
        {"grad_checkpoint": True, "batch_size": 4},
    ):
        trainer = Trainer(model_of(base), examples, LORA, course(**changes))
        results.append(([trainer.take_step().loss for _ in range(3)], trainer.factors))
    for step_losses, factors in results[1:]:
        np.testing.assert_allclose(step_losses, results[0][0], rtol=1e-5)
        for name, pair in factors.items():
            for part, array in pair.items():
                expected = np.array(results[0][1][name][part])
                assert np.abs(np.array(array) - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.heavy
def test_a_compiled_step_is_the_step(base: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, with packing, dropout and DoRA; batches of two shapes. Sums are in another order."""
    settings, results = course(batch_size=1, pack_length=60, grad_accumulation_steps=2), []
    lora = LoraSettings(4, 6.0, ("v_proj", "up_proj"), 1, dropout=0.2, dora=True)
    for compiled in (False, True):
        monkeypatch.setattr("qwen_mlx.training.train.compiles_steps", lambda compiled=compiled: compiled)
        trainer = Trainer(model_of(base), EXAMPLES, lora, settings)
        results.append(([trainer.take_step().loss for _ in range(2)], trainer))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-5)
    moments = [result[1].state().arrays for result in results]
    assert moments[0].keys() == moments[1].keys()
    assert int(moments[1]["step"]) == 2
    for name in ("model.layers.1.mlp.up_proj.m", "model.layers.1.self_attn.v_proj.b"):
        plain, compiled_array = (np.array(arrays[name]) for arrays in moments)
        assert np.abs(compiled_array - plain).max() < 1e-3 * np.abs(plain).max()


def test_logits_in_pieces_have_the_same_loss(base: Path, monkeypatch: pytest.MonkeyPatch):
    model, (batch,) = model_of(base), batches(EXAMPLES, 8)
    factors = new_factors(model, LORA, 0)

    def both():
        return mx.value_and_grad(lambda f: summed_loss(model, f, Beside(LORA.scale), batch))(factors)

    whole, gradients = both()
    monkeypatch.setattr("qwen_mlx.training.lora.ROWS", 7)
    pieces, others = both()
    assert float(pieces) == pytest.approx(float(whole), rel=1e-6)
    name = "model.layers.0.mlp.up_proj"
    np.testing.assert_allclose(np.array(others[name]["b"]), np.array(gradients[name]["b"]), rtol=1e-3, atol=1e-4)


def test_packed_examples_have_the_gradients_of_examples_apart(base: Path):
    """Equal within 2^-13 of the largest, which is float32's error here: a token that saw another example is far off."""
    model, results = model_of(base), []
    factors = new_factors(model, LORA, 0)
    for parts in factors.values():
        parts["b"] = parts["b"] + 0.1
    for pack_length in (None, 70):
        made = batches(EXAMPLES, 8, pack_length)
        assert len(made) == 1

        def loss(own, made=made):
            return summed_loss(model, own, Beside(LORA.scale), made[0])

        results.append(mx.value_and_grad(loss)(factors))
    assert made[0].inputs.shape[0] < len(EXAMPLES)
    assert float(results[1][0]) == pytest.approx(float(results[0][0]), rel=1e-6)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"):
        apart, packed = (np.array(gradients[name]["a"]) for _, gradients in results)
        assert np.abs(packed - apart).max() < 2**-13 * np.abs(apart).max()


def test_dropout_hides_a_share_of_what_the_adapter_reads_in_steps_alone(base: Path):
    kept = [np.array(Dropout(0.25, mx.random.key(1)).keep((40, 50), name, mx.float32)) for name in ("a", "a", "b")]
    assert set(np.unique(kept[0])) == {0, np.float32(4 / 3)}
    assert (kept[0] == 0).mean() == pytest.approx(0.25, abs=0.04)
    assert np.array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[0], kept[2])
    trainers = [Trainer(model_of(base), EXAMPLES, LoraSettings(4, 6.0, dropout=p), course()) for p in (0, 0.5, 0.5)]
    first, *others = [[trainer.take_step().loss for _ in range(3)] for trainer in trainers]
    assert others[0] == others[1]
    assert others[0][0] == first[0]  # b is zero
    assert others[0][2] != first[2]
    assert not any("lora_keep" in name for name in trainers[1].model.hf_parameters())


class Killed(Exception):
    """Stands for the end of the process."""


def interrupted(base: Path, out: Path, at_write: int) -> None:
    """Trains until some file's replacement, where the process ends."""
    count, real = 0, os.replace

    def replace(*names):
        nonlocal count
        count += 1
        if count == at_write:
            raise Killed
        real(*names)

    with mock.patch.object(os, "replace", replace), pytest.raises(Killed):
        train(model_of(base), EXAMPLES, out, validation=EXAMPLES[:3], lora=RESUMED, settings=course())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The folder of a training that nothing stopped."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    train(model_of(base), EXAMPLES, out, validation=EXAMPLES[:3], lora=RESUMED, settings=course())
    return out


@each("at_write", [6, 12])
def test_a_training_killed_between_writes_goes_on_with_the_same_losses(
    tmp_path: Path, base: Path, uninterrupted: Path, at_write: int
):
    """Four files are written at each save: losses, weights, configuration and state. Of the two moments one lies before
    the first steps are saved, one after."""
    out = tmp_path / "out"
    interrupted(base, out, at_write)
    rows = train(model_of(base), EXAMPLES, out, validation=EXAMPLES[:3], lora=RESUMED, settings=course(), resume=True)
    assert losses(rows) == losses(read_losses(uninterrupted, 99))
    for name in (STATE, "adapters.safetensors"):
        first, second = load_file(out / name), load_file(uninterrupted / name)
        assert all(np.array_equal(first[key], second[key]) for key in second)
    assert (out / LOSSES).read_text() == (uninterrupted / LOSSES).read_text()
    load(base, adapter=out)


def test_ctrl_c_saves_the_last_step(tmp_path: Path, base: Path, uninterrupted: Path):
    def stop(row, rate):
        if row.step == 3:
            raise KeyboardInterrupt

    out, arguments = tmp_path / "out", {"lora": RESUMED, "settings": course(save_every=100)}
    with pytest.raises(KeyboardInterrupt):
        train(model_of(base), EXAMPLES, out, **arguments, report=stop)
    assert [row.step for row in read_losses(out, 99)] == [0, 1, 2, 3]
    rows = train(model_of(base), EXAMPLES, out, **arguments, resume=True)
    assert [row[:2] for row in rows] == [row[:2] for row in read_losses(uninterrupted, 99)]


def test_a_full_disk_is_a_sentence_and_leaves_the_last_save(tmp_path: Path, base: Path):
    out, real = tmp_path / "out", Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        if read_losses(out, 99)[-1].step > 2:
            raise OSError(28, "No space left on device")
        return real(path, data)

    with mock.patch.object(Path, "write_bytes", write_bytes), pytest.raises(QwenMLXError, match="No space left"):
        train(model_of(base), EXAMPLES, out, lora=LORA, settings=course())
    rows = train(model_of(base), EXAMPLES, out, lora=LORA, settings=course(iters=3), resume=True)
    assert [row.step for row in rows] == [0, 1, 2, 3]


def test_what_a_training_began_with_is_asked_for_again(tmp_path: Path, base: Path):
    out, model = tmp_path / "out", model_of(base)
    train(model, EXAMPLES, out, lora=LORA, settings=course(iters=2))
    rows = train(model, EXAMPLES, out, lora=LORA, settings=course(iters=3), resume=True)  # more steps may be asked for
    assert [row.step for row in rows] == [0, 1, 2, 3]
    for changes, words in (
        ({"settings": course(learning_rate=1e-3)}, "was begun with learning_rate 0.003, not 0.001"),
        ({"settings": course(lr_schedule="cosine")}, "was begun with lr_schedule constant, not cosine"),
        ({"lora": LoraSettings(8, 6.0)}, "was begun with rank 4, not 8"),
        ({"lora": LoraSettings(4, 6.0, dora=True)}, "was begun with dora False, not True"),
        ({"settings": course(pack_length=99)}, "was begun with pack_length None, not 99"),
        ({"form": "peft"}, "was begun with format mlx-lm, not peft"),
        ({"settings": course(iters=2)}, "has 3 steps already; give --iters 3 or more"),
        ({"examples": EXAMPLES[1:]}, "was begun with other examples"),
        ({"validation": EXAMPLES[1:]}, "was begun with another valid.jsonl"),
        ({"model": model_of(base, dtype="bfloat16")}, "was begun with another model, dtype or packing"),
        ({"model": model_of(base, packed=False)}, "was begun with another model, dtype or packing"),
    ):
        arguments = {"model": model, "examples": EXAMPLES, "lora": LORA, "settings": course()} | changes
        with pytest.raises(QwenMLXError, match=words):
            train(arguments.pop("model"), arguments.pop("examples"), out, **arguments, resume=True)
    with pytest.raises(QwenMLXError, match="holds files already; give --resume to go on"):
        train(model, EXAMPLES, out, lora=LORA, settings=course())
    (out / STATE).unlink()  # as after a kill within a save, of the first step or of a later one
    with pytest.raises(QwenMLXError, match="holds files already; give another name"):
        train(model, EXAMPLES, out, lora=LORA, settings=course())
    losses = out / LOSSES
    losses.write_text("".join(losses.read_text().splitlines(keepends=True)[:2]))
    assert len(train(model, EXAMPLES, out, lora=LORA, settings=course(iters=1))) == 2
    with pytest.raises(QwenMLXError, match="has no training_state"):
        train(model, EXAMPLES, tmp_path / "none", lora=LORA, settings=course(), resume=True)
    with pytest.raises(QwenMLXError, match="has an adapter already"):
        train(load(base, quantized=True, adapter=out)[0], EXAMPLES, tmp_path / "none", lora=LORA, settings=course())


def test_a_damaged_state_is_a_sentence(tmp_path: Path, base: Path):
    out, model = tmp_path / "out", model_of(base)
    train(model, EXAMPLES, out, lora=LORA, settings=course(iters=1))
    whole = (out / STATE).read_bytes()
    for data in (whole[:50], whole[:-9], b"", b"x" * 100):
        (out / STATE).write_bytes(data)
        with pytest.raises(QwenMLXError, match="is damaged or not a training's state"):
            train(model, EXAMPLES, out, lora=LORA, settings=course(), resume=True)
    tensors = load_file(out / STATE) if (out / STATE).write_bytes(whole) else {}
    meta = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    save_file({name: array for name, array in tensors.items() if not name.endswith("b.v")}, out / STATE, meta)
    with pytest.raises(QwenMLXError, match="other matrices"):
        train(model, EXAMPLES, out, lora=LORA, settings=course(), resume=True)
    for counts in ({"step": -5, "tokens": 1}, {"step": "1", "tokens": 1}):
        save_file(tensors, out / STATE, {"meta": json.dumps({**json.loads(meta["meta"]), **counts})})
        with pytest.raises(QwenMLXError, match="is damaged or not a training's state"):
            train(model, EXAMPLES, out, lora=LORA, settings=course(), resume=True)
    save_file(tensors, out / STATE, meta)
    (out / LOSSES).write_text((out / LOSSES).read_text().splitlines()[0] + "\n")
    with pytest.raises(QwenMLXError, match=r"losses.csv: lacks some of the 1 steps"):
        train(model, EXAMPLES, out, lora=LORA, settings=course(), resume=True)
    (out / LOSSES).write_text("step,loss\nx,1\n")
    with pytest.raises(QwenMLXError, match=r"losses.csv: is damaged"):
        train(model, EXAMPLES, out, lora=LORA, settings=course(), resume=True)


def test_a_loss_that_is_not_finite_leaves_the_last_save(tmp_path: Path, base: Path):
    out = tmp_path / "out"
    with pytest.raises(QwenMLXError, match=r"loss of step \d is not finite; give a smaller --learning-rate"):
        train(model_of(base), EXAMPLES, out, lora=LORA, settings=course(learning_rate=1e30, save_every=1))
    assert all(row.loss is None or math.isfinite(row.loss) for row in read_losses(out, 99))
    assert all(np.isfinite(array).all() for array in load_file(out / "adapters.safetensors").values())
    with pytest.raises(QwenMLXError, match="loss of step 2 is not finite"):  # nor is a last step saved that ruins all
        train(model_of(base), EXAMPLES, tmp_path / "b", lora=LORA, settings=course(learning_rate=1e30, iters=1))
    assert [row.step for row in read_losses(tmp_path / "b", 99)] == [0]


SCHEDULES = {
    "constant": [0, 0.5, 1, 1, 1, 1],
    "linear": [0, 0.5, 1, 0.75, 0.5, 0.25],
    "cosine": [0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(4))],
}


@each("name", SCHEDULES)
def test_learning_rates(name: str):
    schedule = course(lr_schedule=name, warmup=2, learning_rate=1e-3).schedule()
    rates = [float(schedule(mx.array(step))) for step in range(6)]
    np.testing.assert_allclose(rates, 1e-3 * np.array(SCHEDULES[name]), atol=1e-9)


def test_each_step_has_its_learning_rate(base: Path):
    trainer = Trainer(model_of(base), EXAMPLES, LORA, course(lr_schedule="linear", warmup=2, learning_rate=1e-3))
    rates = [trainer.take_step().learning_rate for _ in range(4)]
    np.testing.assert_allclose(rates, 1e-3 * np.array(SCHEDULES["linear"][:4]), atol=1e-9)


@each(
    "changes, words",
    [
        ({"iters": 0}, "iters is 0"),
        ({"val_batches": 0}, "val_batches is 0"),
        ({"lr_schedule": "x"}, "lr_schedule is 'x'"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": 1e39}, "learning_rate is 1e.39 .* expected a positive float32"),
        ({"pack_length": 0}, "pack_length is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"warmup": 7}, "warmup is 7"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"targets": ("q_proj", "lm_head")}, "targets are q_proj, lm_head, expected some of q_proj"),
        ({"targets": ("q_proj", "q_proj")}, "once"),
        ({"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_settings_that_cannot_be(changes: dict, words: str):
    with pytest.raises(QwenMLXError, match=words):
        LoraSettings(**changes) if changes.keys() & {"rank", "alpha", "targets", "num_layers", "dropout"} else course(
            **changes
        )
