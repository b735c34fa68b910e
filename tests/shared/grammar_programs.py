"""Strategy that draws programs of `model_grammar`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from grammar_steps import MAX_SIZE
from hypothesis import strategies as st
from model_grammar import (
    ACTIVATIONS,
    AFFINE,
    ATTENTION,
    COMBINING,
    NORMS,
    ONE,
    OPERATIONS,
    POOLING,
    SHAPES,
    Program,
    Settings,
    Step,
    formed,
    settled,
    squashed,
)

INPUTS = ((4,), (6,), (2, 5), (3, 4), (2, 4, 4), (3, 3, 4), (2, 5, 5))
SQUASHING = ("sigmoid", "sigmoid", "hardsigmoid")
ELEMENTWISE = tuple(name for name, op in ACTIVATIONS.items() if op.rule == "pass")


class Choose:
    """Draws of hypothesis."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self.draw = draw

    def of(self, values: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(values)))

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())


class Writer:
    """Writes a program step by step; a step that does not fit is left out."""

    def __init__(self, choose: Choose | Roll, shape: tuple[int, ...], seed: int) -> None:
        self.choose, self.shape, self.seed = choose, shape, seed
        self.steps: list[Step] = []
        self.shapes = [shape]

    @property
    def program(self) -> Program:
        return Program(self.shape, tuple(self.steps), tuple(self.shapes), self.seed)

    def step(self, name: str, *reads: int | None, shares: int | None = None, **fixed: Any) -> int | None:
        """Number of the value that a new step gives; None if it does not fit."""
        if None in reads:
            return None
        operation, shapes = OPERATIONS[name], [self.shapes[i] for i in reads]
        if shares is None:
            settings: Settings | None = operation.settings(self.choose, *shapes)
            if settings is None:
                return None
            settings = {**settings, **{key: value for key, value in fixed.items() if key in settings}}
        else:
            settings = self.steps[shares].settings
        made = Program(self.shape, (*self.steps, Step(name, tuple(reads), settings, shares=shares)), tuple(self.shapes))
        try:
            given = [torch.ones(1, *shape, dtype=torch.float64) for shape in shapes]
            out = tuple(operation.plain(settings, formed(settings, made.stored(len(self.steps))), *given).shape[1:])
        except RuntimeError:  # a kernel larger than its input, after `fixed`
            return None
        if not out or not 0 < torch.Size(out).numel() <= MAX_SIZE:
            return None
        self.steps.append(made.steps[-1])
        self.shapes.append(out)
        return len(self.steps)

    def recent(self) -> int:
        """A value, mostly the last one."""
        last = len(self.steps)
        return self.choose.of([last] * 4 + list(range(last)))

    def fitting(self, name: str, first: int) -> int | None:
        """A second operand."""
        settings, choices = OPERATIONS[name].settings, []
        for i in reversed(range(len(self.shapes))):
            try:
                if settings(_First(), self.shapes[first], self.shapes[i]) is not None:
                    choices.append(i)
            except TypeError:
                continue
        return self.choose.of(choices) if choices else None

    # --- what models are made of ---

    def affine(self, a: int | None, like: bool = False) -> int | None:
        """Affine operation; of the same shape as its input, if asked for."""
        if a is None:
            return None
        shape = self.shapes[a]
        name = "linear" if len(shape) == 1 else self.choose.of(("conv", "conv", "conv", "transposed", "linear"))
        if not like:
            return self.step(name, a)
        if name == "linear":
            return self.step(name, a, out=shape[-1])
        kernel = self.choose.of((1, 3))
        return self.step("conv", a, kernel=kernel, padding=kernel // 2, stride=1, dilation=1, out=shape[0],
                         groups=1, mode="zeros")  # fmt: skip

    def activation(self, a: int | None) -> int | None:
        return self.step(self.choose.of(("relu", *ELEMENTWISE)), a)

    def residual(self, a: int) -> int | None:
        branch = self.affine(a, like=True)
        if self.choose.flag():
            branch = self.activation(branch)
        return self.step(self.choose.of(("add", "sub", "cat", "maximum", "replace", "add_part")), a, branch)

    def gate(self, a: int) -> int | None:
        """Product with a gate: squeeze-and-excitation, a gate in the same shape, a part of one, or no gate at all."""
        kind = self.choose.of(("squeeze", "same", "complement", "part", "neither", "gru", "matrix", "any"))
        if kind == "any":
            return self.product(a, self.fitting("product", a))
        if kind == "squeeze" and len(self.shapes[a]) > 1:
            squeezed = self.step("mean", a, keep=True)
            hidden = self.affine(squeezed, like=True)
            return self.product(a, self.step(self.choose.of(SQUASHING + ("relu",)), hidden))
        hidden = self.affine(a, like=True)
        if kind == "neither":
            return self.product(a, hidden)
        if kind == "part":
            both = self.step("cat", hidden, a)
            return self.product(a, self.step("chunk", self.step("sigmoid", both)))
        gate = self.step(self.choose.of(SQUASHING), hidden)
        if kind == "matrix" and len(self.shapes[a]) > 1:
            return self.step("outer", *((a, gate) if self.choose.flag() else (gate, a)))
        if kind == "complement":
            return self.product(a, self.step("complement", gate))
        if kind == "gru":
            other = self.step("tanh", self.affine(a, like=True))
            return self.step("add", self.product(other, self.step("complement", gate)), self.product(a, gate))
        return self.product(a, gate)

    def attend(self, a: int) -> int | None:
        """Attention; a query, a key or a value may be what it is made of."""
        reads = [self.affine(a, like=True) if self.choose.integer(0, 3) else a for _ in range(3)]
        return self.step("attention", *reads)

    def product(self, a: int | None, b: int | None) -> int | None:
        if a is None or b is None:
            return None
        known = squashed(self.program)
        if self.shapes[a] == self.shapes[b] and None in (known[a], known[b]):
            return None
        return self.step("product", a, b)

    def quotient(self, a: int) -> int | None:
        b = self.fitting("quotient", a)
        return self.step("quotient", a, self.step("shift", self.step("abs", b), c=0.5))

    def small(self, a: int) -> int | None:
        """Inverse of something positive."""
        return self.step("reciprocal", self.step("shift", self.step("square", a), c=2.0))

    def conv_norm(self, a: int) -> int | None:
        """Batch norm right behind an affine operation, which nothing else reads."""
        conv = self.affine(a)
        shape = () if conv is None else self.shapes[conv]
        if conv is None or (self.steps[-1].name == "linear" and len(shape) > 1):
            return None
        self.step("batch_norm", conv)
        return self.activation(len(self.steps))

    def shared(self, a: int) -> int | None:
        """An affine operation called once more, with another input."""
        shape = self.shapes[a]
        earlier = [
            k for k, step in enumerate(self.steps)
            if step.name in AFFINE and step.shares is None and self.shapes[step.reads[0]] == shape
        ]  # fmt: skip
        if not earlier:
            return None
        k = self.choose.of(earlier)
        return self.step(self.steps[k].name, a, shares=k)

    def write(self, kind: str) -> None:
        a = self.recent()
        if kind == "stem":
            self.affine(0)
        elif kind in ("shape", "constant", "pooling", "norm"):
            table = {"shape": SHAPES, "constant": ONE, "pooling": POOLING, "norm": NORMS}[kind]
            self.step(self.choose.of([name for name in table if name not in ("unseen", "reciprocal")]), a)
        elif kind == "combine":
            name = self.choose.of([n for n in COMBINING if n not in ("product", "quotient", "outer")])
            self.step(name, a, self.fitting(name, a))
        elif kind == "refused":
            name = self.choose.of(("outer", "unseen"))
            self.step(name, *((a,) if name == "unseen" else (a, self.fitting(name, a))))
        elif kind == "squash":
            self.step(self.choose.of(SQUASHING), a)
        else:
            getattr(self, kind)(a)

    def heads(self) -> None:
        """Output: linear layers behind the values that nothing has read yet."""
        read = {i for step in self.steps for i in step.reads}
        leaves = [i for i in range(len(self.shapes)) if i not in read][-3:]
        is_last = len(leaves) == 1 and any(step.name in AFFINE for step in self.steps)
        outputs = []
        for leaf in leaves:
            if len(self.shapes[leaf]) > 1:
                flat = self.choose.flag() and torch.Size(self.shapes[leaf]).numel() <= 30
                leaf = self.step("flatten", leaf) if flat else self.step("mean", leaf, keep=False)
            if leaf is not None and not (is_last and self.choose.integer(0, 3) == 3):
                leaf = self.step("linear", leaf, out=3)
            outputs.append(leaf)
        out = outputs[0]
        name = self.choose.of(("add", "cat"))
        for other in outputs[1:]:
            out = self.step(name, out, other)


class Roll:
    """Draws of a seeded generator of numbers, for programs without hypothesis."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def of(self, values: Sequence[Any]) -> Any:
        return self.random.choice(list(values))

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def flag(self) -> bool:
        return self.random.random() < 0.5


def single(name: str, spelling: str, seed: int, at_input: bool) -> Program | None:
    """Program around one step in one spelling, at the input or behind an affine operation; None if it does not fit."""
    operation, choose = OPERATIONS[name], Roll(seed)
    writer = Writer(choose, choose.of(INPUTS), seed)
    a = 0 if at_input else writer.affine(0)
    if a is None:
        return None
    b = writer.affine(a, like=True) if name in COMBINING else None
    if name == "quotient":
        b = writer.step("shift", writer.step("abs", b), c=0.5)
    if name == "reciprocal":
        a = writer.step("shift", writer.step("square", a), c=2.0)
    if name in ATTENTION:
        k = writer.attend(a)
    else:
        k = writer.step(name, *((a,) if name not in COMBINING else (b, a) if name == "cat" else (a, b)))
    if k is None:
        return None
    step, shapes = writer.steps[k - 1], [writer.shapes[i] for i in writer.steps[k - 1].reads]
    if spelling in operation.fits and not operation.fits[spelling](step.settings, shapes):
        return None
    writer.heads()
    program = writer.program
    for i, other in enumerate(program.steps):
        program = program.respelled(i, "module" if "module" in other.operation.modules else "plain")
    program = settled(program.respelled(k - 1, spelling))
    return program if program.steps[k - 1].spelling == spelling else None


class _First:
    """Takes the first of what there is to choose from."""

    def of(self, values: Sequence[Any]) -> Any:
        return values[0]

    def integer(self, low: int, high: int) -> int:
        return low

    def flag(self) -> bool:
        return False


#: What is written next, as often as it stands here.
KINDS = """
    affine affine affine activation activation activation shape shape shape constant constant combine combine residual
    residual gate gate attend stem pooling norm conv_norm shared quotient squash small
""".split()  # noqa: SIM905


@st.composite
def programs(draw: Callable[..., Any], plain: bool = False) -> Program:
    """Program with spellings; ``plain``: modules wherever there are any, and plain functions."""
    return written(Choose(draw), plain)


def written(choose: Choose | Roll, plain: bool = False) -> Program:
    """The same by any draws."""
    writer = Writer(choose, choose.of(INPUTS), choose.integer(0, 9999))
    if choose.integer(0, 3):
        writer.affine(0)
    for _ in range(choose.integer(1, 6)):
        writer.write("refused" if choose.integer(0, 99) == 99 else choose.of(KINDS))
    writer.heads()
    program = writer.program
    count = len(program.steps)
    for k, step in enumerate(program.steps):
        program = program.respelled(k, "module" if plain and "module" in step.operation.modules else "plain")
        if not plain:
            program = program.respelled(k, _spelling(choose, program, k))
    changes: dict[str, Any] = {"nonnegative": choose.flag(), "has_zeros": choose.integer(0, 5) == 5}
    if not plain:
        blocks = tuple(choose.integer(1, 4) for _ in range(choose.integer(0, 2))) if count > 2 else ()
        store = choose.of(("parameter", "buffer", "attribute"))
        changes |= {"is_reversed": choose.flag(), "blocks": blocks, "store": store}
    return settled(Program(program.shape, program.steps, program.shapes, program.seed, **changes))


def _spelling(choose: Choose | Roll, program: Program, k: int) -> str:
    step = program.steps[k]
    if step.shares is not None:
        return program.steps[step.shares].spelling
    operation, shapes = step.operation, [program.shapes[i] for i in step.reads]
    names = [*operation.modules, *operation.spellings]
    possible = [n for n in names if n not in operation.fits or operation.fits[n](step.settings, shapes)]
    return choose.of(["plain", *[n for n in possible if n == "module"] * 2, *possible])
