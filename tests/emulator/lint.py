"""The address-space lint: checks the types of MSL text with clang's C++ for OpenCL, which has Metal's address spaces,
plus what the text alone shows. The emulator erases address spaces, so this is the other half of compiling.

Two sets of rules: Metal 4.1 (unqualified pointers are generic) and those before it (they are thread). Shaders that
PyTorch compiles today fall under the earlier ones; both have to pass.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from . import toolchain
from .front import Source
from .tokens import FrontError, skip_angles

HERE = Path(__file__).parent
RULES = ("4.1", "before 4.1")
VECTOR = re.compile(r"^(?:bool|u?char|u?short|u?int|u?long|half|float|bfloat)[234]$")
BEFORE_ONLY = "pointer or reference without an address space"

# What clang's OpenCL refuses although Metal accepts it: a pattern of the error, one of its notes.
ACCEPTED_BY_METAL = (
    (
        r"no matching constructor for init",
        r"implicit (?:copy|move) constructor.*cannot bind reference in address space",
    ),
    (r"no matching constructor for init", r"implicit move constructor.*expects an rvalue"),  # by value, in or out
    (r"incompatible operand types \('(?:const )?__\w+ (\w+).*' and '(?:const )?(?:__\w+ )?\1", ""),
    (r"no matching (?:constructor|conversion for functional)", r"construct an object in address space unqualified"),
    (r"call to implicitly-deleted default constructor", r"has no default constructor"),
    (r"static assertion expression is not an integral constant", r"non-constexpr|subexpression|undefined"),
    (r"cannot bind to a temporary object because of address space mismatch", ""),
    (r"static_cast from '.*half.* to '.*bf.*16.*' is not allowed", ""),
    (r"no viable overloaded '='", r"implicit (?:copy|move) assignment"),
)


def _as_opencl(source: Source) -> str:
    """Vector constructors T(a, b) as emu_make<T>(a, b), and bfloat literals, which OpenCL has not."""
    tokens = source.tokens
    for i, token in enumerate(tokens[:-1]):
        before, after = tokens[i - 1].text if i else "", tokens[i + 1]
        if token.kind == "number" and token.text.lower().endswith("bf"):
            source.edit(token.start, token.end, f"(bfloat){token.text[:-2]}f")
        elif token.kind != "word" or before == "operator":
            continue
        elif VECTOR.match(token.text) and after.text == "(":
            source.edit(token.start, token.end, f"emu_make<{token.text}>")
        elif token.text == "vec" and after.text == "<":
            end = skip_angles(tokens, i + 1)
            start = tokens[i - 2].start if before == "::" else token.start
            if tokens[end].text == "(":
                source.edit(start, tokens[end - 1].end, f"emu_make<{source.text[start : tokens[end - 1].end]}>")
    return source.rewritten()


def _compile(code: str, rules: str) -> list[list[str]]:
    """clang's diagnostics, each with its notes."""
    extensions = "+cl_khr_fp16,-__opencl_c_program_scope_global_variables,-__opencl_c_pipes,-__opencl_c_device_enqueue"
    if rules != "4.1":
        extensions += ",-__opencl_c_generic_address_space"
    command = [*toolchain.ZIG, "clang", "-x", "clcpp", "-cl-std=clc++2021", "-target", "x86_64-unknown-linux-gnu"]
    command += [
        "-cl-no-stdinc",
        "-nostdinc",
        "-cl-single-precision-constant",
        "-fsyntax-only",
        "-I",
        str(HERE / "include"),
    ]
    command += [
        "-include",
        str(HERE / "include" / "lint.h"),
        "-Wno-everything",
        "-Wimplicit-float-conversion",
        "-Wreturn-type",
    ]
    command += ["-fno-caret-diagnostics", "-ferror-limit=0", "-ftemplate-backtrace-limit=2"]
    command += ["-Xclang", "-fnative-half-arguments-and-returns", "-Xclang", f"-cl-ext={extensions}", "-"]
    run = subprocess.run(command, input=code, capture_output=True, text=True, check=False)
    groups: list[list[str]] = []
    for line in run.stderr.splitlines():
        if re.search(r"(?:^|: )(?:error|warning|fatal error): ", line):
            groups.append([line])
        elif groups and line.strip():
            groups[-1].append(line)
    return groups


def _finding(group: list[str]) -> str | None:
    """One diagnostic as a finding, or None where Metal takes what clang does not."""
    head, notes = group[0], "\n".join(group[1:])
    if "warning:" in head:
        if "-Wreturn-type" in head:
            return head.replace("warning:", "error:")
        # Of bfloat's conversions, Metal makes only those from integers by itself.
        target = head.rpartition(" to ")[2]
        if "__bf16" not in target or re.search(r"from '(?:u?int|u?long)'", head):
            return None
        return f"{head.partition(': warning:')[0]}: error: no implicit conversion to {target}"
    if any(re.search(error, head) and re.search(note, notes) for error, note in ACCEPTED_BY_METAL):
        return None
    ours = f"{HERE}/include/"
    theirs = [line for line in group if ours not in line]
    if ours in head and theirs:  # the error is in one of our headers: name the line of the shader that led there
        theirs = [f"{theirs[0].partition(': note:')[0]}: error: {head.partition('error: ')[2]}"]
    return "\n".join(theirs[:3] or [head])


def text_findings(text: str, name: str) -> list[str]:
    """What needs no compiler: bytes that are not ASCII, which PyTorch cannot hand over."""
    return [
        f"{name}:{number}: error: not ASCII: {line.strip()[:60]!r}"
        for number, line in enumerate(text.splitlines(), 1)
        if not line.isascii()
    ]


def lint(text: str, name: str, rules: str, includes: Iterable[Path] = ()) -> list[str]:
    """Findings for one MSL text, "file:line: error: ..." each; an empty list means clean.

    rules: "4.1" or "before 4.1". includes: folders for #include "..." lines that are still in the text.
    """
    if rules not in RULES:
        raise ValueError(f"lint: rules {rules!r}; expected one of {RULES}")
    findings = text_findings(text, name)
    try:
        source = toolchain.parse(text, name, lint=True, includes=list(includes))
    except FrontError as error:
        return [*findings, str(error).strip()]
    findings += [note for note in source.notes if rules != "4.1" or BEFORE_ONLY not in note]
    for group in _compile(_as_opencl(source), rules):
        finding = _finding(group)
        if finding:
            findings.append(finding)
    return list(dict.fromkeys(findings))
