"""A kernel that a GPU refuses ends a command with one sentence, which names the part and the way out."""

from __future__ import annotations

import pytest

from qwen_mlx.cli.command import KERNELS, kernel_failure, run
from qwen_mlx.ops.dispatch import PARTS
from tests.helpers.cases import each

LIBRARY = "[metal::Device] Unable to build metal library from source\n"
FAILURES = {  # MLX's text: the part that is named, and what is quoted
    f"{LIBRARY}qwen_mlx/metal/rows.h:7:3: error: no member 'v'\nqwen_mlx/metal/matvec_qkv.metal:3:1: note: here": (
        "-matvec",
        "(qwen_mlx/metal/rows.h:7:3: error: no member 'v')",
    ),
    f"{LIBRARY}qwen_mlx/metal/decode_attention_split.metal:3:1: error: expected ';'": ("-attend", "expected ';'"),
    f"{LIBRARY}program_source:9: error: x\nnote: in instantiation of custom_kernel_qwen_qkv_rope_T": (
        "-rope",
        "error: x",
    ),
    "[metal::Device] Unable to load kernel custom_kernel_qwen_best_parts_bfloat16": ("-best_token", "Unable to load"),
    "Thread group size (512) is greater than the maximum allowed threads per threadgroup (448).": ("off", "(448)."),
    "Failed to compile kernel: /x/qwen_mlx/metal/nvidia/matmul.metal(3): error: y.": ("-matmul", "error: y."),
}


@each("text", FAILURES)
def test_the_part_and_the_way_out_are_named(text: str):
    switch, quoted = FAILURES[text]
    sentence = kernel_failure(text)
    assert f"set QWEN_MLX_KERNELS={switch} to compute that in plain MLX" in sentence
    assert quoted in sentence
    assert "\n" not in sentence


def test_every_part_has_its_kernels():
    assert {*KERNELS, "step"} == set(PARTS)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_command_ends_with_the_sentence_and_2(kind: type[Exception], capsys):
    def fail() -> None:
        raise kind(f"{LIBRARY}qwen_mlx/metal/swiglu.metal:1:1: error: z")

    with pytest.raises(SystemExit) as end:
        run(fail)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: The kernel of 'swiglu' does not run on this GPU (qwen_mlx/metal")


def test_other_errors_stay_what_they_are():
    assert kernel_failure("[quantize] bits must be positive") is None

    def fail() -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run(fail)
