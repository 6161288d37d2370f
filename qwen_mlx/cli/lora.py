"""The command `lora`: trains an adapter on examples, beside a model that stays as it is, packed or dense."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QwenMLXError
from ..loading import hub
from .arguments import DTYPES
from .command import Parser, ProgressLine, program, require_at_least
from .convert import stop_once

if TYPE_CHECKING:
    from ..training.data import Example
    from ..training.folder import Row


def parser() -> Parser:
    """The command line's arguments."""
    p = Parser(
        prog=program("lora"),
        description="Train a LoRA adapter. The model's own weights stay as they are, packed or dense. The adapter, its "
        "losses and the state to go on from are saved in one folder as training goes.",
    )
    p.add_argument("--model", "-m", metavar="MODEL", help=".gguf file, folder of safetensors, or hub id")
    p.add_argument("--data", metavar="DIR", required=True, help="folder with train.jsonl and, to validate, valid.jsonl")
    p.add_argument("--adapter", metavar="OUT", required=True, help="folder to write")
    p.add_argument(
        "--format", choices=("mlx-lm", "peft"), default="mlx-lm", help="of the adapter (default %(default)s)"
    )
    p.add_argument("--resume", action="store_true", help="go on from what the folder holds, with the same settings")
    p.add_argument("--mask-prompt", action="store_true", help="learn the last answer alone, not what comes before it")
    p.add_argument("--max-seq-length", type=int, default=2048, metavar="N", help="tokens of an example (default 2048)")
    p.add_argument("--dtype", choices=DTYPES, help="of activations; default: float32 on a CPU, bfloat16 on a GPU")
    shape = p.add_argument_group("adapter")
    shape.add_argument("--rank", type=int, default=8, metavar="N", help="default 8")
    shape.add_argument("--alpha", type=float, metavar="X", help="scale times rank (default 2 x rank)")
    shape.add_argument(
        "--targets", nargs="+", metavar="NAME", help="projections that get one, such as q_proj v_proj (default: all)"
    )
    shape.add_argument("--num-layers", type=int, metavar="N", help="only the last N layers (default: all)")
    shape.add_argument("--dora", action="store_true", help="train the lengths of the matrices' rows, too (DoRA)")
    shape.add_argument("--dropout", type=float, default=0.0, metavar="P", help="of what the adapter reads (default 0)")
    course = p.add_argument_group("training")
    course.add_argument("--iters", type=int, default=1000, metavar="N", help="steps (default 1000)")
    course.add_argument("--batch-size", type=int, default=4, metavar="N", help="examples of a batch (default 4)")
    course.add_argument(
        "--grad-accumulation-steps", type=int, default=1, metavar="N", help="batches of a step (default 1)"
    )
    course.add_argument("--learning-rate", type=float, default=1e-4, metavar="X", help="the highest (default 1e-4)")
    course.add_argument(
        "--lr-schedule", choices=("constant", "linear", "cosine"), default="constant", help="default %(default)s"
    )
    course.add_argument("--warmup", type=int, default=0, metavar="N", help="steps until the highest rate (default 0)")
    course.add_argument("--weight-decay", type=float, default=0.01, metavar="X", help="of AdamW (default 0.01)")
    course.add_argument(
        "--grad-checkpoint", action="store_true", help="compute each layer twice, in less memory on a GPU"
    )
    course.add_argument(
        "--packing", action="store_true", help="fill rows of --max-seq-length tokens with examples, which stay apart"
    )
    course.add_argument("--seed", type=int, default=0, metavar="N", help="of the adapter's start and the order of data")
    course.add_argument(
        "--val-batches", type=int, default=25, metavar="N", help="batches of a validation, -1 for all (default 25)"
    )
    course.add_argument(
        "--steps-per-eval", type=int, default=200, metavar="N", help="between validations (default 200)"
    )
    course.add_argument("--save-every", type=int, default=100, metavar="N", help="steps between saves (default 100)")
    p.add_argument("--steps-per-report", type=int, default=10, metavar="N", help="between lines (default 10)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes raise QwenMLXError."""
    arguments = vars(parser().parse_args(argv))
    require_at_least(2, "--max-seq-length", arguments["max_seq_length"], " tokens")
    require_at_least(1, "--steps-per-report", arguments["steps_per_report"])
    out = Path(arguments["adapter"]).expanduser()

    from ..loading.load import load
    from ..text.tokenizer import Tokenizer
    from ..training.folder import check_output
    from ..training.lora import TARGETS, LoraSettings
    from ..training.train import TrainingSettings, train

    names = ["iters", "batch_size", "grad_accumulation_steps", "learning_rate", "lr_schedule", "warmup", "weight_decay"]
    names += ["grad_checkpoint", "seed", "steps_per_eval", "save_every"]
    val_batches = None if arguments["val_batches"] == -1 else arguments["val_batches"]
    pack_length = arguments["max_seq_length"] if arguments["packing"] else None
    settings = TrainingSettings(
        **{name: arguments[name] for name in names}, val_batches=val_batches, pack_length=pack_length
    )
    alpha = 2.0 * arguments["rank"] if arguments["alpha"] is None else arguments["alpha"]
    targets = tuple(arguments["targets"] or TARGETS)
    lora = LoraSettings(
        arguments["rank"], alpha, targets, arguments["num_layers"], arguments["dropout"], arguments["dora"]
    )
    check_output(out, arguments["resume"])
    path = hub.resolve(arguments["model"])
    examples, validation = _examples(arguments, Tokenizer.read(path))
    with ProgressLine(f"Loading {path.name}") as line:
        model, _ = load(path, dtype=arguments["dtype"], progress=line)
    longest = model.config.context_length
    if arguments["max_seq_length"] > longest and max(len(e.ids) for e in (*examples, *validation)) > longest:
        raise QwenMLXError(
            f"{arguments['data']}: has examples of over {longest} tokens, the model's context; "
            f"give --max-seq-length {longest}."
        )
    stop_once()
    with _Display(settings.iters, arguments["steps_per_report"]) as display:
        train(
            model,
            examples,
            out,
            validation=validation,
            lora=lora,
            settings=settings,
            form=arguments["format"],
            base=arguments["model"] or str(path),
            resume=arguments["resume"],
            report=display,
        )
    model_option = f" --model {shlex.quote(arguments['model'])}" if arguments["model"] else ""
    print(f"{out}: {program('generate')}{model_option} --adapter {shlex.quote(str(out))} --prompt ...")
    return 0


def _examples(arguments: dict[str, Any], tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """The examples to learn and those to validate on, with a line for each file."""
    from ..training.data import read_examples

    data = Path(arguments["data"]).expanduser()
    if not data.is_dir():
        raise QwenMLXError(f"--data {data}: is no folder; give one with train.jsonl and, to validate, valid.jsonl.")
    found: list[list[Example]] = []
    for name in ("train.jsonl", "valid.jsonl"):
        if name == "valid.jsonl" and not (data / name).exists():
            found.append([])
            continue
        settings = {"mask_prompt": arguments["mask_prompt"], "max_length": arguments["max_seq_length"]}
        with ProgressLine(f"Reading {name}"):
            examples, notes = read_examples(data / name, tokenizer, **settings)
        found.append(examples)
        print(
            f"{data / name}: {len(examples)} examples, {sum(len(e.ids) - e.n_prompt for e in examples)} tokens to learn"
        )
        for note in notes:
            print(note, file=sys.stderr)
    return found[0], found[1]


class _Display:
    """A progress bar on standard error, where that is a terminal, and every few steps a line on standard output."""

    def __init__(self, iters: int, every: int):
        from tqdm import tqdm

        self._bar = tqdm(total=iters, desc="Training", unit="step", leave=False, disable=not sys.stderr.isatty())
        self._iters, self._every = iters, every
        self._losses: list[float] = []
        self._rates: list[float] = []

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __call__(self, row: Row, rate: float) -> None:
        """Shows a step."""
        self._bar.update(row.step - self._bar.n)
        if row.loss is not None:
            self._losses.append(row.loss)
            self._rates.append(rate)
            self._bar.set_postfix_str(f"loss {row.loss:.4f}, {rate:,.0f} tokens/s")
            if row.step % self._every == 0 or row.step == self._iters:
                loss, mean = (sum(values) / len(values) for values in (self._losses, self._rates))
                self._print(
                    f"step {row.step}: loss {loss:.4f}, {mean:,.1f} tokens/s, learning rate {row.learning_rate:.3g}"
                )
                self._losses, self._rates = [], []
        if row.validation_loss is not None:
            self._print(f"step {row.step}: validation loss {row.validation_loss:.4f}")

    def _print(self, line: str) -> None:
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()
