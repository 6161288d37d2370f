"""Checks the wheel: it is small, it holds the package only, and it generates where nothing of the repository is.

python .ci/check_wheel.py dist/qwen_mlx-0.2.0.dev0-py3-none-any.whl
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for reference.small_models; the wheel is tried in an environment of its own
LIMIT = 600_000
CODE = """
import qwen_mlx
from qwen_mlx.ops import dispatch
print(qwen_mlx.__file__, len((dispatch.SOURCES / "rms_norm.metal").read_text()))
"""


def check_contents(wheel: Path) -> None:
    """Every source of the package and nothing else, within the limit."""
    size = wheel.stat().st_size
    assert size < LIMIT, f"{wheel.name} has {size} bytes, expected less than {LIMIT}"
    inside = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "qwen_mlx").rglob("*")
        if path.suffix in (".py", ".metal", ".h", ".html") and "__pycache__" not in path.parts
    }
    assert sources <= inside, f"missing: {sorted(sources - inside)}"
    others = {name for name in inside - sources if ".dist-info/" not in name}
    assert others <= {"qwen_mlx/py.typed"}, f"not of the package: {sorted(others)}"
    assert any(name.endswith("licenses/LICENSE") for name in inside), "the licence is missing"


def check_that_it_runs(wheel: Path, folder: Path) -> None:
    """The dependencies are this environment's; the package is the wheel's."""
    from reference.small_models import RandomModel, write_gguf

    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    zipfile.ZipFile(wheel).extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # comes after the wheel's folder
    model = write_gguf(folder / "small.gguf", RandomModel())
    command = [python, "-I", "-m", "qwen_mlx.generate", "--model", model, "--prompt", "hello", "--max-tokens", "4"]
    subprocess.run(command, cwd=folder, check=True)
    done = subprocess.run([python, "-I", "-c", CODE], capture_output=True, text=True, cwd=folder, check=True)
    file, kernel = done.stdout.split()
    assert Path(file).is_relative_to(folder.resolve()), f"{file} is not the wheel's"
    assert int(kernel) > 100, "the wheel has no kernels"


if __name__ == "__main__":
    path = Path(sys.argv[1]).resolve()
    check_contents(path)
    with tempfile.TemporaryDirectory() as temporary:
        check_that_it_runs(path, Path(temporary))
    print(f"{path.name}: {path.stat().st_size} bytes, complete, and it generates")
