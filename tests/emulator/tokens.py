"""Tokens of preprocessed MSL, and the little structure that the front end and the lint need of them.

Owns finding brackets, attributes and template lists in a flat token list. It is no C++ parser: what it misreads
shows as a compile error later, not as another program.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

ADDRESS_SPACES = frozenset(("device", "constant", "threadgroup", "thread"))
OPENING = {"(": ")", "[": "]", "{": "}"}
CLOSING = frozenset(OPENING.values())

_TOKEN = re.compile(
    r"""(?P<space>\s+) | (?P<hash>^[ \t]*\#[^\n]*) | (?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<number>\.?\d(?:[eEpP][+-]|[\w.'])*) | (?P<word>[A-Za-z_]\w*)
      | (?P<mark>::|->|<<=|>>=|&&|\|\||[-+*/%&|^=!<>]=|\+\+|--|.)""",
    re.X | re.M | re.S,
)


class FrontError(Exception):
    """The shader does not compile; the text is what a compiler would print."""


@dataclass(frozen=True, slots=True)
class Token:
    kind: str  # text, number, word or mark
    text: str
    start: int
    end: int


def tokenize(text: str) -> list[Token]:
    """All tokens of preprocessed text; line markers and white space are dropped."""
    found = []
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup
        if kind not in (None, "space", "hash"):
            found.append(Token(str(kind), match.group(), match.start(), match.end()))
    return found


def match_brackets(tokens: list[Token]) -> dict[int, int]:
    """The index of every bracket's partner."""
    partner: dict[int, int] = {}
    stack: list[int] = []
    for i, token in enumerate(tokens):
        if token.kind != "mark":
            continue
        if token.text in OPENING:
            stack.append(i)
        elif token.text in CLOSING:
            if not stack or OPENING[tokens[stack[-1]].text] != token.text:
                raise FrontError(f"error: unbalanced {token.text!r}")
            j = stack.pop()
            partner[i], partner[j] = j, i
    if stack:
        raise FrontError(f"error: {tokens[stack[-1]].text!r} is never closed")
    return partner


def is_attribute(tokens: list[Token], i: int) -> bool:
    """Whether an attribute's `[[` begins at i (and not an index of an index)."""
    return (
        i + 1 < len(tokens)
        and tokens[i].text == "["
        and tokens[i + 1].text == "["
        and tokens[i].end == tokens[i + 1].start
    )


def skip_angles(tokens: list[Token], i: int) -> int:
    """The index after the template list whose `<` is at i."""
    depth = 0
    while i < len(tokens):
        text = tokens[i].text
        if text == "<" and (depth == 0 or tokens[i - 1].kind == "word"):  # `sizeof(T) < 8` is a comparison
            depth += 1
        elif text == ">":
            depth -= 1
        elif text in OPENING:
            inner = 1
            i += 1
            while inner:
                inner += (tokens[i].text in OPENING) - (tokens[i].text in CLOSING)
                i += 1
            continue
        i += 1
        if depth <= 0:
            return i
    raise FrontError("error: a template list is never closed")


def split_commas(tokens: list[Token], low: int, high: int, partner: dict[int, int]) -> list[list[Token]]:
    """tokens[low:high] cut at the commas that no bracket or template list contains."""
    parts: list[list[Token]] = []
    current: list[Token] = []
    i, angles = low, 0
    while i < high:
        text = tokens[i].text
        if text in OPENING:
            current += tokens[i : partner[i] + 1]
            i = partner[i] + 1
            continue
        angles += (text == "<") - (text == ">" and angles > 0)
        if text == "," and not angles:
            parts.append(current)
            current = []
        else:
            current.append(tokens[i])
        i += 1
    return [*parts, current] if current else parts


def constant(text: str) -> int | None:
    """The value of an integer expression of literals, or None."""
    text = re.sub(r"(?<=\d)[uUlL]+\b", "", text)
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError):
        return None


def _evaluate(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp):
        a, b = _evaluate(node.left), _evaluate(node.right)
        match node.op:
            case ast.Add():
                return a + b
            case ast.Sub():
                return a - b
            case ast.Mult():
                return a * b
            case ast.Div() | ast.FloorDiv() if b:
                return a // b
    raise ValueError("not a constant")
