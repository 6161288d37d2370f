"""The strict reading: what it must refuse, and the shipped kernels, of which it refuses nothing."""

from __future__ import annotations

import mlx.core as mx
import pytest

from reference.emulator import InvalidLaunch, metal_kernel, metal_source, strict
from tests.helpers import shipped
from tests.helpers.cases import each

# name: (refused, accepted, what the finding says); a "|" divides header and body.
DEFECTS = {
    "C++17": ("if constexpr (N > 2) { y[0] = x[0]; }", "if (N > 2) { y[0] = x[0]; }", "constexpr if is a C++17"),
    "structured binding": (
        "struct Two { float a, b; };|Two t; auto [a, b] = t;",
        "struct Two { float a, b; };|Two t; t.a = 1.0f;",
        "C++17 extension",
    ),
    "another address space": (
        "threadgroup float s[4]; device float* p = s;",
        "threadgroup float s[4]; threadgroup float* p = s;",
        "cannot initialize a variable of type 'device float *' with an lvalue of type 'threadgroup float[4]'",
    ),
    "a generic pointer": (
        "inline float first(const thread float* a) { return a[0]; }|y[0] = first(x);",
        "template <typename P> inline float first(P a) { return a[0]; }|y[0] = first(x) + first(small);",
        "no matching function for call to 'first'",
    ),
    "two address spaces of one type": (
        "template <typename P> inline float sum(P a, P b) { return a[0] + b[0]; }|y[0] = sum(x, small);",
        "template <typename P> inline float sum(P a, P b) { return a[0] + b[0]; }|y[0] = sum(x, x);",
        "no matching function for call to 'sum'",
    ),
    "a fast function": (
        "y[0] = metal::exp(x[0]);",
        "y[0] = metal::precise::exp(x[0]);",
        "exp may be the fast one: write metal::precise::exp [fast-function]",
    ),
    "a fast function by its name": (
        "y[0] = metal::fast::sqrt(x[0]);",
        "y[0] = metal::precise::sqrt(x[0]);",
        "write metal::precise::sqrt",
    ),
}


def findings(text: str) -> list[str]:
    header, _, body = text.rpartition("|")
    kernel = metal_kernel("k", ["x", "small"], ["y"], body, header + "\n")
    source = metal_source(kernel, [mx.zeros((9,)), mx.zeros((3,))], [mx.float32], [("T", mx.float16), ("N", 3)])
    return [str(finding) for finding in strict(source)]


@each("name", DEFECTS)
def test_a_defect_is_seen(name: str):
    refused, accepted, words = DEFECTS[name]
    assert any(words in finding for finding in findings(refused)), findings(refused)
    assert findings(accepted) == []


def test_lines_are_those_of_the_kernel():
    assert findings("\n|\ny[0] = 1.0f;\ny[1] = nothing;")[0].startswith("body line 3: use of undeclared identifier")


def test_another_text_is_refused():
    with pytest.raises(InvalidLaunch, match="not one kernel as MLX writes it"):
        strict("kernel void f() {}")


def test_the_shipped_kernels_have_no_findings():
    """They are those that Metal compiles: tiles and products of matrices are NVIDIA's."""
    texts = list(shipped.texts())
    for dtype in (mx.float32, mx.bfloat16):
        for name, launched in shipped.decoding_texts(dtype).items():
            texts += launched if "tiles" not in name and "matmul" not in name else []
    assert len(texts) > 110
    for text in texts:
        assert strict(text) == []


def test_a_defect_of_a_shipped_kernel_is_seen():
    text = next(text for text in shipped.texts() if "add_rms_norm" in text)
    assert strict(text) == []
    wrong = text.replace("(sum, &partial[0],", "(sum, &x[0],").replace("metal::precise::sqrt", "metal::sqrt")
    assert sorted(finding.rule for finding in strict(wrong)) == ["fast-function", "strict", "strict"]
