"""The command line, on kernels with and without a defect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reference.emulator.__main__ import main

REVERSE = """uint i = thread_position_in_grid.x;
threadgroup float s[64];
s[thread_position_in_threadgroup.x] = twice(x[i]) * factor;
threadgroup_barrier(mem_flags::mem_threadgroup);
y[i] = T(s[63u - thread_position_in_threadgroup.x]);
"""
HEADER = "inline float twice(float a) { return 2.0f * a; }\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "reverse.metal").write_text(REVERSE)
    (tmp_path / "twice.h").write_text(HEADER)
    np.save(tmp_path / "x.npy", np.arange(128, dtype=np.float32))
    return tmp_path


def arguments(files: Path, *more: str) -> list[str]:
    return [
        *(str(files / "reverse.metal"), "--header", str(files / "twice.h"), "--grid", "128", "--threadgroup", "64,1,1"),
        *(
            "--input",
            f"x=@{files}/x.npy",
            "--input",
            "factor=2.5",
            "--output",
            "y=float16[2,64]",
            "--template",
            "T=float16",
        ),
        *more,
    ]


def test_a_clean_kernel(files, capsys):
    assert main(arguments(files, "--save", str(files / "out"))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["forward: ok", "reverse: ok", "random: ok", "y: mlx.core.float16 (2, 64), 0 to 635, mean 317.5"]
    y = np.load(files / "out" / "y.npy")
    np.testing.assert_array_equal(y, np.arange(128, dtype=np.float16).reshape(2, 64)[:, ::-1] * 5)


@pytest.mark.parametrize("order", ["forward", "reverse", "random", "all"])
def test_a_race(files, capsys, order):
    (files / "reverse.metal").write_text(REVERSE.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", ""))
    assert main(arguments(files, "--order", order)) == 1
    output = capsys.readouterr().out
    assert output.startswith(
        ("DataRace: kernel reverse, body line 5", "UninitialisedRead: kernel reverse, body line 5")
    )


def test_a_finding_of_the_lint(files, capsys):
    (files / "reverse.metal").write_text(REVERSE.replace("63u", "__builtin_abs(63)"))
    assert main(arguments(files)) == 1
    assert "lint: body line 5: __builtin_abs: names that start with __" in capsys.readouterr().out
    assert main(arguments(files, "--no-lint")) == 0


def test_what_only_cuda_refuses_is_a_note(files, capsys):
    (files / "reverse.metal").write_text(REVERSE.replace("63u", "int(63.0)"))
    assert main(arguments(files)) == 0
    assert "note: body line 5: 63.0 has no suffix" in capsys.readouterr().out


def test_a_whole_kernel_instead_of_a_body(files, capsys):
    (files / "reverse.metal").write_text("kernel void reverse(device float* y [[buffer(0)]]) {}")
    with pytest.raises(SystemExit):
        main(arguments(files))
    assert "reverse.metal holds a whole kernel: leave its body only" in capsys.readouterr().err


def test_results_that_depend_on_the_order(files, capsys):
    last = "threadgroup float s[1]; uint i = thread_position_in_grid.x; s[0] = x[i] * factor;"
    (files / "reverse.metal").write_text(last + "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[0];")
    assert main(arguments(files, "--unchecked")) == 1
    assert "y: the values depend on the order of the threads" in capsys.readouterr().out


def test_the_text_and_random_inputs(files, capsys):
    more = ["--print", "--order", "forward", "--input", "z=int32[2,3]", "--input", "w=true", "--template", "N=-3"]
    assert main(arguments(files, *more)) == 0
    output = capsys.readouterr().out
    assert (
        "template <typename T, int N>\n[[kernel]] void custom_kernel_reverse__float16_t__3_float_floats_int32_tc"
        in output
    )
    assert "const constant bool& w [[buffer(3)]]" in output


MISTAKES = {
    "dtype": (["--input", "z=float33[3]"], "'float33' is no dtype of MLX"),
    "shape": (["--input", "z=float32"], "expected DTYPE[SHAPE]"),
    "name": (["--input", "float32[3]"], "expected NAME=VALUE"),
    "file": (["--input", "z=@nowhere.npy"], "z: cannot read nowhere.npy"),
    "header": (["--header", "nowhere.h"], "cannot read nowhere.h: No such file"),
    "size": (["--grid", "1,2,3,4"], "expected X,Y,Z"),
    "number": (["--grid", "many"], "expected X,Y,Z"),
    "float": (["--input", "z=1.2.3"], "expected DTYPE[SHAPE]"),
    "large integer": (["--input", "z=99999999999999999999"], "expected an int32"),
    "large array": (["--input", "z=float32[99999999999,64]"], "fewer than 2^31 elements"),
    "array of text": (["--input", "z=@text.npy"], "z: cannot read text.npy"),
    "seed": (["--seed", "-1"], "expected a number from 0"),
    "binary": (["--header", "binary.h"], "not text in UTF-8"),
    "save": (["--save", "binary.h"], "--save is binary.h, expected a folder"),
    "twice": (["--input", "x=float32[3]"], "x is given twice"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence_and_exit_status_2(files, capsys, name, monkeypatch):
    monkeypatch.chdir(files)
    np.save("text.npy", np.array(["a", "b"]))
    Path("binary.h").write_bytes(b"\xff\xfe")
    more, message = MISTAKES[name]
    with pytest.raises(SystemExit) as caught:
        main(arguments(files, *more))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "line", ["float s[4]; s[0] = z; y[i] = T(s[i % 4u]);", "float s; if (i > 3u) s = z; y[i] = T(s);"]
)
def test_a_local_variable_that_nothing_has_set(files, capsys, line):
    (files / "reverse.metal").write_text(f"uint i = thread_position_in_grid.x; float z = twice(x[i]) * factor; {line}")
    assert main(arguments(files)) == 1
    assert "UninitialisedRead: kernel reverse" in capsys.readouterr().out


def test_a_launch_that_metal_refuses(files, capsys):
    assert main(arguments(files, "--threadgroup", "2048")) == 1
    assert "InvalidLaunch: kernel reverse: threadgroup (2048, 1, 1) has 2048 threads" in capsys.readouterr().out
