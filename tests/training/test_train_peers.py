"""Losses and gradients of peft with torch's AdamW, and the same adapters in mlx-lm and peft."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as T

from qwen_mlx import load
from qwen_mlx.backend import mx
from qwen_mlx.training.data import Example, batches, order_of
from qwen_mlx.training.lora import TARGETS, Beside, LoraSettings, summed_loss
from qwen_mlx.training.train import Trainer, TrainingSettings, train
from reference.lazy import mlx_lm_utils, peft, torch, transformers
from reference.small_models import RandomModel, save_folder, to_hf, write_gguf
from tests.helpers.cases import each
from tests.helpers.peers import IDS, distance, in_float64, tolerance, torch_logits
from tests.helpers.training import random_examples

LORA = LoraSettings(8, 12.0)


NAMES = {"a": "lora_A.default.weight", "b": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}


def steps_of_peft(theirs, trainer: Trainer, examples: list[Example], n_steps: int) -> tuple[list, list]:
    """Losses and gradients, one vector a step, of peft's model with the trainer's factors, on the trainer's batches."""
    settings, dtype = trainer.settings, next(theirs.parameters()).dtype
    config = peft.LoraConfig(
        r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(TARGETS), use_dora=trainer.lora.dora
    )
    model = peft.get_peft_model(theirs, config).to(dtype).train()
    named, own = dict(model.named_parameters()), []
    for name, pair in trainer.factors.items():
        for part, array in pair.items():
            own.append(named[f"base_model.model.{name}.{NAMES[part]}"])
            own[-1].data.copy_(torch.tensor(np.array(array)))
    decay = settings.weight_decay
    optimizer = torch.optim.AdamW(own, lr=settings.learning_rate, weight_decay=decay)
    by_length = sorted(examples, key=lambda example: len(example.ids))
    rows = [by_length[i : i + settings.batch_size] for i in range(0, len(examples), settings.batch_size)]
    order, losses, gradients = order_of(len(rows), settings.seed, 0), [], []
    for _ in range(n_steps):
        group = [example for _ in range(settings.grad_accumulation_steps) for example in rows[next(order)]]
        ids, labels = (torch.full((len(group), max(len(e.ids) for e in group)), fill) for fill in (0, -100))
        for row, (tokens, n_prompt) in enumerate(group):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, n_prompt : len(tokens)] = torch.tensor(tokens[n_prompt:])
        optimizer.zero_grad()
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(e.ids) for e in group])[:, None]
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten().long())
        loss.backward()
        losses.append(loss.item())
        gradients.append(np.concatenate([parameter.grad.double().numpy().ravel() for parameter in own]))
        optimizer.step()
    model.unload()
    return losses, gradients


def steps_of_ours(trainer: Trainer, examples: list[Example], n_steps: int) -> tuple[list, list]:
    """The same of the trainer."""
    settings, made = trainer.settings, batches(examples, trainer.settings.batch_size)
    beside = Beside(LORA.scale, {name: pair["m"] for name, pair in trainer.factors.items() if "m" in pair})
    order, losses, gradients = order_of(len(made), settings.seed, 0), [], []
    for _ in range(n_steps):
        group = [made[next(order)] for _ in range(settings.grad_accumulation_steps)]
        total = 0.0
        for batch in group:
            own = mx.grad(lambda f, b: summed_loss(trainer.model, f, beside, b))(trainer.factors, batch)
            total = total + np.concatenate(
                [np.array(own[n][p]).ravel() for n, pair in trainer.factors.items() for p in pair]
            )
        gradients.append(total / sum(batch.targets.size for batch in group))
        losses.append(trainer.take_step().loss)
    return losses, gradients


def errors(got: tuple[list, list], exact: tuple[list, list]) -> np.ndarray:
    """Each step's errors, (2, steps): of the loss, and of the gradient relative to its length."""
    loss = [abs(a - b) for a, b in zip(got[0], exact[0], strict=True)]
    return np.array([loss, [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got[1], exact[1], strict=True)]])


@each("lora, n_steps", [(LORA, 20), (replace(LORA, dora=True), 5)])
def test_steps_are_those_of_peft(tmp_path: Path, lora: LoraSettings, n_steps: int):
    """The bound is peft's own distance in float32 from float64: 4 of it for the first gradient, 16 for what follows on
    it, because MLX forms AdamW's 1 - 0.999^step in float32, where it is up to 3e-5 off (torch's is float64)."""
    source = RandomModel(num_hidden_layers=2)
    path = write_gguf(tmp_path / "m.gguf", source, T.Q8_0)
    examples = random_examples([9, 30, 24, 17, 40, 33, 22])
    settings = TrainingSettings(iters=20, batch_size=2, grad_accumulation_steps=2, learning_rate=1e-3, weight_decay=0.1)

    def trainer(packed: bool = True) -> Trainer:
        return Trainer(load(path, dtype="float32", quantized=packed)[0], examples, lora, settings)

    exact = steps_of_peft(in_float64(to_hf(source)), trainer(), examples, n_steps)
    floor = errors(steps_of_peft(to_hf(source), trainer(), examples, n_steps), exact)
    assert n_steps < 20 or exact[0][-1] < exact[0][0] - 0.1
    assert (floor.max(axis=1) > 0).all()
    assert (floor.max(axis=1) < 5e-6).all()
    for packed in (False, True):
        got = errors(steps_of_ours(trainer(packed), examples, n_steps), exact)
        print(f"errors of first gradient, losses and gradients: {got[1, 0]}, {got.max(axis=1)}")
        print(f"those of peft in float32: {floor[1, 0]}, {floor.max(axis=1)}")
        assert got[1, 0] <= 4 * floor[1, 0]
        assert (got.max(axis=1) <= 16 * floor.max(axis=1)).all()


@each("form, dora", [("mlx-lm", False), ("mlx-lm", True), ("peft", False), ("peft", True)])
def test_mlx_lm_and_peft_read_what_was_trained(tmp_path: Path, form: str, dora: bool):
    base = save_folder(tmp_path / "m", RandomModel(num_hidden_layers=2))
    lora = LoraSettings(4, 6.0, ("q_proj", "gate_proj", "down_proj"), 1, dora=dora)
    model, _ = load(base, dtype="float32")
    settings = TrainingSettings(iters=5, batch_size=4, learning_rate=1e-2)
    train(model, random_examples([20] * 8), tmp_path / "out", lora=lora, settings=settings, form=form, base=str(base))
    ours = load(base, dtype="float32", adapter=tmp_path / "out")[0](mx.array(IDS))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    bound, unchanged = tolerance(plain), torch_logits(plain)
    if form == "mlx-lm":
        theirs = np.array(mlx_lm_utils.load(str(base), adapter_path=str(tmp_path / "out"))[0](mx.array(IDS)))
    else:
        theirs = torch_logits(peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval())
    assert distance(ours, unchanged) > 100 * bound
    assert distance(ours, theirs) < bound
