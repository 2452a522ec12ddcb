"""The address-space lint: what it must find, what it must let pass, and every shader here under both sets of rules."""

from __future__ import annotations

import re
from pathlib import Path

import emulator
import pytest
import test_emulator
import test_emulator_msl
from emulator.lint import RULES, lint

pytestmark = pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))

ROOT = Path(__file__).parents[1]
HEADER = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"


def kernel(body: str) -> str:
    return (
        "kernel void k(device float* a [[buffer(0)]], constant int& n [[buffer(1)]], constant float* c [[buffer(2)]], "
        "uint i [[thread_position_in_grid]]) { threadgroup float t[32]; float x[4] = {0, 0, 0, 0}; " + body + " }\n"
    )


METHOD = "struct F { float v[4]; thread float& at(short i) %s{ return v[i]; } };\n"
PAIR = "struct P { int a, b; };\n"
# (what, text, whether it is an error under the rules of Metal 4.1, whether before)
CASES = [
    ("correct", kernel("t[i] = a[i] + c[i] + x[0];\n"
     "threadgroup_barrier(mem_flags::mem_threadgroup); a[i] = t[31 - i] * n;"), 0, 0),
    ("device to threadgroup", "void f(threadgroup float* p) { *p = 1; }\n" + kernel("f(a);"), 1, 1),
    ("threadgroup to device", "void f(device float* p) { *p = 1; }\n" + kernel("f(t);"), 1, 1),
    ("constant to device", "float f(device const float* p) { return *p; }\n" + kernel("a[0] = f(c);"), 1, 1),
    ("device to constant", "float f(constant float* p) { return *p; }\n" + kernel("a[0] = f(a);"), 1, 1),
    ("device pointer as thread pointer", kernel("thread float* p = a; *p = 1;"), 1, 1),
    ("local as device pointer", kernel("device float* p = &x[0]; *p = 1;"), 1, 1),
    ("unqualified parameter, thread argument", "float f(float* p) { return *p; }\n" + kernel("a[0] = f(x);"), 0, 1),
    ("unqualified parameter, device argument", "float f(float* p) { return *p; }\n" + kernel("a[0] = f(a);"), 0, 1),
    ("unqualified pointer to device", kernel("float* p = a + i; *p = 1;"), 0, 1),
    ("unqualified reference to device", kernel("float& p = a[i]; p = 1;"), 0, 1),
    ("write through constant", kernel("n = 3;"), 1, 1),
    ("write through constant pointer", kernel("c[0] = 3;"), 1, 1),
    ("cast between spaces", kernel("thread float* p = (thread float*)a; *p = 1;"), 1, 1),
    ("thread& from an unqualified method", METHOD % "" + kernel("F f; f.at(1) = 2; a[0] = f.at(1);"), 1, 0),
    ("thread& from a thread method", METHOD % "thread " + kernel("F f; f.at(1) = 2; a[0] = f.at(1);"), 0, 0),
    (
        "unqualified method on threadgroup memory",
        "struct F { float v; void set(float x) { v = x; } };\n"
        "kernel void k(device float* a [[buffer(0)]]) { threadgroup F f; f.set(1); a[0] = f.v; }\n",
        0,
        1,
    ),
    ("struct out of constant", PAIR + "kernel void k(constant P& p [[buffer(0)]], device int* o [[buffer(1)]]) "
     "{ P q = p; o[0] = q.a; }\n", 0, 0),
    ("struct into threadgroup", PAIR + "kernel void k(device int* o [[buffer(1)]], uint i [[thread_position_in_grid]]) "
     "{ threadgroup P q[4]; P r; r.a = 1; r.b = 2; q[i] = r; o[0] = q[1].a; }\n", 0, 0),
    ("structs by value", PAIR + "P f(P p) { P q = p; q.a += 1; return q; }\n"
     "kernel void k(device int* o [[buffer(0)]]) { P p; p.a = o[0]; p.b = 2; o[1] = f(f(p)).a; }\n", 0, 0),
    ("float to bfloat", "kernel void k(device bfloat* a [[buffer(0)]], device float* b [[buffer(1)]]) "
     "{ a[0] = b[0]; }\n", 1, 1),
    ("float to bfloat, cast", "kernel void k(device bfloat* a [[buffer(0)]], device float* b [[buffer(1)]]) "
     "{ a[0] = bfloat(b[0]); }\n", 0, 0),
    ("float to half", "kernel void k(device half* a [[buffer(0)]], device float* b [[buffer(1)]]) "
     "{ a[0] = b[0]; }\n", 0, 0),
    ("half4 to float4", "kernel void k(device half4* a [[buffer(0)]], device float4* b [[buffer(1)]]) "
     "{ b[0] = a[0]; }\n", 1, 1),
    ("half4 to float4, cast", "kernel void k(device half4* a [[buffer(0)]], device float4* b [[buffer(1)]]) "
     "{ b[0] = float4(a[0]); }\n", 0, 0),
    ("atomic on a plain pointer", kernel("atomic_fetch_add_explicit(a, 1, memory_order_relaxed);"), 1, 1),
    ("matrix out of constant", kernel("simdgroup_float8x8 m; simdgroup_load(m, c, 8);"), 1, 1),
    ("components of a vector", kernel("float4 v = float4(1, 2, 3); a[0] = v.x;"), 1, 1),
    ("kernel argument without a space", "kernel void k(float* a [[buffer(0)]]) { a[0] = 1; }\n", 1, 1),
    ("buffer index", "kernel void k(device float* a [[buffer(31)]]) { a[0] = 1; }\n", 1, 1),
    ("threadgroup argument", "kernel void k(threadgroup float* a [[threadgroup(0)]]) { a[0] = 1; }\n", 1, 1),
    ("virtual", "struct F { virtual float f() { return 1; } };\n" + kernel("F f; a[0] = f.f();"), 1, 1),
    ("threadgroup variable in a function", "float f(uint i) { threadgroup float z[4]; z[i] = 1; return z[0]; }\n"
     + kernel("a[0] = f(i);"), 1, 1),
    ("static local", kernel("static int z = 0; a[0] = z++;"), 1, 1),
    ("global variable", "float z[4] = {1, 2, 3, 4};\n" + kernel("a[0] = z[i];"), 1, 1),
    ("double", kernel("double d = a[0]; a[1] = d;"), 1, 1),
    ("std", kernel("a[0] = std::abs(a[1]);"), 1, 1),
    ("erf", kernel("a[0] = erf(a[1]);"), 1, 1),
    ("function constant", "constant int z [[function_constant(0)]];\n" + kernel("a[0] = z;"), 1, 1),
    ("not ASCII", "// \u00fc\n" + kernel("a[0] = 1;"), 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_case(case: tuple[str, str, int, int]) -> None:
    _, text, *wrong = case
    for rules, expected in zip(RULES, wrong, strict=True):
        findings = lint(HEADER + text, "case.metal", rules)
        assert bool(findings) == bool(expected), (rules, findings)
        assert all(re.match(r"case\.metal:\d+(:\d+)?: error: |error: ", finding) for finding in findings), findings


# ---- every shader of the repository ----

# Values for the macros that make variants of a file in metal/: what the encoders write in front of it.
VARIANTS: dict[str, tuple[str, ...]] = {
    "MM_T": ("half", "bfloat", "float"),
    "MM_G": ("float", "half"),
    "MM_C": ("half", "float"),
    "MM_W": ("float", "bfloat"),
    "MM_ID": ("int", "long"),
    "MM_ROWS": ("4", "1"),
    "MM_ACTIVATION": ("0", "1", "2", "3"),
    "MM_ROUTER": ("0", "1", "2"),
    "MM_CASES(X)": ("X(2, 5) X(0, 4)", "X(1, 6)"),
    "MM_RENORMALIZE": ("true", "false"),
    "MM_HAS_CORRECTION": ("true", "false"),
    "MM_HAS_BIAS": ("true", "false"),
    "MM_HAS_GATE_BIAS": ("false", "true"),
    "MM_HAS_UP_BIAS": ("false", "true"),
    "MM_HAS_DOWN_BIAS": ("false", "true"),
    "MM_ROTATED": ("true", "false"),
}


def whole(path: Path, seen: set[Path]) -> str:
    """A file with its #include "..." lines replaced by what they name, each file once."""
    seen.add(path)
    lines = []
    for line in path.read_text(encoding="ascii").splitlines():
        named = re.match(r'\s*#include "(.*)"', line)
        found = named and next((f / named[1] for f in (path.parent, ROOT / "csrc") if (f / named[1]).exists()), None)
        lines.append(line if not found else whole(found, seen) if found not in seen else "")
    return "\n".join(lines) + "\n"


def prefix(text: str, variant: int) -> str:
    """#define lines for the macros that the text uses and does not define."""
    lines = []
    for macro, choices in VARIANTS.items():
        name = macro.partition("(")[0]
        if re.search(rf"\b{name}\b", text) and not re.search(rf"#define {name}\b", text):
            lines.append(f"#define {macro} {choices[variant % len(choices)]}\n")
    return "".join(lines)


SHADERS = sorted((ROOT / "metal").glob("*.metal"))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("path", SHADERS, ids=[path.name for path in SHADERS])
def test_shader(path: Path, rules: str) -> None:
    text = whole(path, set())
    for variant in range(3):
        findings = lint(prefix(text, variant) + text, path.name, rules)
        assert not findings, "\n".join(findings[:10])


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    "text",
    [
        test_emulator_msl.LANGUAGE, test_emulator_msl.ATOMICS, test_emulator_msl.MATRIX,
        *[case.text for case in test_emulator.CASES.values()],
    ],
    ids=["language", "atomics", "matrix", *test_emulator.CASES],
)  # fmt: skip
def test_kernels_of_the_tests(text: str, rules: str) -> None:
    """What the emulator runs as legal passes the lint as well: the two agree."""
    findings = lint(HEADER + text, "test.metal", rules)
    assert not findings, "\n".join(findings[:10])
