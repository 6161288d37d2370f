"""Hostile input by kind: each function makes one case of a random generator and gives it to the package.

A case may succeed or raise QwenMLXError; anything else is a finding.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import qwen_mlx
from qwen_mlx import SamplingSettings
from qwen_mlx.cli.main import dispatch
from qwen_mlx.generation.chat import Chat
from qwen_mlx.generation.prompt_cache import PromptCache, read_header
from qwen_mlx.generation.structured import constraint
from qwen_mlx.generation.tools import load_tools, tool
from qwen_mlx.loading.checkpoint import open_checkpoint
from qwen_mlx.text import chat_template
from qwen_mlx.text.tokenizer import Tokenizer
from reference.small_models import RandomModel, save_folder, write_gguf
from tests.helpers import foreign
from tests.helpers.encoders import encoder_folder
from tests.helpers.fim_model import save_fim_folder
from tests.helpers.gguf_bytes import build, field, tensor
from tests.helpers.small_gguf import layout, small_fields, small_tensors

Random = random.Random
NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    255,
    2**31,
    2**32,
    2**63 - 1,
    2**64,
    10**30,
    0.5,
    -0.0,
    1e-300,
    1e308,
    float("inf"),
    float("nan"),
]
TEXTS = [
    "",
    "a",
    "\0",
    "x" * 3000,
    "\ud800",
    "é日",
    "../..",
    "<|im_end|>",
    "\x1b]0;x\x07",
    "[" * 500,
    "1e999",
    "true",
    "NaN",
]


class World:
    """The files that cases start from, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model_folder = save_folder(folder / "model", RandomModel())
        self.gguf = write_gguf(folder / "m.gguf", RandomModel())
        self.model, self.tokenizer = qwen_mlx.load(self.gguf)
        cache = PromptCache(self.model)
        list(qwen_mlx.stream_generate(self.model, self.tokenizer, [1, 2, 3], max_tokens=3, prompt_cache=cache))
        cache.save(folder / "cache")
        self.cache = (folder / "cache").read_bytes()
        self.case = folder / "case"
        (folder / "others").mkdir()

    @functools.cached_property
    def packed(self) -> list[Path]:
        """Folders that other libraries packed."""
        settings = {
            "awq": foreign.awq,
            "gptq": foreign.gptq,
            "compressed-tensors": foreign.pack_quantized,
            "bitsandbytes": foreign.nf4,
            "fp8": foreign.float_quantized,
        }
        others = self.folder / "others"
        return [
            foreign.packed_folder(others / name, {"quant_method": name}, packer)[0] for name, packer in settings.items()
        ]

    @functools.cached_property
    def encoder(self) -> Path:
        """An embedding model with sentence-transformers' files."""
        path = encoder_folder(self.folder / "others" / "encoder")
        kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
        modules = [
            {"path": kind * (kind != "Transformer"), "type": f"sentence_transformers.models.{kind}"} for kind in kinds
        ]
        (path / "modules.json").write_text(json.dumps(modules))
        (path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "q: "}}))
        (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32}))
        for kind in kinds[1:3]:
            (path / kind).mkdir()
        (path / "Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
        projection = {"in_features": 64, "out_features": 8, "bias": False}
        (path / "Dense" / "config.json").write_text(json.dumps(projection))
        tensors: dict[str, foreign.Stored] = {"linear.weight": ("F32", np.ones((8, 64), np.float32))}
        foreign.write_safetensors(path / "Dense" / "model.safetensors", tensors)
        return path

    @functools.cached_property
    def fim(self) -> tuple[qwen_mlx.Qwen2, Tokenizer]:
        """A model that fills in the middle."""
        return qwen_mlx.load(save_fim_folder(self.folder / "others" / "fim"))


def value(rng: Random, depth: int = 3) -> Any:
    """Any value of JSON, often an awkward one."""
    kind = rng.randrange(8 if depth else 5)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice([None, True, False])
    if kind == 3:
        return rng.randint(-(2 ** rng.randrange(70)), 2 ** rng.randrange(70))
    if kind == 4:
        return "".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.randrange(9)))
    if kind == 5:
        return {rng.choice([*TEXTS, "type", "id"]): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    if kind == 6:
        return functools.reduce(lambda inner, _: [inner], range(rng.choice([1, 50, 900])), [])
    return [value(rng, depth - 1) for _ in range(rng.randrange(4))]


def spoiled(rng: Random, data: Any) -> Any:
    """A JSON value with some of its parts replaced, removed or doubled."""
    data = json.loads(json.dumps(data))  # a copy; copy.deepcopy reaches Python's recursion limit sooner
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        node = data
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            inner = node[key]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
                node = inner
                continue
            if rng.random() < 0.2:
                del node[key]
            elif isinstance(node, dict) and rng.random() < 0.2:
                node[rng.choice(TEXTS)] = value(rng)
            else:
                node[key] = value(rng)
            break
        else:
            data = value(rng)
    return data


def bytes_of(rng: Random, data: bytes) -> bytes:
    """Bytes with some flipped, cut or repeated."""
    out = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 3])):
        at = rng.randrange(len(out) or 1)
        change = rng.randrange(4)
        if change == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif change == 1:
            out[at:at] = rng.choice([b"\0" * 9, b"\xff" * 8, b"[" * 2000, b"\xfe"])
        elif change == 2:
            del out[at : at + rng.choice([1, 8, 10**6])]
        elif len(out) >= at + 8:
            out[at : at + 8] = rng.choice([0, 1, 2**32, 2**63, 2**64 - 1]).to_bytes(8, "little")
    return bytes(out)


def dumped(rng: Random, data: Any) -> bytes:
    return bytes_of(rng, json.dumps(data).encode("utf-8", "surrogatepass"))


def read(path: Path) -> None:
    """Opens a model and reads its values."""
    for parameter in open_checkpoint(path).parameters.values():
        parameter.values()
        parameter.release()


def gguf(world: World, rng: Random) -> None:
    fields, tensors = small_fields(), small_tensors()
    for _ in range(rng.choice([0, 1, 2])):
        name = rng.choice(list(fields))
        kind, payload = fields[name]
        choice = rng.randrange(3)
        if choice == 0:
            del fields[name]
        elif choice == 1:
            fields[name] = (rng.choice([*range(14), kind]), payload)
        else:
            fields[name] = (kind, bytes_of(rng, payload))
    header, size = layout(fields, tensors)
    data = bytes_of(rng, header) if rng.random() < 0.7 else header
    world.case.write_bytes(data + rng.randbytes(max(0, size - rng.choice([0, 0, 0, 1, 64]))))
    read(world.case)


def gguf_directory(world: World, rng: Random) -> None:
    numbers = [0, 1, 2, 32, 2**31, 2**32 - 1, 2**63]
    entries = [
        tensor(rng.choice(["output_norm.weight", "x", ""]), [rng.choice(numbers) for _ in range(rng.randrange(5))],
               rng.choice([0, 2, 8, 12, 99]), rng.choice([0, 32, 31, 2**40]), rng.choice([None, 0, 4, 5, 2**31]))
        for _ in range(rng.randrange(4))
    ]  # fmt: skip
    fields = [field("a" * rng.randrange(3), rng.randrange(14), rng.randbytes(rng.randrange(30))) for _ in range(3)]
    world.case.write_bytes(
        build(fields, entries, bytes(64), rng.choice([2, 3, 3, 1, 2**24]), rng.choice([None, 2**63]))
    )
    read(world.case)


def spoil_header(rng: Random, path: Path) -> None:
    """Writes a safetensors file again with another header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = dumped(rng, spoiled(rng, json.loads(data[8 : 8 + length])))
    path.write_bytes(rng.choice([len(text), len(text), length]).to_bytes(8, "little") + text + data[8 + length :])


def spoil_json(rng: Random, path: Path) -> None:
    """Writes a JSON file again, spoiled."""
    path.write_bytes(dumped(rng, spoiled(rng, json.loads(path.read_text()))))


def safetensors(world: World, rng: Random) -> None:
    shutil.copytree(world.model_folder, world.case)
    spoil_header(rng, world.case / "model.safetensors")
    read(world.case)


def packing(world: World, rng: Random) -> None:
    shutil.copytree(rng.choice(world.packed), world.case)
    if rng.random() < 0.5:
        spoil_header(rng, world.case / "model.safetensors")
    else:
        path = world.case / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] = spoiled(rng, config["quantization_config"])
        path.write_bytes(dumped(rng, config) if rng.random() < 0.2 else json.dumps(config).encode())
    read(world.case)


def encoder(world: World, rng: Random) -> None:
    shutil.copytree(world.encoder, world.case)
    files = [path for path in sorted(world.case.rglob("*.json")) if path.name != "config.json" or rng.random() < 0.5]
    spoil_json(rng, rng.choice(files))
    qwen_mlx.embed(qwen_mlx.load_encoder(world.case), ["x", rng.choice(TEXTS[:4])])


def settings(world: World, rng: Random) -> None:
    shutil.copytree(world.model_folder, world.case)
    path = rng.choice([path for path in sorted(world.case.iterdir()) if path.suffix == ".json"])
    spoil_json(rng, path)
    tokenizer = open_checkpoint(world.case).tokenizer
    tokenizer.decode(tokenizer.encode(rng.choice(TEXTS[:4])))
    if tokenizer.chat_template:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def expression(rng: Random, depth: int = 4) -> str:
    """An expression of a template."""
    if not depth or rng.random() < 0.15:
        return rng.choice(
            ["messages", "ns.s", "ns", "x", "9999999999", "'%9d'", "'ab'", "1.5", "none", "loop", "self", "m", "-7"]
        )
    part = functools.partial(expression, rng, depth - 1)
    names = "center indent replace join list tojson batch slice format sort map string length int round sum unique attr"
    methods = "center ljust zfill format replace join split expandtabs items get encode index __class__ to_bytes title"
    return rng.choice(
        [
            lambda: f"({part()} {rng.choice(['+', '~', '*', '**', '%', '//', '-', 'in', '==', '<', 'and'])} {part()})",
            lambda: f"{part()}|{rng.choice(names.split())}",
            lambda: f"{part()}|{rng.choice(names.split())}({part()})",
            lambda: f"({part()}).{rng.choice(methods.split())}({part()})",
            lambda: f"({part()}).{rng.choice(methods.split())}({part()}, {part()})",
            lambda: f"[{part()}, {part()}]",
            lambda: f"({part()})[{part()}]",
            lambda: f"({part()})[{part()}:]",
            lambda: f"{rng.choice(['range', 'm', 'namespace', 'cycler', 'dict', 'joiner', 'lipsum'])}({part()})",
            lambda: f"{{'a': {part()}}}",
            lambda: f"({part()} if {part()} else {part()})",
        ]
    )()


def statements(rng: Random, depth: int = 3) -> str:
    """Statements of a template, which loop and grow."""
    body = statements(rng, depth - 1) if depth else "{{ " + expression(rng) + " }}"
    return "".join(
        rng.choice(
            [
                "{{ " + expression(rng) + " }}",
                "{% for x in "
                + rng.choice(["range(9999)", "messages", expression(rng)])
                + " %}"
                + body
                + "{% endfor %}",
                "{% set ns.s = " + rng.choice(["ns.s ~ ns.s", "[ns.s, ns.s]", expression(rng)]) + " %}",
                "{% macro m(x) %}" + body + "{{ m(x) }}{% endmacro %}",
                "{% set x %}" + body + "{% endset %}",
                "{% filter indent(9999) %}" + body + "{% endfilter %}",
                "{% if " + expression(rng) + " %}" + body + "{% endif %}",
                "{% call m(1) %}" + body + "{% endcall %}",
                "{% block b %}" + body + "{{ self.b() }}{% endblock %}",
            ]
        )
        for _ in range(rng.randrange(1, 4))
    )


def template(world: World, rng: Random) -> None:
    source = "{% set ns = namespace(s='x') %}" + statements(rng, rng.choice([0, 0, 1, 1, 2, 3]))
    if rng.random() < 0.1:
        source = bytes_of(rng, source.encode()).decode("utf-8", "replace")
    chat_template.render(source, [{"role": "user", "content": rng.choice(["x", "\n" * 99])}])


def cache(world: World, rng: Random) -> None:
    length = int.from_bytes(world.cache[:8], "little")
    text = dumped(rng, spoiled(rng, json.loads(world.cache[8 : 8 + length])))
    head = rng.choice([len(text), len(text), length, 2**63]).to_bytes(8, "little")
    world.case.write_bytes(bytes_of(rng, head + text + world.cache[8 + length :]))
    read_header(world.case)
    PromptCache.load(world.case, world.model)


def session(world: World, rng: Random) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "ids": [1, 2]}]
    world.case.write_bytes(dumped(rng, spoiled(rng, messages)))
    Chat(world.model, world.tokenizer).load(world.case)


def tools(world: World, rng: Random) -> None:
    schema = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}
    path = world.case.with_suffix(".json")
    path.write_bytes(dumped(rng, spoiled(rng, [schema])))
    try:
        for one in load_tools(path):
            chat_template.render("{{ tools | tojson }}", [], tools=[tool(one).schema])
    finally:
        path.unlink()


def command(world: World, rng: Random) -> None:
    options = [
        "--model",
        "--prompt",
        "--max-tokens",
        "--temp",
        "--top-p",
        "--stop",
        "--seed",
        "--kv-bits",
        "--yarn",
        "-f",
    ]
    options += [
        "--prompt-cache",
        "--logit-bias",
        "--num-draft-tokens",
        "--draft-model",
        "--help",
        "--dtype",
        "--force",
        "-x",
    ]
    values = [*TEXTS, str(world.case), str(world.folder), "/dev/null", "1", "-1", "1e309", "99999999999999999999"]
    name = rng.choice(["generate", "convert", "evaluate", "generate", "", "generat"])
    argv = [name, *(rng.choice([*options, *values]) for _ in range(rng.randrange(7)))]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            dispatch([*argv, "--model", rng.choice([str(world.folder / "absent"), ""])] if name == "generate" else argv)
        except SystemExit as end:
            if end.code not in (0, 2, None):
                raise


def calls(world: World, rng: Random) -> None:
    one = functools.partial(value, rng, 1)
    name = rng.choice(
        ["max_tokens", "temperature", "top_k", "stop", "seed", "logit_bias", "system", "min_tokens", "logprobs"]
    )
    argument = one() if name != "max_tokens" else rng.choice([one(), 1])
    limit = {} if name == "max_tokens" and not isinstance(argument, int) else {"max_tokens": 1}
    attempts: list[Callable[[], Any]] = [
        lambda: world.tokenizer.encode(one()),
        lambda: world.tokenizer.decode(one()),
        lambda: world.tokenizer.apply_chat_template([{"role": one(), "content": one()}]),
        lambda: qwen_mlx.load(rng.choice([one() or 0, str(world.case)]), dtype=rng.choice([None, one()])),
        lambda: SamplingSettings(**{rng.choice(["temperature", "top_k", "top_p", "min_p"]): one()}),
        lambda: qwen_mlx.generate(
            world.model, world.tokenizer, rng.choice(["hi", [1, 2], one()]), **({name: argument} | limit)
        ),
        lambda: Chat(world.model, world.tokenizer, **{rng.choice(["system", "tools", "max_tokens", "stop"]): one()}),
    ]
    rng.choice(attempts)()


def schema(rng: Random, depth: int = 3) -> Any:
    """A JSON schema, often an impossible or an expensive one."""
    if not depth or rng.random() < 0.1:
        return rng.choice([True, False, {}, value(rng, 1), {"$ref": "#"}, {"$ref": "#/$defs/a"}])
    types = ["object", "array", "string", "integer", "number", "boolean", "null"]
    counts = [0, 1, 2, 7, 50, 999, 10**6, 2**31, 2**64, -1, 0.5]
    numbers = [0, 1, -1, 0.1, 1e-9, 1e300, 10**40, 7, 9973]
    patterns = ["^a+$", "(a{1,99}){1,99}", "(", ".*a.{20}", r"\d{1000}", "(?=a)", "a" * 999, "[^x]*x?" * 9, ""]
    inner = functools.partial(schema, rng, depth - 1)
    many = rng.choice([1, 2, 3, 30])
    keywords: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": rng.choice([*types, [rng.choice(types), rng.choice(types)]])},
        lambda: {"properties": {rng.choice(["a", "b", *TEXTS]): inner() for _ in range(many)}, "type": "object"},
        lambda: {"required": [rng.choice(["a", "b", *TEXTS]) for _ in range(many)]},
        lambda: {"additionalProperties": inner()},
        lambda: {"patternProperties": {rng.choice(patterns): inner()}},
        lambda: {"items": inner(), rng.choice(["minItems", "maxItems"]): rng.choice(counts), "type": "array"},
        lambda: {"prefixItems": [inner() for _ in range(many)]},
        lambda: {"type": "string", rng.choice(["minLength", "maxLength"]): rng.choice(counts)},
        lambda: {"type": "string", "pattern": rng.choice(patterns)},
        lambda: {"type": "string", "format": rng.choice(["email", "uuid", "date-time", "ipv6", "uri", "x"])},
        lambda: {"type": "number", rng.choice(["minimum", "exclusiveMaximum", "multipleOf"]): rng.choice(numbers)},
        lambda: {rng.choice(["anyOf", "oneOf", "allOf"]): [inner() for _ in range(min(many, 3))]},
        lambda: {rng.choice(["enum", "const"]): value(rng, 1)},
        lambda: {"not": inner()},
        lambda: {"$defs": {"a": inner()}, "$ref": "#/$defs/a"},
        lambda: {"x-guidance": value(rng, 2)},
    ]
    return functools.reduce(
        lambda one, more: one | more(), (rng.choice(keywords) for _ in range(rng.randint(1, 3))), {}
    )


def deep(depth: int) -> dict[str, Any]:
    """Rules and schemas that name one another."""
    if depth % 2:
        return {"grammar": "start: r0\n" + "".join(f"r{i:x}:r{i + 1:x}\n" for i in range(depth)) + f'r{depth:x}:"x"'}
    schemas = {f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(depth)}
    return {"json_schema": {"$ref": "#/$defs/a0", "$defs": schemas | {f"a{depth}": {}}}}


def structured(world: World, rng: Random) -> None:
    parts = ["a", "(", ")", "*", "{1,999}", "?", "|", ".", "[^a]", r"\p{L}", "{4000000000}", "&", "~", "\0", "é"]
    rules = [
        "start:",
        "a",
        "start",
        '"x"',
        "|",
        "\n",
        "b:",
        "/a+/",
        "A:",
        "{1,9999}",
        "(",
        ")",
        "%json {}",
        "<[7]>",
        "+",
    ]
    form: dict[str, Any] = rng.choice(
        [
            lambda: {"json_schema": schema(rng)},
            lambda: {"json_schema": spoiled(rng, schema(rng))},
            lambda: {"json_schema": dumped(rng, schema(rng)).decode("utf-8", "replace")},
            lambda: {"regex": "".join(rng.choice(parts) for _ in range(rng.randrange(30)))},
            lambda: {"grammar": "start: " + " ".join(rng.choice(rules) for _ in range(rng.randrange(30)))},
            lambda: deep(rng.randrange(4000)),
            lambda: {"choices": rng.choice([value(rng), [rng.choice(TEXTS) for _ in range(3)]])},
        ]
    )()
    matcher = constraint(world.tokenizer, **form).start(rng.choice([1, 20, 10**6]))
    for _ in range(5):
        bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[: world.tokenizer.vocab_size]
        matcher.accept(int(rng.choice([*np.flatnonzero(bits)[:50], 0])))


def fill(world: World, rng: Random) -> None:
    model, tokenizer = world.fim
    one = functools.partial(value, rng, 1)
    name = rng.choice(["files", "repository", "path", "max_prompt_tokens", "stop_at", "max_tokens", "stop", "seed"])
    given = {name: one()} | ({} if name == "max_tokens" else {"max_tokens": 1})
    texts = [rng.choice([*TEXTS, "x" * 10**5, one()]) for _ in range(2)]
    if not isinstance(given["max_tokens"], int) or given["max_tokens"] < 3:
        qwen_mlx.fill(model, tokenizer, *texts, **given)


KINDS: dict[str, Callable[[World, Random], None]] = {
    function.__name__: function
    for function in (
        *(gguf, gguf_directory, safetensors, packing, encoder, settings, template, cache, session, tools),
        *(structured, fill, command, calls),
    )
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Give the package hostile input of every kind."
    )
    parser.add_argument("--cases", type=int, default=20_000, help="of each kind (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="makes the same cases again (default %(default)s)")
    parser.add_argument("--kind", action="append", choices=[*KINDS], help="only this one (can be repeated)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case, to see one again")
    return parser
