"""Every rule of the lint: a case that it rejects and one that it passes; the shipped kernels have no findings."""

from __future__ import annotations

import mlx.core as mx
import pytest

from reference.emulator import (
    CompileError,
    InvalidLaunch,
    MetalKernel,
    emulate,
    lint,
    metal_kernel,
    metal_source,
)
from tests.helpers import decoding_calls, shipped
from tests.helpers.cases import each
from tests.helpers.mlx_lm_kernels import module

# rule: (rejected, accepted, what the finding says); a "|" divides header and body.
RULES = {
    "change of address space": (
        "threadgroup float s[4]; device float* p = s;",
        "threadgroup float s[4]; threadgroup float* p = s;",
        "cannot initialize a variable of type 'device float",
    ),
    "device lvalue to thread&": (
        "inline void f(thread float& a) { a = 1.0f; }|f(y[0]);",
        "inline void f(thread float& a) { a = 1.0f; }|float a; f(a); y[0] = a;",
        "no matching function for call to 'f'",
    ),
    "constant input into a device helper": (
        "inline float f(const device float* a) { return a[0]; }|y[0] = f(small);",
        "template <typename P> inline float f(P a) { return a[0]; }|y[0] = f(small) + f(x);",
        "no matching function for call to 'f'",
    ),
    "pointer without a space": (
        "inline float f(const float* a) { return a[0]; }|y[0] = f(x);",
        "inline float f(const device float* a) { return a[0]; }|y[0] = f(x);",
        "names no address space [address-space]",
    ),
    "reference without a space": (
        "inline float f(const float& a) { return a; }|y[0] = f(1.0f);",
        "inline float f(float a) { return a; }|y[0] = f(1.0f);",
        "reference const float &thread names no address space",
    ),
    "cast without a space": (
        "y[0] = *(const float*)(x);",
        "y[0] = *(const device float*)(x);",
        "pointer const float * names no address space",
    ),
    "threadgroup variable in a branch": (
        "if (x[0] > 1.0f) { threadgroup float s[2]; }",
        "threadgroup float s[2]; if (x[0] > 1.0f) { s[0] = 1.0f; }",
        "outermost scope of a kernel function",
    ),
    "threadgroup variable in a function": (
        "inline void f() { threadgroup float s[2]; }|",
        "inline void f(threadgroup float* s) { s[0] = 1.0f; }|threadgroup float s[2]; f(s);",
        "local address space",
    ),
    "threadgroup variable with an initialiser": (
        "threadgroup float s[2] = {1.0f, 2.0f};",
        "threadgroup float s[2]; s[0] = 1.0f;",
        "'threadgroup' variable cannot have an initializer",
    ),
    "global that is not constant": ("float g = 1.0f;|", "constant float g = 1.0f;|", "constant address space"),
    "constant without an initialiser": (
        "constant float g[2];|",
        "constant float g[2] = {1.0f, 2.0f};|",
        "must be initialized",
    ),
    "write to a constant": (
        "constant float g[1] = {1.0f};|g[0] = 2.0f;",
        "constant float g[1] = {1.0f};|y[0] = g[0];",
        "not assignable",
    ),
    "mutable static": ("static int n = 0; n++;", "int n = 0; n++;", "must reside in constant address space"),
    "double": ("double d = x[0];", "float d = x[0];", "use of type 'double'"),
    "virtual": ("struct S { virtual float f(); };|", "struct S { float f() thread; };|", "virtual functions"),
    "function pointer": (
        "inline float f(float a) { return a; }|float (*p)(float) = f;",
        "inline float f(float a) { return a; }|y[0] = f(1.0f);",
        "pointers to functions",
    ),
    "new": ("thread float* p = new float[2];", "float p[2];", "'default new' is not supported"),
    "throw": ("throw 1;", "return;", "cannot use 'throw'"),
    "try": ("try { y[0] = 1.0f; } catch (...) {}", "y[0] = 1.0f;", "cannot use 'try'"),
    "array of variable length": (
        "int n = int(x[0]); float v[n];",
        "constexpr int n = 3; float v[n];",
        "constant expression",
    ),
    "recursion": (
        "inline int f(int n) { return n > 0 ? f(n - 1) : 0; }|y[0] = float(f(3));",
        "inline int f(int n) { return n; } inline float f(float n) { return float(f(int(n))); }|y[0] = f(3.0f);",
        "f calls itself; Metal has no recursion",
    ),
    "recursion of two": (
        "inline int g(int n);\ninline int f(int n) { return g(n); }\ninline int g(int n) { return f(n); }|",
        "inline int g(int n);\ninline int f(int n) { return g(n); }\ninline int g(int n) { return n; }|",
        "calls itself",
    ),
    "recursion of a template": (
        "template <typename T> T f(T n) { return f<T>(n); }|",
        "template <typename T> T f(T n) { return n; }|y[0] = f(1.0f);",
        "calls itself",
    ),
    "goto": ("goto end; end: y[0] = 1.0f;", "if (x[0] > 0.0f) { y[0] = 1.0f; }", "goto; Metal has none"),
    "lambda": (
        "auto f = [](float a) { return a; }; y[0] = f(1.0f);",
        "struct F { float operator()(float a) thread { return a; } };|F f; y[0] = f(1.0f);",
        "a lambda; Metal has none",
    ),
    "std": ("y[0] = std::exp(x[0]);", "y[0] = metal::exp(x[0]);", "undeclared identifier 'std'"),
    "reserved name": ("int __n = 1;", "int n_ = 1; /* __n */", "__n: names that start with __"),
    "ASCII": ("y[0] = 1.0f; // \u00b5", "y[0] = 1.0f; // mu", "outside of ASCII"),
    "literal without a suffix": (
        "y[0] = 1.0 + 2e3 + .5 + 3e-2 + 0x1p3;",
        "y[0] = 1.0f + 2e3f + .5f + float(3) + 0x1p3f; // 1.0",
        "0x1p3 has no suffix",
    ),
    "float into bfloat": (
        "b[0] = x[0];",
        "b[0] = bfloat(x[0]); b[1] = 3; b[2] = b[0];",
        "float becomes bfloat without a cast",
    ),
    "float into bfloat by +=": ("b[0] += x[0];", "b[0] += bfloat(x[0]);", "float becomes bfloat without a cast"),
    "bfloat into half": ("half h = b[0];", "half h = half(float(b[0]));", "cannot initialize"),
    "bfloat + half": (
        "half h = 1.0h; y[0] = float(b[0] + h);",
        "half h = 1.0h; y[0] = float(b[0]) + h;",
        "no common type",
    ),
    "bfloat or float": (
        "float f = x[0] > 0.0f ? b[0] : 1.0f;",
        "float f = x[0] > 0.0f ? float(b[0]) : 1.0f;",
        "between bfloat and another floating type",
    ),
    "ambiguous min": ("y[0] = metal::min(1, x[0]);", "y[0] = metal::min(1.0f, x[0]);", "call to 'min' is ambiguous"),
    "ambiguous exp": ("y[0] = metal::exp(1);", "y[0] = metal::exp(1.0f);", "call to 'exp' is ambiguous"),
    "C names": ("y[0] = expf(x[0]);", "y[0] = exp(x[0]);", "undeclared identifier 'expf'"),
    "attribute's name taken": (
        "uint thread_position_in_grid = 1u;",
        "uint i = thread_position_in_grid.x;",
        "redefinition of 'thread_position_in_grid'",
    ),
}
# The compiler that executes refuses these too.
BOTH = (
    "float into bfloat",
    "float into bfloat by +=",
    "bfloat + half",
    "ambiguous min",
    "ambiguous exp",
    "C names",
    "std",
)


def kernel_of(text: str):
    header, _, body = text.rpartition("|")
    if text.isascii():
        return metal_kernel("k", ["x", "small"], ["y", "b"], body, header + "\n")
    return MetalKernel("k", ("x", "small"), ("y", "b"), body, header + "\n")  # metal_kernel itself refuses such a text


def findings(text: str) -> list[str]:
    arrays = [mx.zeros((9,)), mx.zeros((3,))]
    source = metal_source(
        kernel_of(text), arrays, [mx.float32, mx.bfloat16], [("T", mx.float16), ("N", 3), ("B", True)]
    )
    return [str(finding) for finding in lint(source)]


@each("rule", RULES)
def test_rule(rule):
    rejected, accepted, words = RULES[rule]
    assert any(words in finding for finding in findings(rejected))
    assert findings(accepted) == []


@each("rule", BOTH)
def test_the_executing_compiler_refuses_it_too(rule):
    for text, refused in zip(RULES[rule][:2], (True, False)):
        call = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,), (3,)], "init_value": 0}
        arrays = {"inputs": [mx.zeros((9,)), mx.zeros((3,))], "output_dtypes": [mx.float32, mx.bfloat16]}
        with emulate():
            if refused:
                with pytest.raises(CompileError, match=r"(body|header):1:"):
                    kernel_of(text)(**call, **arrays)
            else:
                kernel_of(text)(**call, **arrays)


def test_lines_are_those_of_the_kernel():
    (finding,) = findings("\n\n|y[0] = 1.0f;\n\ny[1] = undefined_name;\n")
    assert finding == "body line 3: use of undeclared identifier 'undefined_name' [language]"


def test_the_preamble_can_be_used_and_given():
    body = (
        "uint i = thread_position_in_grid.x; complex64_t c = complex64_t(1.0f, 2.0f);"
        "y[i] = Limits<float>::max + c.real;"
        "y[elem_to_loc(i, x_shape, x_strides, x_ndim)] = as_type<float>(3) + float2(1.0f, 2.0f).x + simd_sum(x[i]);"
        "atomic_fetch_add_explicit((device atomic_uint*)y, 1u, memory_order_relaxed); b[0] = simd_sum(b[0]);"
        "float4 v = *(const device float4*)(x); y[0] = v.w + metal::precise::sqrt(v.x);"
    )
    assert findings(body) == []
    text = metal_source(
        kernel_of(body), [mx.zeros((9,)), mx.zeros((3,))], [mx.float32, mx.bfloat16], with_preamble=True
    )
    assert lint(text) == []


# Metal that clang's C++ for OpenCL would not take as it is.
ACCEPTED = {
    "names that are OpenCL's": "float local = x[0], global = 1.0f, generic = 2.0f, pipe = 3.0f, read_only = 4.0f;"
    "y[0] = local + global + generic + pipe + read_only;",
    "packed vectors": "const device packed_float3* p = (const device packed_float3*)(x); float3 v = p[1];"
    "v.x = p[0][2]; ((device packed_float3*)y)[0] = packed_float3(v); ((device packed_float3*)y)[1][2] = 1.0f;",
    "vectors of every type": "half3 a = half3(1.0h); short2 s = short2(1, 2); bool2 c = bool2(true, false);"
    "uchar4 d = uchar4(1); ulong2 e = metal::ulong2(1ul); y[0] = float(a.x) + float(s.y) + float(d.z) + float(e.x);",
    "vectors compared": "float4 v = metal::float4(x[0]); v = select(v, metal::float4(0.0f), v > float4(1.0f));"
    "y[0] = all(v < float4(1.0f)) ? v.wzyx.x : dot(v.xyz, cross(v.xyz, normalize(v.yzw)));",
    "votes": "simd_vote v = simd_ballot(x[0] > 0.0f); simd_vote::vote_t bits = (simd_vote::vote_t)(v);"
    "y[0] = float(bits);",
}


@each("name", ACCEPTED)
def test_no_false_alarm(name):
    assert findings(ACCEPTED[name]) == []


def test_another_text_is_refused():
    with pytest.raises(InvalidLaunch, match="not one kernel as MLX writes it"):
        lint("kernel void f() {}")


@each("index", range(len(shipped.calls())), ids=shipped.names())
def test_shipped_kernels_have_no_findings(index):
    assert lint(shipped.texts()[index]) == []


@each("name", decoding_calls.calls(mx.bfloat16))
def test_decoding_kernels_have_no_findings(name):
    texts = shipped.decoding_texts(mx.bfloat16)[name]
    assert texts
    for text in texts:
        assert lint(text) == []


def test_a_published_kernel_has_one_style_finding():
    with emulate():
        kernel = module("ssm")._ssm_kernel
    shapes = [(2, 1, 4, 16), (4,), (2, 1, 2, 64), (2, 1, 2, 64), (4,), (2, 1, 4), (2, 4, 16, 64)]
    template = [("T", mx.bfloat16), ("U", mx.float32), ("Dh", 16), ("Ds", 64), ("H", 4), ("G", 2)]
    text = metal_source(kernel, [mx.zeros(shape) for shape in shapes], [mx.bfloat16, mx.float32], template)
    assert [finding.rule for finding in lint(text)] == ["literal"]
