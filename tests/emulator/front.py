"""The front end: .metal text to C++ that an ordinary compiler takes. Nothing of the text is interpreted beyond need.

  1. preprocess with the <metal_*> headers empty and MSL's keywords left alone;
  2. find kernels, their parameters' attributes, and the instantiations with [[host_name]];
  3. rewrite the few things that C++ cannot say: threadgroup variables, `.xy =`, 1.0 as a float, overloads and methods
     that differ in address space only;
  4. add a table of kernels, each with a function that calls it with a lane's arguments.
Lines stay where they are, so messages name the shader's own. With lint=True, address spaces are kept, for lint.py.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .tokens import (
    ADDRESS_SPACES,
    CLOSING,
    OPENING,
    FrontError,
    Token,
    constant,
    is_attribute,
    match_brackets,
    skip_angles,
    split_commas,
    tokenize,
)

HERE = Path(__file__).parent
BUFFERS = 31
SWIZZLE = re.compile(r"^(?:[xyzw]{2,4}|[rgba]{2,4})$")
DECIMAL = re.compile(r"(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")
BUILTINS = {
    attribute: name for name, attribute in re.findall(r"X\((\w+), (\w+)\)", (HERE / "include/abi.h").read_text())
}
HEADERS = re.findall(
    r"\w+",
    "array atomic common compute config cooperative_tensor geometric integer limits logging math matrix numeric pack "
    "quadgroup relational simdgroup simdgroup_matrix stdlib tensor type_traits types uniform",
)
# C++ that MSL does not have, and that the host compiler would take
NOT_MSL = frozenset(
    re.findall(r"\w+", "double goto throw try catch dynamic_cast typeid virtual new delete thread_local")
)


@dataclass
class Parameter:
    text: str  # the declaration without its attribute
    attribute: str | None
    index: int
    space: str | None


@dataclass
class Kernel:
    parameters: list[Parameter]
    is_template: bool
    max_threads: int
    place: str


@dataclass
class Instance:
    callee: str  # an expression: the kernel function's address
    kernel: str  # its qualified name, a key of Source.kernels


def preprocess(text: str, name: str, compiler: list[str], headers: Path, includes: list[Path] | None = None) -> str:
    """`text` with macros expanded; `headers` holds the empty <metal_*> files."""
    command = [*compiler, "-E", "-x", "c++", "-std=c++17", "-undef", "-nostdinc", "-Wno-everything", f"-I{headers}"]
    command += [f"-I{path}" for path in includes or []]
    command += [
        "-D__METAL__=1",
        "-D__METAL_VERSION__=310",
        "-D__METAL_MACOS__=1",
        "-D__APPLE__=1",
        "-D__HAVE_BFLOAT__=1",
    ]
    command += ["-D__cplusplus=201402L", "-"]
    run = subprocess.run(command, input=f'#line 1 "{name}"\n{text}', capture_output=True, text=True, check=False)
    if run.returncode:
        raise FrontError(run.stderr)
    return run.stdout


@dataclass
class Source:
    """One preprocessed shader: what was found in it, and the edits that make C++ of it."""

    text: str
    lint: bool = False
    kernels: dict[str, Kernel] = field(default_factory=dict)  # by qualified function name
    instances: dict[str, Instance] = field(default_factory=dict)  # by the name that get_kernel_function takes
    notes: list[str] = field(default_factory=list)  # findings, "place: error: text"

    def __post_init__(self) -> None:
        self.tokens = tokenize(self.text)
        self.partner = match_brackets(self.tokens)
        self._edits: list[tuple[int, int, str]] = []
        self._markers = [
            (match.end() + 1, int(match[1]), match[2])
            for match in re.finditer(r'^# (\d+) "([^"]*)".*$', self.text, re.M)
        ]
        self._inside_kernel = False
        self._scan(0, len(self.tokens), [], "namespace")
        for i, token in enumerate(self.tokens):
            self._literal_and_words(i, token)

    # ---- places and edits ----

    def place(self, token: Token) -> str:
        """file:line of a token, from the preprocessor's markers."""
        before = [marker for marker in self._markers if marker[0] <= token.start]
        if not before:
            return "?"
        start, line, file = before[-1]
        return f"{file}:{line + self.text.count(chr(10), start, token.start)}"

    def _fail(self, token: Token, problem: str) -> None:
        message = f"{self.place(token)}: error: {problem}"
        if not self.lint:
            raise FrontError(message)
        self.notes.append(message)

    def edit(self, start: int, end: int, replacement: str) -> None:
        """Replaces text[start:end]; overlapping edits: the first in the text wins."""
        self._edits.append((start, end, replacement))

    def _cut(self, start: int, end: int) -> None:
        self.edit(start, end, "\n" * self.text.count("\n", start, end))  # lines stay where they are

    def rewritten(self) -> str:
        pieces, at = [], 0
        for start, end, replacement in sorted(self._edits):
            if start < at:
                continue
            pieces += [self.text[at:start], replacement]
            at = end
        return "".join([*pieces, self.text[at:]])

    def _literal_and_words(self, i: int, token: Token) -> None:
        if token.kind == "number" and not self.lint and DECIMAL.fullmatch(token.text):
            self.edit(token.end, token.end, "f")  # MSL has no double: 1.0 is a float
        if token.kind != "word":
            return
        before = self.tokens[i - 1].text if i else ""
        if token.text in NOT_MSL and not (token.text == "delete" and before == "="):
            self._fail(token, f"'{token.text}' does not exist in MSL")
        if token.text == "std" and i + 1 < len(self.tokens) and self.tokens[i + 1].text == "::":
            self._fail(token, "std:: does not exist in MSL")

    # ---- scopes ----

    def _scan(self, low: int, high: int, scope: list[str], what: str) -> None:
        """A namespace's or class's body."""
        tokens, i = self.tokens, low
        seen: set[str] = set()
        while i < high:
            text = tokens[i].text
            if text in (";", ":", "public", "private", "protected"):
                i += 1
            elif text == "extern" and tokens[i + 1].kind == "text" and tokens[i + 2].text == "{":
                self._scan(i + 3, self.partner[i + 2], scope, what)
                i = self.partner[i + 2] + 1
            elif text == "namespace" or (text == "inline" and tokens[i + 1].text == "namespace"):
                j = i
                while tokens[j].text not in ("{", ";", "="):
                    j += 1
                if tokens[j].text != "{":
                    i = self._after_statement(j, high)
                    continue
                names = [t.text for t in tokens[i:j] if t.kind == "word" and t.text not in ("namespace", "inline")]
                self._scan(j + 1, self.partner[j], scope + names, "namespace")
                i = self.partner[j] + 1
            else:
                i = self._declaration(i, high, scope, what, seen)

    def _after_statement(self, i: int, high: int) -> int:
        while i < high and self.tokens[i].text != ";":
            i = self.partner[i] + 1 if self.tokens[i].text in OPENING else i + 1
        return i + 1

    def _declaration(self, start: int, high: int, scope: list[str], what: str, seen: set[str]) -> int:
        """A function, class or variable at namespace or class scope; returns the index after it."""
        tokens, partner = self.tokens, self.partner
        attributes: list[tuple[int, int]] = []
        parameters: tuple[int, int] | None = None
        is_template = is_class = assigns = False
        initializers: int | None = None
        j = start
        while j < high and tokens[j].text not in (";", "{"):
            text, before = tokens[j].text, tokens[j - 1]
            if text == "template" and tokens[j + 1].text == "<":
                is_template, j = True, skip_angles(tokens, j + 1)
            elif text == "template" and j == start:
                return self._instantiation(start, high, scope)
            elif is_attribute(tokens, j):
                attributes.append((j, partner[j]))
                j = partner[j] + 1
            elif text == "<" and before.kind == "word" and parameters is None and not assigns:
                j = skip_angles(tokens, j)
            elif text == "operator" and parameters is None:
                j += 1
                while tokens[j].text != "(" or (tokens[j + 1].text == ")" and tokens[j + 2].text == "("):
                    j += 2 if tokens[j].text == "(" else 1
                parameters, j = (j, partner[j]), partner[j] + 1
            elif text == "(":
                named = before.kind == "word" or before.text == ">"
                if parameters is None and not assigns and named and not self._is_no_function(before.text):
                    parameters = (j, partner[j])
                j = partner[j] + 1
            elif text == ":" and parameters is not None and initializers is None:
                initializers, j = j, self._after_initializers(j)
            elif text == "[":
                j = partner[j] + 1
            else:
                is_class |= text in ("struct", "class", "union", "enum") and parameters is None
                assigns |= text == "=" and parameters is None
                j += 1
        if j >= high:
            return high
        if tokens[j].text == ";":
            self._variable(start, j, attributes, what)
            return j + 1
        body = (j, partner[j])
        if is_class and parameters is None:
            return self._class(start, body, high, scope, seen)
        if parameters is None or assigns:  # a braced initializer
            end = self._after_statement(body[1], high)
            self._variable(start, end - 1, attributes, what)
            return end
        return self._function(start, parameters, initializers, body, attributes, is_template, scope, what, seen)

    @staticmethod
    def _is_no_function(word: str) -> bool:
        return word in ("alignas", "__attribute__", "decltype", "static_assert", "noexcept", "explicit")

    def _after_initializers(self, j: int) -> int:
        """From a constructor's `:` to its body's `{`."""
        tokens = self.tokens
        while True:
            j += 1
            while tokens[j].text not in ("(", "{"):
                j = skip_angles(tokens, j) if tokens[j].text == "<" else j + 1
            j = self.partner[j] + 1
            if tokens[j].text != ",":
                return j

    def _class(self, start: int, body: tuple[int, int], high: int, scope: list[str], seen: set[str]) -> int:
        tokens = self.tokens
        end = self._after_statement(body[1], high)
        head = [t.text for t in tokens[start : body[0]]]
        key = " ".join(text for text in head if text not in ADDRESS_SPACES)
        if not self.lint and key in seen and ADDRESS_SPACES & set(head):  # a specialisation for one more address space
            self._cut(tokens[start].start, tokens[end - 1].end)
            return end
        seen.add(key)
        if "enum" not in head:
            self._scan(body[0] + 1, body[1], scope, "class")
        return end

    # ---- functions ----

    def _function(
        self,
        start: int,
        parameters: tuple[int, int],
        initializers: int | None,
        body: tuple[int, int],
        attributes: list[tuple[int, int]],
        is_template: bool,
        scope: list[str],
        what: str,
        seen: set[str],
    ) -> int:
        tokens = self.tokens
        name = tokens[parameters[0] - 1].text
        words = {t.text for a, b in attributes for t in tokens[a : b + 1]}
        is_kernel = "kernel" in words or any(t.text == "kernel" for t in tokens[start : parameters[0]])
        if is_kernel:
            self._kernel(name, scope, parameters, attributes, is_template)
        else:
            for a, b in attributes:
                self.edit(tokens[a].start, tokens[b].end, " ")
        end = initializers if initializers is not None else body[0]
        if self.lint:
            self._lint_signature(parameters, end, what)
        else:
            for token in tokens[parameters[1] + 1 : end]:  # `f() const device {`
                if token.text in ADDRESS_SPACES:
                    self.edit(token.start, token.end, "")
            head = [t.text for t in tokens[start:end]]
            key = " ".join(text for text in head if text not in ADDRESS_SPACES)
            if key in seen and ADDRESS_SPACES & set(head):
                self.notes.append(
                    f"{self.place(tokens[start])}: note: overload of '{name}' that differs in address space only"
                )
                self._cut(tokens[start].start, tokens[body[1]].end)
                return body[1] + 1
            seen.add(key)
        self._strip_attributes(*parameters)
        self._inside_kernel = is_kernel
        self._body(body)
        return body[1] + 1

    def _lint_signature(self, parameters: tuple[int, int], end: int, what: str) -> None:
        tokens = self.tokens
        is_constructor = tokens[parameters[0] - 2].text in (
            *";{}:>)]", "constexpr", "METAL_FUNC", "inline", "explicit",
        )  # fmt: skip
        for token in tokens[parameters[1] + 1 : end]:
            if token.text == "thread" and what == "class" and is_constructor:
                self.edit(
                    token.start, token.end, ""
                )  # clang makes temporaries in no address space, and then rejects this
            if token.text == "constant":
                self.edit(token.start, token.end, "__constant")
        for part in split_commas(tokens, parameters[0] + 1, parameters[1], self.partner):
            words = [t.text for t in part]
            if {"*", "&"} & set(words) and not (ADDRESS_SPACES | {"auto", "...", "=", "("}) & set(words):
                declared = " ".join(words)
                self.notes.append(
                    f"{self.place(part[0])}: error: '{declared}': pointer or reference without an address space"
                )

    def _strip_attributes(self, low: int, high: int) -> None:
        i = low
        while i < high:
            if is_attribute(self.tokens, i):
                self.edit(self.tokens[i].start, self.tokens[self.partner[i]].end, " ")
                i = self.partner[i]
            i += 1

    def _kernel(
        self,
        name: str,
        scope: list[str],
        parameters: tuple[int, int],
        attributes: list[tuple[int, int]],
        is_template: bool,
    ) -> None:
        tokens = self.tokens
        found = [self._parameter(p) for p in split_commas(tokens, parameters[0] + 1, parameters[1], self.partner)]
        used = {p.index for p in found if p.attribute == "buffer"}
        for parameter in found:  # pointers without an attribute take the free buffers in order
            if parameter.attribute is None and parameter.space:
                parameter.attribute = "buffer"
                parameter.index = next(i for i in range(BUFFERS + len(found)) if i not in used)
                used.add(parameter.index)
        max_threads = 0
        qualified = "::".join([*scope, name])
        at = tokens[parameters[0]]
        for a, b in attributes:
            words = [t.text for t in tokens[a : b + 1]]
            if "max_total_threads_per_threadgroup" in words:
                value = constant("".join(words[words.index("max_total_threads_per_threadgroup") + 2 : -3]))
                if value is None:
                    self._fail(tokens[a], "max_total_threads_per_threadgroup must be a number here")
                max_threads = value or 0
            if "host_name" in words and not is_template:
                host = words[words.index("host_name") + 2].strip('"')
                self.instances[host] = Instance(f"&{qualified}", qualified)
            self.edit(tokens[a].start, tokens[b].end, " ")
        self.kernels[qualified] = Kernel(found, is_template, max_threads, self.place(at))
        if not is_template and all(instance.kernel != qualified for instance in self.instances.values()):
            self.instances[name] = Instance(f"&{qualified}", qualified)
        buffers = [p.index for p in found if p.attribute == "buffer"]
        for parameter in found:
            self._check_parameter(name, parameter, at, buffers)

    def _parameter(self, part: list[Token]) -> Parameter:
        for i, token in enumerate(part):
            if not is_attribute(part, i):
                continue
            attribute, index = part[i + 2].text, 0
            if part[i + 3].text == "(":
                close = next(k for k in range(i + 4, len(part)) if part[k].text == "]") - 1
                value = constant(" ".join(t.text for t in part[i + 4 : close]))
                if value is None:
                    self._fail(token, f"the index of [[{attribute}(...)]] must be a number here")
                index = value or 0
            return Parameter(self._text_of(part[:i]), attribute, index, self._space_of(part[:i]))
        return Parameter(self._text_of(part), None, 0, self._space_of(part))

    def _text_of(self, part: list[Token]) -> str:
        return " ".join(self.text[part[0].start : part[-1].end].split()) if part else ""

    @staticmethod
    def _space_of(part: list[Token]) -> str | None:
        return next((t.text for t in part if t.text in ADDRESS_SPACES), None)

    def _check_parameter(self, kernel: str, parameter: Parameter, at: Token, buffers: list[int]) -> None:
        what = f"kernel {kernel}: `{parameter.text}`"
        if parameter.attribute == "threadgroup" or parameter.space == "threadgroup":
            self._fail(
                at, f"{what}: PyTorch's shim cannot set the length of a threadgroup argument; declare it in the kernel"
            )
        elif parameter.attribute == "buffer":
            if parameter.index >= BUFFERS:
                self._fail(
                    at, f"{what}: buffer index {parameter.index}; Metal has {BUFFERS} buffers, 0 to {BUFFERS - 1}"
                )
            if buffers.count(parameter.index) > 1:
                self._fail(at, f"{what}: buffer index {parameter.index} is used twice")
            if parameter.space not in ("device", "constant"):
                self._fail(at, f"{what}: a buffer is device or constant memory")
        elif parameter.attribute not in BUILTINS:
            self._fail(at, f"{what}: attribute [[{parameter.attribute}]] is not supported by the emulator")

    def _instantiation(self, start: int, high: int, scope: list[str]) -> int:
        """`template [[host_name("x")]] kernel void f<half>(...);` or `... decltype(f<half>) f<half>;`"""
        tokens, partner = self.tokens, self.partner
        end = self._after_statement(start, high)
        host, k = None, start
        while k < end:
            if is_attribute(tokens, k):
                words = [t.text for t in tokens[k : partner[k]]]
                if "host_name" in words:
                    host = "".join(t.strip('"') for t in words[words.index("host_name") + 2 :] if t.startswith('"'))
                self.edit(tokens[k].start, tokens[partner[k]].end, " ")
                k = partner[k]
            k += 1
        if host is None:
            return end
        k = end - 2  # the last token before ';'
        cast = ""
        if tokens[k].text == ")":
            k = partner[k] - 1
        arguments = ""
        j = k
        if tokens[k].text == ">":
            depth = 0
            while True:
                text = tokens[j].text
                depth += (text == ">") - (text == "<")
                if text in CLOSING:
                    j = partner[j]
                if depth == 0:
                    break
                j -= 1
            arguments = " ".join(t.text for t in tokens[j : k + 1])
            j -= 1
        elif tokens[end - 2].text == ")":  # template arguments to be deduced: name the function's type
            parts = split_commas(tokens, partner[end - 2] + 1, end - 2, partner)
            cast = "(void (*)(" + ", ".join(self._without_attributes(part) for part in parts) + "))"
        name = tokens[j].text
        while tokens[j - 1].text == "::":
            name = f"{tokens[j - 2].text}::{name}"
            j -= 2
        qualified = self._resolve(name, scope)
        self.instances[host] = Instance(f"{cast}&{qualified}{arguments}", qualified)
        if not self.lint:
            self._cut(tokens[start].start, tokens[end - 1].end)
        return end

    def _without_attributes(self, part: list[Token]) -> str:
        stop = next((i for i in range(len(part)) if is_attribute(part, i)), len(part))
        return " ".join(t.text for t in part[:stop])

    def _resolve(self, name: str, scope: list[str]) -> str:
        for depth in range(len(scope), -1, -1):
            qualified = "::".join([*scope[:depth], name])
            if qualified in self.kernels:
                return qualified
        return name

    # ---- variables and bodies ----

    def _variable(self, start: int, end: int, attributes: list[tuple[int, int]], what: str) -> None:
        tokens = self.tokens
        for a, b in attributes:
            if any(t.text == "function_constant" for t in tokens[a : b + 1]):
                self._fail(tokens[a], "PyTorch's shim cannot set function constants; make variants with #define")
            self.edit(tokens[a].start, tokens[b].end, " ")
        if not self.lint:  # a prototype: no address space after its parameters
            for k in range(start, end):
                if tokens[k].text == ")" and tokens[k + 1].text in ADDRESS_SPACES | {"const"}:
                    for token in tokens[k + 1 : end]:
                        if token.text in ADDRESS_SPACES:
                            self.edit(token.start, token.end, "")
        for k in range(start, end):
            self._swizzle(k)

    def _swizzle(self, k: int) -> None:
        tokens = self.tokens
        if self.lint or tokens[k].kind != "word" or not SWIZZLE.match(tokens[k].text):
            return
        if tokens[k - 1].text in (".", "->") and tokens[k + 1].text == "=":
            self.edit(tokens[k].end, tokens[k].end, ".emu_set()")

    def _body(self, body: tuple[int, int]) -> None:
        tokens, i = self.tokens, body[0] + 1
        while i < body[1]:
            text = tokens[i].text
            if text == "static" and tokens[i + 1].text not in ("constexpr", "constant", "const"):
                self._fail(tokens[i], "static local variable")
            if text == "threadgroup" and self._begins_statement(i):
                i = self._threadgroup_variable(i)
                continue
            if is_attribute(tokens, i) and tokens[i + 2].text != "fallthrough":
                self.edit(tokens[i].start, tokens[self.partner[i]].end, " ")
                i = self.partner[i] + 1
                continue
            self._swizzle(i)
            i += 1

    def _begins_statement(self, i: int) -> bool:
        before = self.tokens[i - 1].text
        if before == ")":  # alignas(16) threadgroup half x[4];
            return self.tokens[self.partner[i - 1] - 1].text == "alignas"
        return before in (";", "{", "}", ":")

    def _threadgroup_variable(self, i: int) -> int:
        tokens, partner = self.tokens, self.partner
        end = i
        while tokens[end].text != ";":
            if tokens[end].text in ("=", "&", "*", "("):  # a pointer or a reference to threadgroup memory
                if tokens[end].text == "=" and not {"*", "&"} & {t.text for t in tokens[i:end]}:
                    self._fail(tokens[i], "a threadgroup variable cannot be initialised")
                return i + 1
            if tokens[end].text == "<":
                end = skip_angles(tokens, end)
            else:
                end = partner[end] + 1 if tokens[end].text in OPENING else end + 1
        if not self._inside_kernel:
            self._fail(tokens[i], "threadgroup variable outside of a kernel function")
        parts = split_commas(tokens, i + 1, end, partner)
        first = parts[0]
        name = len(first) - 1
        while first[name].text == "]":
            depth = 0
            while True:
                depth += (first[name].text == "]") - (first[name].text == "[")
                name -= 1
                if depth == 0:
                    break
        type_text = self.text[tokens[i + 1].start : first[name].start].strip()
        begin = tokens[i].start
        if tokens[i - 1].text == ")":  # alignas: everything in the arena is aligned to 16 bytes
            opening = partner[i - 1]
            begin = tokens[opening - 1].start
            align = constant(" ".join(t.text for t in tokens[opening + 1 : i - 1]))
            if align is None or align > 16:
                self._fail(tokens[i], "alignas of more than 16 bytes is not supported by the emulator")
        out = []
        for k, part in enumerate(parts):
            variable = first[name] if k == 0 else part[0]
            dimensions = " ".join(t.text for t in part[(name + 1 if k == 0 else 1) :])
            out.append(f"EMU_THREADGROUP({variable.text}, {type_text} {dimensions});")
        self.edit(begin, tokens[end].end, " ".join(out) + "\n" * self.text.count("\n", begin, tokens[end].end))
        return end + 1


def kernel_table(source: Source) -> str:
    """C++ that makes the table of all instances, for emu_kernels."""
    out, rows = ['\n# 1 "<kernel table>"'], []
    for number, (host, instance) in enumerate(source.instances.items()):
        if instance.kernel not in source.kernels:
            raise FrontError(f'error: [[host_name("{host}")]]: {instance.kernel} is no kernel function')
        kernel = source.kernels[instance.kernel]
        types, texts = [], []
        for p in kernel.parameters:
            kind = "EMU_BUFFER" if p.attribute == "buffer" else BUILTINS[str(p.attribute)]
            types.append(f"emu::Parameter<{kind}, {p.index}>")
            texts.append('"' + p.text.replace("\\", "\\\\").replace('"', '\\"') + '"')
        listed = ", ".join(types)
        out.append(
            f"static void emu_run_{number}(const emu_lane* lane) {{ emu::call<{listed}>({instance.callee}, lane); }}"
        )
        out.append(f"static const char* const emu_texts_{number}[] = {{{', '.join([*texts, 'nullptr'])}}};")
        out.append(
            f"static int emu_describe_{number}(emu_argument* out) "
            f"{{ return emu::describe<{listed}>({instance.callee}, out, emu_texts_{number}); }}"
        )
        rows.append(f'{{"{host}", emu_run_{number}, emu_describe_{number}, {kernel.max_threads}}}')
    if not rows:
        raise FrontError("error: the shader has no kernel")
    visible = 'extern "C" __attribute__((visibility("default")))'
    out.append(f"{visible} const emu_kernel emu_kernels[] = {{{', '.join(rows)}}};")
    out.append(f"{visible} const int emu_kernel_count = {len(rows)};")
    return "\n".join(out) + "\n"
