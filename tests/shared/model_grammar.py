"""Random small models: a program of a few steps, and modules that execute it in one spelling or another.

A step reads earlier values (0 is the model's input) and makes one; `Operation.plain` says what it means. `GrammarNet`
runs the steps as modules, functions, methods, operators or in place, some of them inside nested modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from grammar_affine import AFFINE, Operation, Settings, Weights, effective
from grammar_attention import ATTENTION
from grammar_shapes import ONE, SHAPES
from grammar_steps import ACTIVATIONS, COMBINING, NORMS, POOLING
from torch import Tensor, nn

OPERATIONS: dict[str, Operation] = {
    **AFFINE, **ACTIVATIONS, **POOLING, **NORMS, **COMBINING, **ATTENTION, **ONE, **SHAPES
}  # fmt: skip
#: Steps whose result is squashed (between 0 and 1, or scaled) if all that they read is.
SQUASH_KEEPING = frozenset(
    "scale complement slice chunk swap flatten unflatten unsqueeze flip roll upsample same cat stack".split()  # noqa: SIM905
)

#: The same of steps whose result lies between what they read, but for a scale.
BETWEEN = SQUASH_KEEPING | frozenset("max_pool avg_pool mean amax max sum maximum add sub".split())  # noqa: SIM905


@dataclass(frozen=True)
class Step:
    """One operation of a program.

    Attributes
    ----------
    name : str
        Of `OPERATIONS`.
    reads : tuple of int
        Values that it reads; 0 is the input, k + 1 what step k gives.
    settings : dict
    spelling : str
        ``"plain"``, or one of the operation's spellings or modules.
    shares : int or None
        Earlier step whose weights this one uses.
    """

    name: str
    reads: tuple[int, ...]
    settings: Settings = field(default_factory=dict)
    spelling: str = "plain"
    shares: int | None = None

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.name]

    @property
    def is_module(self) -> bool:
        return self.spelling in self.operation.modules


@dataclass(frozen=True)
class Program:
    """Steps, of which the last gives the output (batch, classes).

    Attributes
    ----------
    shape : tuple of int
        Of the input, without batch.
    shapes : tuple of tuple of int
        Of all values.
    seed : int
        Of weights and data.
    nonnegative, has_zeros : bool
        Whether data are not negative; whether some of them, and some weights, are exactly 0.
    is_reversed : bool
        Whether modules are registered in reverse order.
    blocks : tuple of int
        Numbers of steps that nested modules execute; the rest stands in the model's own forward.
    store : "parameter", "buffer" or "attribute"
        Where weights are that no module holds.
    """

    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    shapes: tuple[tuple[int, ...], ...]
    seed: int = 0
    nonnegative: bool = False
    has_zeros: bool = False
    is_reversed: bool = False
    blocks: tuple[int, ...] = ()
    store: str = "parameter"

    def data(self, batch: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        x = torch.randn(batch, *self.shape, dtype=torch.float64, generator=generator)
        x = x.abs() if self.nonnegative else x
        return x * (torch.rand(x.shape, generator=generator) < 0.7) if self.has_zeros else x

    def stored(self, k: int) -> Weights:
        """Weights of a step as they are stored."""
        step = self.steps[k]
        if step.shares is not None:
            return self.stored(step.shares)
        generator = torch.Generator().manual_seed(1000 * self.seed + k)
        shapes = step.operation.weights(step.settings, *(self.shapes[i] for i in step.reads))
        weights = {name: _weight(name, shape, generator) for name, shape in shapes.items()}
        if self.has_zeros and step.name in AFFINE and step.settings["form"] == "plain":
            weights["weight"] = weights["weight"] * (torch.rand(weights["weight"].shape, generator=generator) < 0.7)
        return weights

    def weights(self, k: int) -> Weights:
        """Weights of a step as they are used."""
        return formed(self.steps[k].settings, self.stored(k))

    def plain(self, k: int, *inputs: Tensor) -> Tensor:
        """What a step means."""
        return self.steps[k].operation.plain(self.steps[k].settings, self.weights(k), *inputs)

    def block(self, k: int) -> int:
        """Number of the module that executes a step."""
        ends = [sum(self.blocks[: i + 1]) for i in range(len(self.blocks))]
        return sum(end <= k for end in ends)

    def layer(self, k: int) -> tuple[int, int]:
        """What calls have in common whose weight is, or is computed from, the same stored one."""
        step = self.steps[k]
        owner = k if step.shares is None else step.shares
        return owner, -1 if step.is_module else self.block(k)

    def respelled(self, k: int, spelling: str) -> Program:
        steps = [replace(step, spelling=spelling) if i == k else step for i, step in enumerate(self.steps)]
        return replace(self, steps=tuple(steps))

    def __str__(self) -> str:
        lines = [
            f"input {self.shape} seed={self.seed} {self.blocks=} {self.is_reversed=} {self.store}"
            f" {self.nonnegative=} {self.has_zeros=}"
        ]
        for k, step in enumerate(self.steps):
            shared = "" if step.shares is None else f" weights of {step.shares + 1}"
            lines.append(
                f"{k + 1} = {step.name}{step.reads} [{step.spelling}] {step.settings} -> {self.shapes[k + 1]}{shared}"
            )
        return "\n".join(lines)


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    if name == "running_var":
        return values.abs() + 0.3
    if name == "scale" or (name == "weight" and len(shape) == 1):
        return values.sign() * (values.abs() + 0.4)
    return values * (values[0].numel() ** -0.5 if len(shape) > 1 else 0.4)


def formed(settings: Settings, stored: Weights) -> Weights:
    form = settings.get("form", "plain")
    return stored if form == "plain" else {**stored, "weight": effective(form, stored["weight"])}


def squashed(program: Program) -> list[bool | None]:
    """Whether each value comes from a sigmoid by steps that keep it so; None where that is not for us to say."""
    known: list[bool | None] = [False]
    made = gating(program)
    for step in program.steps:
        read = [known[i] for i in step.reads]
        rule = step.operation.rule
        if step.name in ("reciprocal", "quotient") and any(made[i] is not False for i in step.reads):
            known.append(None)
        elif step.name in ("complement", "shift") and made[step.reads[0]] and not read[0]:
            known.append(None)  # (such as one less tanh, which is a gate)
        elif rule == "squash" or (step.name in BETWEEN and all(read)):
            known.append(True)
        elif rule in ("dense", "convolution", "batch_norm", "norm") or not any(r is not False for r in read):
            known.append(False)
        else:
            known.append(None)
    return known


def gating(program: Program) -> list[bool | None]:
    """Whether numbers that are added to a value are part of it; None where that is not for us to say."""
    known: list[bool | None] = [False]
    for step in program.steps:
        read = [known[i] for i in step.reads]
        if step.name == "quotient":  # (one by its own absolute value is bounded)
            known.append(None)
        elif step.name in ("sigmoid", "hardsigmoid", "tanh", "softsign", "exp", "elu") or (
            step.name in SQUASH_KEEPING | {"shift"} and all(read)
        ):
            known.append(True)
        elif step.operation.rule in ("dense", "convolution", "batch_norm", "norm") or not any(
            r is not False for r in read
        ):
            known.append(False)
        else:
            known.append(None)
    return known


def dividing(program: Program) -> list[bool | None]:
    """Whether each value is one over something by steps that keep it so; None where that is not for us to say."""
    known: list[bool | None] = [False]
    made = gating(program)
    for step in program.steps:
        read = [known[i] for i in step.reads]
        if (step.name == "reciprocal" and made[step.reads[0]] is False) or (step.name in SQUASH_KEEPING and all(read)):
            known.append(True)
        elif step.operation.rule in ("dense", "convolution", "batch_norm", "norm") or not any(
            r is not False for r in read
        ):
            known.append(None if step.name in ("reciprocal", "quotient") else False)
        else:
            known.append(None)
    return known


#: Steps of which every entry of the result is made of the entries at the same place.
_ENTRY_BY_ENTRY = (frozenset(ACTIVATIONS) - {"normalize"}) | frozenset(
    "scale layer_scale shift add_bias complement negative reciprocal mask same add sub maximum product quotient".split()  # noqa: SIM905
)


def origins(program: Program) -> list[set[int]]:
    """Values that each value is, or is made of entry by entry."""
    known = [{0}]
    for k, step in enumerate(program.steps):
        is_entrywise = step.name in _ENTRY_BY_ENTRY
        known.append({k + 1} | (set.intersection(*(known[i] for i in step.reads)) if is_entrywise else set()))
    return known


#: Spellings of activations that are no call of an activation.
_BY_HAND = frozenset({"mask", "where", "maximum", "product", "written"})


def activated(program: Program) -> list[bool | None]:
    """Whether each value comes from an activation by steps that keep it so; None where that is not for us to say."""
    known: list[bool | None] = [False]
    for step in program.steps:
        read = [known[i] for i in step.reads]
        rule, name = step.operation.rule, step.name
        if name in ("relu_part", "silu_part"):
            known.append(False if step.settings["start"] else None)
        elif rule == "squash" or (rule == "pass" and name not in ("abs", "square", "normalize")):
            known.append(True if step.is_module or step.spelling not in _BY_HAND else None)
        elif name in SQUASH_KEEPING - {"complement"} and all(read):
            known.append(True)
        elif rule in ("dense", "convolution", "batch_norm", "norm") or not any(r is not False for r in read):
            known.append(False)
        else:
            known.append(None)
    return known


def merged(program: Program) -> dict[int, int]:
    """Batch norm by the step of the module whose output it alone reads, and which is called once."""
    found = {}
    for k, step in enumerate(program.steps):
        readers = [i for i, other in enumerate(program.steps) if k + 1 in other.reads]
        is_plain = step.is_module and step.settings.get("form") == "plain" and step.spelling != "sized"
        once = step.shares is None and not any(other.shares == k for other in program.steps)
        dims = 1 if step.name == "linear" else len(program.shapes[k + 1])
        if is_plain and once and len(readers) == 1 and len(program.shapes[k + 1]) == dims:
            norm = program.steps[readers[0]]
            if norm.name == "batch_norm" and norm.is_module:
                found[k] = readers[0]
    return found


# --- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Executes some steps of a program: reads the values so far, and returns them with its own.

    Attributes
    ----------
    record : list of Tensor or None
        Takes every value as it was made, before anything overwrites it.
    """

    record: list[Tensor] | None = None

    def __init__(self, program: Program, steps: Sequence[int], made: dict[int, nn.Module]) -> None:
        super().__init__()
        self.program, self.numbers = program, list(steps)
        for k in reversed(self.numbers) if program.is_reversed else self.numbers:
            step = program.steps[k]
            owner = k if step.shares is None else step.shares
            if step.is_module:
                if owner not in made:
                    made[owner] = step.operation.modules[step.spelling](step.settings, program.stored(k)).eval()
                self.add_module(f"step{owner}", made[owner])
            else:
                for name, weight in program.stored(k).items():
                    self._keep(f"{name}{owner}", weight)

    def _keep(self, name: str, weight: Tensor) -> None:
        if self.program.store == "parameter" and not name.startswith("running"):
            setattr(self, name, nn.Parameter(weight))
        elif self.program.store != "attribute":
            self.register_buffer(name, weight)
        else:
            setattr(self, name, weight)

    def forward(self, *values: Tensor) -> list[Tensor]:
        known = list(values)
        for k in self.numbers:
            known.append(self._made(k, [known[i] for i in self.program.steps[k].reads]))
            if self.record is not None:
                self.record.append(known[-1].detach().clone())
        return known

    def _made(self, k: int, inputs: list[Tensor]) -> Tensor:
        step = self.program.steps[k]
        owner = k if step.shares is None else step.shares
        if step.is_module:
            return getattr(self, f"step{owner}")(*inputs)
        stored = {name: getattr(self, f"{name}{owner}") for name in self.program.stored(k)}
        function = step.operation.spellings.get(step.spelling, step.operation.plain)
        return function(step.settings, formed(step.settings, stored), *inputs)


class GrammarNet(nn.Module):
    """A program as a model."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        made: dict[int, nn.Module] = {}
        parts, k = [], 0
        for size in program.blocks:
            parts.append(range(k, min(k + size, len(program.steps))))
            k = min(k + size, len(program.steps))
        rest = Block(program, range(k, len(program.steps)), made)
        blocks = [Block(program, part, made) for part in parts]
        self.count = len(blocks)
        if program.is_reversed:
            self.rest = rest
        for i, block in enumerate(blocks):
            self.add_module(f"block{i}", block)
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for i in range(self.count):
            values = getattr(self, f"block{i}")(*values)
        return self.rest(*values)[-1]


def settled(program: Program) -> Program:
    """Program in which nothing is overwritten that is read later, and whose gradient torch can compute."""
    wanted = _results(_without_overwriting(program))
    for k, step in enumerate(program.steps):
        if step.spelling.endswith("_"):
            later = [i for i, other in enumerate(program.steps) if i > k and other.spelling.endswith("_")]
            candidate = program
            for i in later:
                candidate = candidate.respelled(i, "plain")
            try:
                found = _results(candidate)
                same = all(torch.allclose(a, b, 1e-9, 1e-12) for a, b in zip(found, wanted, strict=True))
            except RuntimeError:
                same = False
            # (weights that sum up to zero do not see a number that is added)
            if not same or any(step.reads[0] in other.reads for other in program.steps[k + 1 :]):
                program = program.respelled(k, "plain")
    return program


def _without_overwriting(program: Program) -> Program:
    for k, step in enumerate(program.steps):
        if step.spelling.endswith("_"):
            program = program.respelled(k, "plain")
    return program


def _results(program: Program) -> list[Tensor]:
    """Gradient, and all values as they were made."""
    model, record = GrammarNet(program).requires_grad_(False), []
    for module in model.children():
        module.record = record
    data = program.data().requires_grad_()
    output = model(data.clone())
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [*torch.autograd.grad((output * weights).sum(), data), *record]
