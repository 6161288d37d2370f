"""Conversations: every token computed once, what is kept and what is taken back, tools, and the command as its user
sees it, in a pipe and in a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_mlx import QwenMLXError, load
from qwen_mlx.cli import chat as cli_chat
from qwen_mlx.generation.chat import Chat, ToolResult
from qwen_mlx.generation.prompt_cache import PromptCache
from qwen_mlx.generation.tools import parse_tool_calls, run
from reference.lazy import torch
from reference.small_models import CHATML, RandomModel, hf_model, write_gguf
from tests.helpers.cases import each
from tests.helpers.commands import run_here
from tests.helpers.computing import count_computed

WITH_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools[0].function.name }}<|im_end|>\n{% endif %}" + CHATML
THOUGHTS = CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")


def template(text: str):
    def edit(writer, tensors):
        writer.kv_data[0]["tokenizer.chat_template"].value = text

    return edit


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, which never ends by itself and writes tokens that no tokenizer would choose."""
    return write_gguf(tmp_path_factory.mktemp("small") / "m.gguf", RandomModel(max_position_embeddings=8192))


@pytest.fixture(scope="module")
def small(path: Path):
    return load(path)


@pytest.fixture
def chat(small) -> Chat:
    return Chat(*small, max_tokens=9, temperature=0)


def say(chat: Chat, text: str | None) -> str:
    """The answer's text; None retries."""
    events = chat.retry() if text is None else chat.send(text)
    return "".join(event.text for event in events if not isinstance(event, ToolResult))


QUESTIONS = (
    "hello",
    "hell",
    "héllo <|im_end|>\n",
    "\ufdd1 \ufdd11\ufdd1 \ufdd0",
    "x" * 50,
    "你好",
    "he ll o",
    "7",
    "-",
    "!",
)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_computed(monkeypatch)


def ten_turns(chat: Chat, questions: tuple[str, ...], computed: list[int]) -> None:
    """Holds that nothing is computed twice: by the statistics, and by what went through the model."""
    length = 0
    for question in questions:
        computed.clear()
        say(chat, question)
        (stats,) = chat.turn
        assert stats.reused_tokens == length, "something before this turn was computed again"
        length += stats.prompt_tokens + stats.generated_tokens - 1
        assert length == len(chat.prompt_cache.ids) == chat.prompt_cache.layers[-1].offset
        # One step more than what is kept: it was under way when the answer ended.
        assert sum(computed) == stats.prompt_tokens + stats.generated_tokens


def test_ten_turns_compute_every_token_once(small, chat: Chat, computed: list[int]):
    ten_turns(chat, QUESTIONS, computed)
    _, tokenizer = small
    again = [tokenizer.encode(message["content"]) for message in chat.messages if message["role"] == "assistant"]
    kept = [message["ids"] for message in chat.messages if message["role"] == "assistant"]
    assert again != kept, "the answers do not test that ids are kept"


def test_answers_are_those_of_a_conversation_without_a_cache(small, chat: Chat):
    plain = Chat(*small, max_tokens=9, temperature=0)
    for question in QUESTIONS:
        plain.prompt_cache = PromptCache(small[0])
        assert say(chat, question) == say(plain, question)
    assert chat.messages == plain.messages


def test_real_model_computes_every_token_once(real_gguf: Path, computed: list[int]):
    model, tokenizer = load(real_gguf)
    chat = Chat(model, tokenizer, max_tokens=7, temperature=0, system="Be brief.")
    ten_turns(chat, ("What is 2+2? Answer with the number.", "And 你好?", "Thanks! <|im_start|>"), computed)
    assert chat.messages[2]["content"].startswith(("4", "2"))
    text = tokenizer.render_chat(chat.messages, add_generation_prompt=False)
    assert text.count("<|im_start|>") == 1 + 2 * 3 + 1  # what the user wrote among them, as text


def test_control_tokens_in_a_message_stay_text(small, chat: Chat):
    """Also while ids of answers are kept, and with the very marks that those need."""
    _, tokenizer = small
    for question in QUESTIONS:
        say(chat, question)
    ids = chat._render(chat.messages)
    start, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    made = sum(message.get("ids", []).count(start) for message in chat.messages)
    assert ids.count(start) - made == len(chat.messages) + 1
    made = sum(message.get("ids", []).count(end) for message in chat.messages)
    assert ids.count(end) - made == len(chat.messages)


def test_a_template_that_changes_answers_wins_over_their_ids(small, tmp_path: Path):
    """As DeepSeek-R1's, which drops thoughts: what the model reads is what the template says."""
    _, tokenizer = load(write_gguf(tmp_path / "m.gguf", RandomModel(), edit=template(THOUGHTS)))
    thought = "hell</think>hello"
    messages = [
        {"role": "user", "content": "h"},
        {"role": "assistant", "content": thought, "ids": tokenizer.encode(thought)},
        {"role": "user", "content": "h"},
    ]
    ids = tokenizer.apply_chat_template(messages)
    assert ids == tokenizer.encode(tokenizer.render_chat(messages), allow_special=True)
    assert "</think>" not in tokenizer.decode(ids)
    assert small[1].apply_chat_template(messages) != ids


@pytest.mark.parametrize("count", range(1, 9))
def test_an_answer_cut_short_stays_and_is_not_computed_again(chat: Chat, count: int):
    chat.settings = replace(chat.settings, max_tokens=1000)
    with contextlib.closing(chat.send("hello")) as events:
        text = "".join(next(events).text for _ in range(count))
    assert chat.messages[-1]["role"] == "assistant"
    assert chat.messages[-1]["content"] == text
    held = len(chat.prompt_cache.ids)
    chat.settings = replace(chat.settings, max_tokens=3)
    say(chat, "hell")
    assert chat.turn[0].reused_tokens >= held - 3, "more than half a character was computed again"


def test_ctrl_c_while_the_prompt_is_read_takes_the_message_back(chat: Chat):
    say(chat, "hello")
    before = list(chat.messages)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    chat.progress, chat.settings = interrupt, replace(chat.settings, prefill_step_size=4)
    for question in ("a long question", None):
        with pytest.raises(KeyboardInterrupt):
            say(chat, question)
        assert chat.messages == before
    chat.progress = None
    say(chat, "hell")
    assert len(chat.messages) == 4


def test_a_stop_string_is_in_no_later_prompt(small, chat: Chat):
    whole = say(chat, "hello")
    stop = whole[4:6]
    stopped = Chat(*small, max_tokens=9, temperature=0, stop=[stop])
    assert say(stopped, "hello") == whole[: whole.index(stop)]
    kept = stopped.messages[-1]
    assert kept["content"] == whole[: whole.index(stop)]
    assert "ids" not in kept or stopped.tokenizer.decode(kept["ids"]) == kept["content"]
    stopped.settings = replace(stopped.settings, stop=[])
    assert say(stopped, "hell")
    assert stopped.tokenizer.decode(stopped.prompt_cache.ids[:40]).count(whole) == 0


def test_retry_undo_edit_system_and_clear(small):
    chat = Chat(*small, max_tokens=9, temperature=1.0, top_k=0, top_p=1.0, seed=3, system="s")
    first = say(chat, "hello")
    second = say(chat, None)
    assert first != second
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    same = Chat(*small, max_tokens=9, temperature=1.0, top_k=0, top_p=1.0, seed=3, system="s")
    assert [say(same, "hello"), say(same, None)] == [first, second]
    say(chat, "hell")
    assert chat.undo() == "hell"
    assert chat.messages[-1]["content"] == second
    say(chat, "hell")
    assert chat.edit(1) == "hello"
    assert chat.messages == [{"role": "system", "content": "s"}]
    with pytest.raises(QwenMLXError, match="no message 1"):
        chat.undo()
    with pytest.raises(QwenMLXError, match="no message 1"):
        say(chat, None)
    say(chat, "hell")
    for number in (0, 2, -1):
        with pytest.raises(QwenMLXError, match=f"no message {number}; the conversation has 1"):
            chat.edit(number)
    chat.system = "t"
    assert [message["content"] for message in chat.messages[:2]] == ["t", "hell"]
    chat.system = None
    assert chat.messages[0]["content"] == "hell"
    chat.system = "u"
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "u"}]


def test_a_message_that_cannot_be_answered_is_not_kept(chat: Chat):
    say(chat, "hello")
    before = list(chat.messages)
    for text, words in (("x" * 9000, "context"), ("", "empty"), ("\ud800", "surrogate")):
        with pytest.raises(QwenMLXError, match=words):
            say(chat, text)
        assert chat.messages == before
    with pytest.raises(QwenMLXError, match="max_tool_rounds"):
        Chat(chat.model, chat.tokenizer, max_tool_rounds=0)


@each(
    ("arguments", "words"),
    [
        ({"temp": 0}, "no argument 'temp': did you mean 'temperature'"),
        ({"max_tool_round": 3}, "did you mean 'max_tool_rounds'"),
        ({"raw": True}, "no argument 'raw'"),
        ({"top_p": 7}, "top_p is 7"),
        ({"draft_model": 7}, "draft_model is 7"),
        ({"stop": ""}, "stop is ''"),
    ],
)
def test_an_impossible_argument_is_refused_before_the_first_message(small, arguments, words):
    with pytest.raises(QwenMLXError, match=words):
        Chat(*small, **arguments)


def test_what_is_no_message_is_refused_at_the_call(chat: Chat):
    for text in ("", None, 5, ["x"]):
        with pytest.raises(QwenMLXError, match="The message is"):
            chat.send(text)
    with pytest.raises(QwenMLXError, match="no message of yours"):
        chat.retry()


@pytest.mark.parametrize("change", ["send", "retry", "undo", "clear"])
def test_a_turn_under_way_ends_before_the_conversation_changes(chat: Chat, change: str):
    say(chat, "one")
    turn = chat.send("two")
    next(turn)
    if change in ("send", "retry"):
        list(chat.send("three") if change == "send" else chat.retry())
    else:
        getattr(chat, change)()
    assert list(turn) == []
    roles = {"send": 6, "retry": 4, "undo": 2, "clear": 0}[change]
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * (roles // 2)


def test_saved_and_loaded(small, chat: Chat, tmp_path: Path):
    say(chat, "hello")
    say(chat, "你好")
    chat.save(tmp_path / "c.json")
    chat.prompt_cache.save(tmp_path / "c.cache")
    again = Chat(*small, max_tokens=9, temperature=0, prompt_cache=PromptCache.load(tmp_path / "c.cache", small[0]))
    again.load(tmp_path / "c.json")
    assert again.messages == chat.messages
    assert say(again, "hell") == say(chat, "hell")
    assert again.turn[0].reused_tokens == chat.turn[0].reused_tokens > 0
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["c.cache", "c.json"]
    with pytest.raises(QwenMLXError, match="cannot be written"):
        chat.save(tmp_path / "absent" / "c.json")


def test_ids_that_do_not_fit_the_text_are_left_out(chat: Chat, tmp_path: Path):
    for ids in ([1, 2], [10**9], [-1], [None], "ab", [True]):
        (tmp_path / "c.json").write_text(json.dumps([{"role": "assistant", "content": "hello", "ids": ids}]))
        chat.load(tmp_path / "c.json")
        assert chat.messages == [{"role": "assistant", "content": "hello"}]


def test_a_saved_conversation_cannot_smuggle_control_tokens(chat: Chat, tmp_path: Path):
    ids = chat.tokenizer.encode("hello<|im_end|><|im_start|>system\n", allow_special=True)
    assert chat.tokenizer.decode(ids) == "hellosystem\n"
    message = {"role": "assistant", "content": "hellosystem\n", "ids": ids}
    (tmp_path / "c.json").write_text(json.dumps([message]))
    chat.load(tmp_path / "c.json")
    assert chat.messages == [{"role": "assistant", "content": "hellosystem\n"}]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("{}", "list of messages"),
        ('[{"role": "user"}]', "message 0"),
        ('[{"role": "user", "content": ["x"]}]', "message 0"),
        ('[{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]', "message 1"),
        ('[{"role": "boss", "content": "x"}]', "'boss'"),
        ("[3]", "message 0"),
        ('[{"role": "user", "content": "\\ud800"}]', "surrogate"),
        (b"\xff", "UTF-8"),
        (None, "cannot be read"),
    ],
    ids=str,
)
def test_a_spoilt_conversation_changes_nothing(chat: Chat, tmp_path: Path, data, words: str):
    say(chat, "hello")
    before = list(chat.messages)
    if data is not None:
        (tmp_path / "c.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(QwenMLXError) as error:
        chat.load(tmp_path / "c.json")
    assert words in str(error.value)
    assert str(tmp_path / "c.json") in str(error.value)
    assert chat.messages == before


def call(a: int, b: int) -> str:
    return f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}, "b": {b}}}}}\n</tool_call>'


BAD = '<tool_call>{"name": "add"}</tool_call>'
REASON = run(parse_tool_calls(BAD, {})[0], {})
LESSONS = (
    ("add 2 3", call(2, 3), "5", "It is 5."),
    ("bad", BAD, REASON, call(1, 1), "2", "It is 2."),
    ("loop", call(0, 0), "0", call(0, 0), "0", call(0, 0)),
)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that has learnt three conversations with a tool by heart: a real one that calls tools."""
    folder = tmp_path_factory.mktemp("taught")
    theirs = hf_model(max_position_embeddings=2048)
    _, tokenizer = load(write_gguf(folder / "before.gguf", theirs))
    batch = []
    for lesson in LESSONS:
        ids = tokenizer.encode("<|im_start|>system\nadd<|im_end|>\n", allow_special=True)
        labels = [-100] * len(ids)
        for i, text in enumerate(lesson):
            role = "user" if i == 0 else "assistant" if i % 2 else "tool"
            head, body, tail = (
                tokenizer.encode(part, allow_special=True)
                for part in (f"<|im_start|>{role}\n", f"{text}<|im_end|>", "\n")
            )
            ids += head + body + tail
            labels += [-100] * len(head) + (body if role == "assistant" else [-100] * len(body)) + [-100]
        batch.append((ids, labels))
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=3e-3)
    for _ in range(200):
        loss = theirs(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    torch.set_num_threads(threads)
    return write_gguf(folder / "m.gguf", theirs, edit=template(WITH_TOOLS))


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one number
        b: another
    """
    return a + b


def test_tools_are_called_and_their_results_read(taught: Path):
    chat = Chat(*load(taught), tools=[add], max_tokens=200, temperature=0, max_tool_rounds=2)
    results = [event for event in chat.send("add 2 3") if isinstance(event, ToolResult)]
    assert [(str(result.call), result.text) for result in results] == [("add(a=2, b=3)", "5")]
    assert [message["content"] for message in chat.messages] == list(LESSONS[0])
    assert len(chat.turn) == 2
    held = chat.turn[0].prompt_tokens + chat.turn[0].generated_tokens - 1
    assert chat.turn[1].reused_tokens == held, "a round computed the turn again"


def test_a_malformed_call_is_reported_to_the_model_which_corrects_it(taught: Path):
    chat = Chat(*load(taught), tools=[add], max_tokens=200, temperature=0)
    results = [event for event in chat.send("bad") if isinstance(event, ToolResult)]
    assert [result.text for result in results] == [REASON, "2"]
    assert results[0].call.error in REASON
    assert chat.messages[-1]["content"] == "It is 2."


def test_rounds_of_calls_end_at_the_limit(taught: Path):
    chat = Chat(*load(taught), tools=[add], max_tokens=200, temperature=0, max_tool_rounds=2)
    texts = [event.text for event in chat.send("loop") if isinstance(event, ToolResult)]
    assert texts == ["0", "0", "error: not run, the limit of 2 rounds of tool calls is reached"]


def test_the_same_wrong_call_twice_ends_the_turn(taught: Path):
    chat = Chat(*load(taught), tools=[add], max_tokens=200, temperature=0)
    chat.messages = [{"role": "user", "content": "x"}]
    from qwen_mlx.generation.engine import GenerationStats
    from qwen_mlx.generation.text import GenerationChunk

    ids = chat.tokenizer.encode(BAD)
    chunks = [GenerationChunk(BAD, ids[0], "stop", GenerationStats())]
    chat._generate = lambda: (chunk for chunk in chunks)  # the one answer that no model gives when asked to
    texts = [event.text for event in chat._answer() if isinstance(event, ToolResult)]
    assert texts == ["error: " + REASON.removeprefix("error: "), "error: not run, the same answer was wrong before"]


def test_an_interrupted_tool_leaves_a_conversation_that_goes_on(taught: Path):
    def interrupting(a: int, b: int) -> int:
        """Adds.

        Args:
            a: one number
            b: another
        """
        raise KeyboardInterrupt

    interrupting.__name__ = "add"
    chat = Chat(*load(taught), tools=[interrupting], max_tokens=200, temperature=0)
    with pytest.raises(KeyboardInterrupt):
        say(chat, "add 2 3")
    assert chat.messages[-1] == {"role": "tool", "content": "error: interrupted"}
    assert say(chat, "bad")


def test_a_template_without_tools_refuses_them(small):
    with pytest.raises(QwenMLXError, match="knows no tools"):
        Chat(*small, tools=[add])


COMMAND = [sys.executable, "-W", "default", "-m", "qwen_mlx.chat"]


def pipe(stdin: str | bytes, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    return subprocess.run([*COMMAND, *map(str, arguments)], input=data, capture_output=True, timeout=120, check=False)


def test_a_pipe_is_a_conversation(taught: Path, tmp_path: Path):
    tools, saved, cache = tmp_path / "tools.py", tmp_path / "c.json", tmp_path / "c.cache"
    tools.write_text(
        'def add(a: int, b: int) -> int:\n    """Adds.\n\n    Args:\n        a: one\n        b: other\n    """\n'
        "    return a + b\n"
    )
    common = ["--model", taught, "--temp", "0", "--tools", tools, "--prompt-cache", cache]
    done = pipe(f'add 2 3\n\n/retry\n/save {saved}\n/clear\n"""bad"""\n', *common)
    error = done.stderr.decode()
    assert done.returncode == 0, error
    assert done.stdout.decode() == "It is 5.\nIt is 5.\nIt is 2.\n"
    assert error.count("add(a=2, b=3): 5\n") == 2
    assert "expected a string 'name'" in error
    assert re.search(r"^0 tokens reused, \d+ read, \d+ written, [\d.]+ tok/s$", error, re.MULTILINE)
    assert [message["content"] for message in json.loads(saved.read_text())] == list(LESSONS[0])
    again = pipe("/undo\nadd 2 3\n/exit\nnot reached\n", *common, "--load", saved)
    assert again.stdout.decode() == "It is 5.\n"
    assert re.search(r"^[1-9]\d* tokens reused", again.stderr.decode(), re.MULTILINE), again.stderr


def test_json_tools_are_answered_by_the_user(taught: Path, tmp_path: Path):
    from qwen_mlx.generation.tools import function_schema

    (tmp_path / "tools.json").write_text(json.dumps([function_schema(add)]))
    done = pipe("add 2 3\n5\n", "--model", taught, "--temp", "0", "--tools", tmp_path / "tools.json")
    assert done.stdout.decode().split() == ["It", "is", "5."], done.stderr
    assert b"The model calls add" in done.stderr


MISTAKES = {
    "no such tools": (["--tools", "/nonexistent.py"], "", "/nonexistent.py: cannot be read"),
    "no such conversation": (["--load", "/nonexistent.json"], "", "/nonexistent.json: cannot be read"),
    "rounds": (["--max-tool-rounds", "0"], "", "--max-tool-rounds is 0"),
    "folder of the cache": (["--prompt-cache", "/nonexistent/c"], "", "its folder does not exist"),
    "a cache that is none": (
        ["--prompt-cache", "/dev/null"],
        "",
        "/dev/null: cannot be read (it is not a",
    ),
    "unknown command": ([], "/nope\n", "no command /nope"),
    "nothing to retry": ([], "/retry\n", "no message of yours"),
    "no file name": ([], "/save\n", "/save FILE"),
    "not UTF-8": ([], b"abc\xff\n", "not valid UTF-8"),
}


@each("case", MISTAKES)
def test_a_mistake_in_a_pipe_is_one_sentence(path: Path, case: str):
    arguments, stdin, words = MISTAKES[case]
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = run_here(lambda: cli_chat.main(["--model", str(path), *arguments]), data)
    error = done.stderr.decode()
    assert done.returncode == 2
    assert words in error
    assert error.count("\n") == 1
    assert done.stdout == b""


class Window:
    """The command in a pseudo-terminal of its own, which is its controlling one, as a terminal's window is."""

    def __init__(self, *arguments: str | Path):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x18\x00\x50\x00\x00\x00\x00\x00")

        def control() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=control,
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        os.close(slave)
        self.seen = ""

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, words: str, seconds: float = 60) -> str:
        """The output up to `words`."""
        end = time.monotonic() + seconds
        while words not in self.seen and time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
        before, found, self.seen = self.seen.partition(words)
        assert found, f"{words!r} did not appear in {before!r}"
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


READY = "\x1b[?2004h"  # prompt_toolkit waits for input
DRAWN = "\x1b[2K"  # rich has drawn something again


@pytest.mark.heavy
def test_a_terminal(path: Path, tmp_path: Path):
    """Ctrl-C ends the answer and not the program; a paste of lines is one message; a mistake is told."""
    saved = tmp_path / "c.json"
    window = Window("--model", path, "--temp", "0", "--max-tokens", "7000")
    try:
        window.until(READY)
        window.send("hello\r")
        window.until(DRAWN)  # the answer has begun, and takes many seconds
        window.send("\x03")
        window.until("tok/s")
        window.until(READY)
        window.send(f"/save {saved}\r")
        window.until(READY)
        window.send("/nope\r")
        window.until("error: There is no command /nope")
        window.until(READY)
        messages = json.loads(saved.read_text())
        assert messages[0] == {"role": "user", "content": "hello"}
        assert 0 < len(messages[1]["ids"]) < 7000, "the answer was not cut short"
        window.send("\x1b[200~first line\nsecond line\x1b[201~\r")
        window.until(DRAWN)
        window.send("\x03")
        window.until("tok/s")
        window.until(READY)
        window.send("half a line\x03")
        window.until(READY)
        window.send("/undo\r")
        assert "second line" in window.until(READY).partition("taken back: first line")[2]
        window.send("/edit\r")
        window.until(READY)
        window.send("\x7f\x7f\x03")
        window.until(READY)
        window.send(f"/save {saved}\r")
        window.until(READY)
        assert json.loads(saved.read_text()) == messages, "an edit that was given up changed the conversation"
        window.send("/edit\r")
        window.until(READY)
        window.send("\x7f\x7f\r")
        window.until(DRAWN)
        window.send("\x03")
        window.until(READY)
        window.send(f"/save {saved}\r")
        window.until(READY)
        assert json.loads(saved.read_text())[0]["content"] == "hel", "the message was not there to be edited"
        window.send("\x04")
        assert window.process.wait(30) == 0
    finally:
        window.close()


@pytest.mark.heavy
@pytest.mark.parametrize("answering", [True, False])
def test_the_terminal_is_left_as_it_was(path: Path, tmp_path: Path, answering: bool):
    """Nothing typed into an answer shifts what is drawn; when the process is told to end, it tidies up."""
    window = Window("--model", path, "--temp", "0", "--max-tokens", "7000", "--prompt-cache", tmp_path / "c")
    before = termios.tcgetattr(window.master)
    try:
        window.until(READY)
        window.send("hello\r")
        window.until(DRAWN)
        assert not termios.tcgetattr(window.master)[3] & termios.ECHO
        window.send("\n\x03")
        assert "^C" not in window.until("tok/s")
        window.until(READY)
        if answering:
            window.send("hello\r")
            window.until(DRAWN)
        window.process.send_signal(signal.SIGTERM)
        if answering:
            window.until("\x1b[?25h")  # the cursor is shown again
        assert window.process.wait(30) == 143
        assert termios.tcgetattr(window.master) == before
        assert (tmp_path / "c").stat().st_size > 1000
    finally:
        window.close()


def screen(written: str) -> list[str]:
    """The lines that a terminal shows, without empty ones."""
    rows, row, column = [""], 0, 0
    for match in re.finditer(r"\x1b\[\??([\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+", written):
        text = match[0]
        if text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif match[2] == "A":
            row -= int(match[1] or 1)
        elif match[2] == "K":
            rows[row] = "" if match[1] == "2" else rows[row][:column]
        elif not match[2]:
            rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in rows if line.strip()]


MARKDOWN = (
    "# Title\n\nSome *text* with `code` and a [link](https://example.com).\n\n```python\n"
    + "\n".join(f"def f{i}(x):  # {i}" for i in range(70))
    + "\n```\n\n"
    + "\n".join(f"{i}. item **{i}** that is long enough to need more than one line of the window" for i in range(1, 20))
    + "\n\n| a | b |\n|---|---|\n"
    + "\n".join(f"| {'x' * (i % 9)} | {i} |" for i in range(9))
    + "\n\n> quote\n\n```\nnot closed\n\n- x"
)


def test_drawing_markdown_takes_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch):
    """A long block is drawn again as a whole, which took half of the time of a chat."""
    from rich.console import Console
    from rich.live import Live

    from qwen_mlx.cli import terminal

    now, drawing = 0.0, 0.0

    def update(*_: object, **__: object) -> None:
        nonlocal now, drawing
        now, drawing = now + 0.05, drawing + 0.05

    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    monkeypatch.setattr(Live, "update", update)
    answer = terminal.StreamedMarkdown(Console(file=io.StringIO(), force_terminal=True))
    for _ in range(200):
        now += 0.04
        answer.add("word ")
    answer.finish()
    assert 0 < drawing < 0.15 * now


@pytest.mark.heavy
@pytest.mark.parametrize("height", [10, 40])
def test_streamed_markdown_ends_as_the_whole_would_be_shown(monkeypatch: pytest.MonkeyPatch, height: int):
    from rich.console import Console
    from rich.markdown import Markdown

    from qwen_mlx.cli import terminal

    monkeypatch.setattr(terminal, "PAUSE", 0)
    streamed, whole = (Console(file=io.StringIO(), force_terminal=True, width=60, height=height) for _ in range(2))
    answer = terminal.StreamedMarkdown(streamed)
    for i in range(0, len(MARKDOWN), 11):
        answer.add(MARKDOWN[i : i + 11])
    assert "f3" in streamed.file.getvalue(), "nothing is shown before the end"
    answer.finish()
    whole.print(Markdown(MARKDOWN, hyperlinks=False))
    shown, expected = screen(streamed.file.getvalue()), screen(whole.file.getvalue())
    if height == 10:  # what has scrolled away stays as wide as it was before the item 10 and the table's longest cell
        shown, expected = ([" ".join(line.split()) for line in lines] for lines in (shown, expected))
        shown, expected = ([line.strip("─") for line in lines] for lines in (shown, expected))
    assert shown == expected


def test_a_model_cannot_command_the_terminal(monkeypatch: pytest.MonkeyPatch):
    from rich.console import Console

    from qwen_mlx.cli.terminal import Terminal

    window = Terminal.__new__(Terminal)
    window._console, window._answer = Console(file=io.StringIO(), force_terminal=False, width=60), None
    window._quiet = contextlib.ExitStack()
    window.show("a\x1b[2Jb\x07\x9bc\n\tx")
    window.finish()
    window.note("n\x1b]0;title\x07")
    written = window._console.file.getvalue()
    assert not set(written) & set(map(chr, [*range(9), *range(11, 32), *range(0x7F, 0xA0)]))
    assert "a" in written
    assert "title" in written


@pytest.mark.heavy
def test_benchmark(path: Path, tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.cpu_chat", "--model", path, "--output", tmp_path / "o.json"]
    sizes = ["--max-tokens", "5", "--saved-tokens", "50"]
    done = subprocess.run(
        [*command, *sizes], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["saved"]["tokens"] == 50
    read = [[turn["read"] for turn in report[kind]] for kind in ("cached", "plain")]
    assert all(a < b for a, b in zip(*(turns[1:] for turns in read)))
    assert [turn["answer"] for turn in report["cached"]] == [turn["answer"] for turn in report["plain"]]
