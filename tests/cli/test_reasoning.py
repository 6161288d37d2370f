"""Commands with a model that thinks: its thought is shown or hidden, and ended by a budget."""

from __future__ import annotations

import io

import pytest

from qwen_mlx.cli import chat, generate
from reference.small_models import CHATML, RandomModel, write_gguf

MARK = "</think>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model whose chat template opens a thought."""

    def edit(writer, tensors) -> None:
        template = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}{# ends with </think> #}"
        writer.kv_data[0]["tokenizer.chat_template"].value = template

    path = tmp_path_factory.mktemp("thinking") / "m.gguf"
    return str(write_gguf(path, RandomModel(3, max_position_embeddings=256), edit=edit))


def options(model: str) -> list[str]:
    return ["--model", model, "--temp", "0", "--max-tokens", "40", "--reasoning-budget", "5"]


def generated(model: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert generate.main([*options(model), "--prompt", "hello", *more]) == 0
    return capsys.readouterr().out


def test_generate_ends_a_thought_and_hides_it(model: str, capsys: pytest.CaptureFixture[str]):
    text = generated(model, capsys)
    thought, mark, answer = text.partition(MARK)
    assert thought.strip()
    assert mark
    assert generated(model, capsys, "--hide-reasoning") == answer.lstrip()


def test_chat_hides_a_thought(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    shown = []
    for more in ([], ["--hide-reasoning"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
        assert chat.main([*options(model), *more]) == 0
        shown.append(capsys.readouterr().out)
    assert MARK in shown[0]
    assert shown[1].strip() == shown[0].partition(MARK)[2].strip()
