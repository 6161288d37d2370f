"""Files of weights that other programs write to while they are read: a sentence, and no signal."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qwen_mlx
from qwen_mlx.conversion.convert import check, convert
from qwen_mlx.errors import GGUFError, QwenMLXError
from qwen_mlx.gguf import blocks
from qwen_mlx.gguf.stored import ALL, StoredFile, StoredRows
from qwen_mlx.loading.checkpoint import open_checkpoint
from reference.small_models import RandomModel, save_folder, write_gguf

CHANGED = "was changed while it was read"


@pytest.fixture(params=["gguf", "folder"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the file that holds its weights."""
    if request.param == "gguf":
        path = write_gguf(tmp_path / "m.gguf", RandomModel())
        return path, path
    folder = save_folder(tmp_path / "model", RandomModel())
    return folder, folder / "model.safetensors"


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 3)


def overwrite(file: Path) -> None:
    """Writes the same number of bytes into the file, as a download in place does."""
    status = file.stat()
    with open(file, "r+b") as opened:
        opened.seek(status.st_size - 64)
        opened.write(bytes(64))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_a_file_that_was_cut_after_it_was_opened_is_an_error(model: tuple[Path, Path]):
    path, file = model
    parameters = open_checkpoint(path).parameters
    cut(file)
    with pytest.raises(QwenMLXError, match=CHANGED) as caught:
        [parameter.values() for parameter in parameters.values()]
    assert str(file) in str(caught.value)
    assert isinstance(caught.value, GGUFError) == (path == file)


@pytest.mark.parametrize("change", [cut, overwrite])
def test_load_refuses_a_file_that_changes_meanwhile(model: tuple[Path, Path], change: Callable[[Path], None]):
    path, file = model
    with pytest.raises(QwenMLXError, match=CHANGED):
        qwen_mlx.load(path, progress=lambda done, total: change(file))


def test_check_and_convert_refuse_a_file_that_changes_meanwhile(model: tuple[Path, Path], tmp_path: Path):
    path, file = model
    output = tmp_path / "output"
    before = set(tmp_path.iterdir())
    for change in (overwrite, cut):
        with pytest.raises(QwenMLXError, match=CHANGED):
            convert(path, output, progress=lambda *_: change(file))  # noqa: B023
        assert set(tmp_path.iterdir()) == before
    with pytest.raises(QwenMLXError):
        check(path)


def test_a_file_that_another_replaces_is_read_to_its_end(model: tuple[Path, Path], tmp_path: Path):
    path, file = model
    parameters = open_checkpoint(path).parameters
    expected = {name: parameter.values() for name, parameter in parameters.items()}
    (tmp_path / "new").write_bytes(b"another")
    os.replace(tmp_path / "new", file)
    for name, parameter in parameters.items():
        np.testing.assert_array_equal(parameter.values(), expected[name])


@given(st.data())
def test_parts_of_rows_are_those_of_the_matrix(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    rows, width, offset = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 5))
    matrix = np.arange(rows * width, dtype=np.uint16).reshape(rows, width)
    path = tmp_path_factory.getbasetemp() / "rows"
    path.write_bytes(bytes(offset) + matrix.tobytes() + b"more")
    stored = StoredRows(StoredFile.open(path), offset, matrix.dtype, rows, width, ALL)
    for _ in range(2):
        start, left = data.draw(st.integers(0, len(matrix))), data.draw(st.integers(0, matrix.shape[1] - 1))
        stop, right = data.draw(st.integers(start, len(matrix))), data.draw(st.integers(left + 1, matrix.shape[1]))
        stored, matrix = stored.part(slice(start, stop), slice(left, right)), matrix[start:stop, left:right]
        assert (stored.shape, stored.nbytes) == (matrix.shape, matrix.nbytes)
        np.testing.assert_array_equal(stored.read(), matrix)
        np.testing.assert_array_equal(stored.read(1, 3), matrix[1:3])


def test_a_chunk_can_be_cut_into_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "CHUNK_WEIGHTS", 32)
    monkeypatch.setattr(blocks, "threads", lambda: 2)
    blocks._pool.cache_clear()
    done: list[slice] = []
    blocks.in_chunks(lambda _: blocks.in_chunks(done.append, 64, 1), 8, 32)
    blocks._pool.cache_clear()
    assert len(done) == 16
