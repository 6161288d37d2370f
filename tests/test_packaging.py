"""The wheel: small, complete, and it generates where nothing of the repository is."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from reference.small_models import RandomModel, write_gguf

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_is_small_and_holds_the_package_only(wheel: Path):
    assert wheel.stat().st_size < 300_000
    inside = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "qwen_mlx").rglob("*")
        if path.suffix in (".py", ".metal", ".h") and "__pycache__" not in path.parts
    }
    assert sources <= inside
    others = {name for name in inside - sources if ".dist-info/" not in name}
    assert others <= {"qwen_mlx/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_the_installed_wheel_generates_with_its_kernels(wheel: Path, tmp_path: Path):
    """In an environment of its own: the dependencies are this one's, the package is the wheel's."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    zipfile.ZipFile(wheel).extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # comes after the wheel's folder
    model = write_gguf(tmp_path / "small.gguf", RandomModel())
    command = [python, "-I", "-m", "qwen_mlx.generate", "--model", model, "--prompt", "hello", "--max-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    code = (
        "import qwen_mlx; from qwen_mlx.ops import rms_norm; import sys;"
        "print(qwen_mlx.__file__, len(sys.modules['qwen_mlx.ops.rms_norm']._RMS_NORM.source()))"
    )
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    file, size = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path.resolve())
    assert int(size) > 100
