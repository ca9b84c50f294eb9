# SPDX-License-Identifier: Apache-2.0
"""VNN-LIB: files that describe the *unsafe* inputs and outputs of a network, as in VNN-COMP.

Read are versions 1 (``X_0``, ``Y_1``) and 2 (``X[0,3]``, ``Y[0,1]`` of one declared network): ``<=``, ``>=``, ``<``,
``>``, ``=`` between linear sums, nested ``and`` and ``or``. Strict comparisons count as their closures: the unsafe set
can only grow. Inputs must be bounded on both sides in every disjunct, each alone (a box).
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_DISJUNCTS = 100_000

_TOKEN = re.compile(r";[^\n]*|[()]|[^\s()\[\];]+\s*\[[^\]]*\]|[^\s();]+")
_OLD_NAME = re.compile(r"^([XY])_(\d+)$")
_NEW_NAME = re.compile(r"^([^\s\[]+)\s*\[([^\]]*)\]$")

Variable = tuple[str, int]
Linear = tuple[dict[Variable, float], float]
"""Coefficients by ("X" or "Y", flat index), and a constant."""


@dataclass(frozen=True, eq=False)
class UnsafeSet:
    """A box of inputs and a list of conjunctions: unsafe is an x of the box whose y meets all rows of one of them.

    x_L, x_U [n_in]. rows: (a [R, n_out], b [R]) each, meaning a y <= b.
    """

    x_L: Tensor
    x_U: Tensor
    rows: list[tuple[Tensor, Tensor]]

    def clauses(self) -> tuple[list[Tensor], list[Tensor]]:
        """C and rhs of what must hold instead: in every conjunction some row of a y > b."""
        return [a for a, _ in self.rows], [b for _, b in self.rows]


def read(path: str | os.PathLike[str]) -> list[UnsafeSet]:
    """The unsafe sets of a file, one for each box of inputs.

    Raises:
        ValueError: the text is not VNN-LIB as described above; the message says what was met.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as wrong:
        raise ValueError(f"{os.fspath(path)} is not UTF-8 text (byte {wrong.start})") from wrong
    return parse(text)


def parse(text: str) -> list[UnsafeSet]:
    """The unsafe sets of a VNN-LIB text."""
    names = _Names()
    asserted: list[Any] = []
    for form in _forms(text):
        _statement(form, names, asserted)
    if not names.inputs or not names.outputs:
        raise ValueError("VNN-LIB declares no inputs (X) or no outputs (Y)")
    if not asserted:
        raise ValueError("VNN-LIB asserts nothing: every input would be unsafe")
    disjuncts = _normal(["and", *asserted], names)
    return _grouped(disjuncts, names)


def _forms(text: str) -> Iterator[Any]:
    """Nested lists of tokens."""
    stack: list[list[Any]] = [[]]
    for token in _TOKEN.findall(text):
        if token.startswith(";"):
            continue
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise ValueError("VNN-LIB has a ')' without its '('")
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    if len(stack) != 1:
        raise ValueError("VNN-LIB ends inside a '('")
    yield from stack[0]


class _Names:
    """Declared variables: how many of X and Y, and version 2's names with their shapes."""

    def __init__(self) -> None:
        self.inputs = self.outputs = 0
        self.shapes: dict[str, tuple[str, tuple[int, ...]]] = {}

    def declare(self, kind: str, count: int) -> None:
        if kind == "X":
            self.inputs = max(self.inputs, count)
        else:
            self.outputs = max(self.outputs, count)

    def find(self, token: str) -> Variable | None:
        """The variable a token names, None for none."""
        if old := _OLD_NAME.match(token):
            kind, index = old[1], int(old[2])
            if index >= (self.inputs if kind == "X" else self.outputs):
                raise ValueError(f"VNN-LIB uses {token}, which is not declared")
            return kind, index
        if (new := _NEW_NAME.match(token)) and new[1] in self.shapes:
            kind, shape = self.shapes[new[1]]
            where = tuple(int(i) for i in new[2].split(",")) if new[2].strip() else ()
            if len(where) != len(shape) or any(not 0 <= i < n for i, n in zip(where, shape, strict=True)):
                raise ValueError(f"VNN-LIB uses {token}, which has shape {list(shape)}")
            flat = 0
            for i, n in zip(where, shape, strict=True):
                flat = flat * n + i
            return kind, flat
        return None


def _statement(form: Any, names: _Names, asserted: list[Any]) -> None:
    head = form[0] if isinstance(form, list) and form else form
    if head == "declare-const" and len(form) == 3:
        old = _OLD_NAME.match(form[1])
        if old is None:
            raise ValueError(f"VNN-LIB declares {form[1]!r}; X_0, X_1, ... and Y_0, Y_1, ... are needed")
        names.declare(old[1], int(old[2]) + 1)
    elif head == "declare-network":
        for part in form[2:]:
            if part[0] in ("declare-input", "declare-output"):
                _declare_tensor(part, names)
            else:
                raise ValueError(f"VNN-LIB has {part[0]!r} in a network; only inputs and outputs are read")
    elif head == "assert" and len(form) == 2:
        asserted.append(form[1])
    elif head not in ("vnnlib-version", "set-logic", "set-info"):
        raise ValueError(f"VNN-LIB has the statement {str(form)[:80]}, which is not read")


def _declare_tensor(part: list[Any], names: _Names) -> None:
    """``(declare-input X Real [1,5])``; the shape may have come apart into tokens."""
    kind = "X" if part[0] == "declare-input" else "Y"
    if any(known == kind for known, _ in names.shapes.values()):
        raise ValueError("VNN-LIB declares several inputs or outputs; one of each is read")
    found = re.search(r"\[([^\]]*)\]", " ".join(str(token) for token in part[2:]))
    shape = tuple(int(n) for n in found[1].replace(",", " ").split()) if found else ()
    name = str(part[1])
    names.shapes[name] = (kind, shape)
    names.declare(kind, math.prod(shape))


def _linear(form: Any, names: _Names) -> Linear:
    """A linear sum."""
    if isinstance(form, str):
        variable = names.find(form)
        if variable is not None:
            return {variable: 1.0}, 0.0
        try:
            value = float(form)
        except ValueError:
            raise ValueError(f"VNN-LIB has {form!r} where a number or a declared variable is needed") from None
        if not math.isfinite(value):
            raise ValueError(f"VNN-LIB has the number {form}; finite ones are needed")
        return {}, value
    head, parts = form[0], [_linear(part, names) for part in form[1:]]
    if head == "+" and parts:
        return _combined([(1.0, part) for part in parts])
    if head == "-" and parts:
        signs = [-1.0] if len(parts) == 1 else [1.0] + [-1.0] * (len(parts) - 1)
        return _combined(list(zip(signs, parts, strict=True)))
    if head == "*" and len(parts) == 2:
        for factor, other in (parts, parts[::-1]):
            if not factor[0]:
                return _combined([(factor[1], other)])
    if head == "/" and len(parts) == 2 and not parts[1][0] and parts[1][1]:
        return _combined([(1 / parts[1][1], parts[0])])
    raise ValueError(f"VNN-LIB has {str(form)[:80]}; only linear sums are read")


def _combined(terms: list[tuple[float, Linear]]) -> Linear:
    coefficients: dict[Variable, float] = {}
    constant = 0.0
    for factor, (part, offset) in terms:
        constant += factor * offset
        for variable, value in part.items():
            coefficients[variable] = coefficients.get(variable, 0.0) + factor * value
    return coefficients, constant


def _normal(form: Any, names: _Names) -> list[list[Linear]]:
    """Disjunctive normal form; each linear sum is meant <= 0."""
    if not isinstance(form, list) or not form:
        raise ValueError(f"VNN-LIB has {form!r} where a condition is needed")
    head = form[0]
    if head == "or":
        return [conjunct for part in form[1:] for conjunct in _normal(part, names)]
    if head == "and":
        parts = [_normal(part, names) for part in form[1:]]
        if math.prod(len(part) for part in parts) > MOST_DISJUNCTS:
            raise ValueError(f"VNN-LIB has more than {MOST_DISJUNCTS} disjuncts; split the file")
        return [list(itertools.chain.from_iterable(choice)) for choice in itertools.product(*parts)]
    if head in ("<=", "<", ">=", ">", "=") and len(form) == 3:
        left, right = _linear(form[1], names), _linear(form[2], names)
        below = _combined([(1.0, left), (-1.0, right)])
        above = _combined([(-1.0, left), (1.0, right)])
        return [{"<": [below], ">": [above], "=": [below, above]}[head[0]]]
    raise ValueError(f"VNN-LIB has the condition {str(form)[:80]}, which is not read")


def _grouped(disjuncts: list[list[Linear]], names: _Names) -> list[UnsafeSet]:
    """Disjuncts with one box together."""
    boxes: dict[tuple[tuple[float, ...], tuple[float, ...]], list[tuple[Tensor, Tensor]]] = {}
    for conjunct in disjuncts:
        low, high = [-math.inf] * names.inputs, [math.inf] * names.inputs
        rows: list[Linear] = []
        for coefficients, constant in conjunct:
            kinds = {kind for kind, _ in coefficients}
            if kinds == {"X"} and len(coefficients) == 1:
                ((_, index), factor) = next(iter(coefficients.items()))
                if factor > 0:
                    high[index] = min(high[index], -constant / factor)
                elif factor < 0:
                    low[index] = max(low[index], -constant / factor)
            elif "X" in kinds:
                raise ValueError(
                    "VNN-LIB has a condition on several inputs, or on inputs and outputs; only boxes are read"
                )
            else:
                rows.append((coefficients, constant))
        if not all(map(math.isfinite, low + high)):
            raise ValueError("VNN-LIB leaves an input without a lower or an upper bound")
        if any(a > b for a, b in zip(low, high, strict=True)):
            continue
        boxes.setdefault((tuple(low), tuple(high)), []).append(_matrix(rows, names.outputs))
    return [UnsafeSet(_tensor(low), _tensor(high), rows) for (low, high), rows in boxes.items()]


def _tensor(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _matrix(rows: list[Linear], n_out: int) -> tuple[Tensor, Tensor]:
    """a y <= b; a conjunction without rows is met by every y: one row 0 y <= 0."""
    a = torch.zeros((max(len(rows), 1), n_out), dtype=torch.float64)
    b = torch.zeros(max(len(rows), 1), dtype=torch.float64)
    for row, (coefficients, constant) in enumerate(rows):
        b[row] = -constant
        for (_, index), value in coefficients.items():
            a[row, index] = value
    return a, b


def witness_text(x: Tensor, y: Tensor) -> str:
    """A counterexample in VNN-COMP's value syntax."""
    lines = [f"(X_{i} {value!r})" for i, value in enumerate(x.reshape(-1).tolist())]
    lines += [f"(Y_{i} {value!r})" for i, value in enumerate(y.reshape(-1).tolist())]
    return "(" + "\n".join(lines) + ")"
