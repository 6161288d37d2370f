"""The counts of benchmarks.metal_cost, on code whose counts are known. Nothing is downloaded."""

from __future__ import annotations

import shutil

import mlx.core as mx
import pytest

from benchmarks import metal_cost
from qwen_mlx.errors import QwenMLXError

# A loop around a loop that reads 4 bytes of the GPU's memory and 8 of a threadgroup's; one of its shifts is an operand.
CODE = """
define void @k(ptr addrspace(1) %0, ptr addrspace(3) %1) {
  %start = fdiv float 1.0, 3.0
  br label %outer

outer:                                            ; preds = %inner, %2
  %i = phi i32 [ 0, %2 ], [ %i.next, %end ]
  %i.next = add i32 %i, 1
  br label %inner

inner:                                            ; preds = %inner, %outer
  %sum = phi float [ 0.0, %outer ], [ %sum.next, %inner ]
  %at = getelementptr i32, ptr addrspace(1) %0, i32 %i
  %word = load i32, ptr addrspace(1) %at, align 4
  %pair = load <2 x float>, ptr addrspace(3) %1, align 8
  %low = and i32 %word, 15
  %upper = lshr i32 %word, 16
  %other = lshr i32 %word, 4
  %float = tail call float @air.convert.f.f32.u.i32(i32 %low)
  %sum.next = tail call float @llvm.fma.f32(float %float, float %float, float %sum)
  %lanes = tail call float asm sideeffect "; shuffle", "=v,v"(float %sum.next)
  %more = icmp ult i32 %low, 3
  br i1 %more, label %inner, label %end

end:                                              ; preds = %inner
  %again = icmp ult i32 %i, 9
  br i1 %again, label %outer, label %done

done:                                             ; preds = %end
  ret void
}
"""


def test_the_innermost_loop_that_reads_weights_is_counted():
    counts = metal_cost.count(CODE, "k")
    kinds = {"loads": 0.25, "other loads": 0.5, "integer": 3, "float": 2, "shuffle": 1}
    assert {kind: counts[kind] for kind in kinds} == kinds
    assert counts["cycles"] == 0.25 + 0.5 + (1 + 4 + 1) + (4 + 1) + 1


def test_without_such_a_loop_everything_is_counted():
    counts = metal_cost.count(CODE.replace("addrspace(1) %at", "addrspace(2) %at"), "k")
    assert counts["loads"] == 0
    assert counts["float"] == 3, "the division before the loops too"


@pytest.fixture
def clang() -> None:
    try:
        metal_cost.clang()
    except QwenMLXError:
        pytest.skip("no clang")


@pytest.mark.usefixtures("clang")
def test_a_kernel_costs_what_its_text_says():
    """A round loads two words, masks both and multiplies once."""
    source = """
        const uint lane = thread_index_in_simdgroup;
        float sum = 0.0f;
        for (uint k = 0u; k < uint(N); k += 32u) {
          sum = metal::fma(as_type<float>(w[k + lane] & 0x3fffffffu), as_type<float>(w[k + lane + 32u] & 15u), sum);
        }
        y[lane] = T(metal::simd_sum(sum));
    """
    with metal_cost.recorded() as launches:
        kernel = mx.fast.metal_kernel(name="k", input_names=["w"], output_names=["y"], source=source, header="")
        template, output = [("T", mx.bfloat16), ("N", 4096)], {"output_shapes": [(32,)], "output_dtypes": [mx.bfloat16]}
        kernel(
            inputs=[mx.zeros((8192,), mx.uint32)], template=template, grid=(32, 1, 1), threadgroup=(32, 1, 1), **output
        )
    cost = metal_cost.cost(launches[0])
    assert (cost.loads, cost.floats, cost.shuffles) == (0.5, 1, 0)
    assert 2 + 2 <= cost.integer <= 2 + 4, "two masks, the address, the step and the end of the loop"
    assert all(count is not None and count < 32 for count in cost.registers.values())
    assert cost.text == len(launches[0].source.text)


def test_a_compiler_that_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(QwenMLXError, match="clang is not installed: apt install clang"):
        metal_cost.clang()
