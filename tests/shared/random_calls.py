"""Random calls of `CondAttribution`, right and wrong ones, with what they mean in the words of `matrix_nets`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import zennit.composites
from matrix_nets import PLANS, Masked, MatrixNet, Method, Planned, RowFlow, planned
from slow_rules import Rule
from torch import Tensor
from zennit.canonizers import SequentialMergeBatchNorm

from crp import composites
from crp.concepts import ChannelConcept

ZPLUS, EPSILON, FLAT = Rule("zplus"), Rule("epsilon"), Rule("flat")

#: Composites, and what they are to do.
METHODS: dict[str, tuple[Callable[[], Any], Method]] = {
    "none": (lambda: None, Method("gradient")),
    "plus": (composites.EpsilonPlus, Method("multiplier", ZPLUS, EPSILON, merges=True)),
    "flat": (composites.EpsilonPlusFlat, Method("multiplier", ZPLUS, EPSILON, FLAT, merges=True)),
    "alpha_beta": (
        composites.EpsilonAlpha2Beta1, Method("multiplier", Rule("alpha_beta"), EPSILON, merges=True)
    ),
    "gradient_x_input": (composites.GradientTimesInput, Method("multiplier")),
    "zennit plus": (
        lambda: zennit.composites.EpsilonPlus(canonizers=[SequentialMergeBatchNorm()]),
        Method("relevance", ZPLUS, EPSILON, merges=True),
    ),
    "zennit flat": (
        lambda: zennit.composites.EpsilonPlusFlat(canonizers=[SequentialMergeBatchNorm()]),
        Method("relevance", ZPLUS, EPSILON, FLAT, merges=True),
    ),
}  # fmt: skip
_MODELS: dict[tuple[str, int, torch.dtype], Planned] = {}
_NETS: dict[tuple[Any, ...], MatrixNet] = {}


@dataclass(frozen=True)
class Meant:
    """What a condition means: places in the flattened output, or None for all; and masks by layer's name, in order."""

    targets: list[int] | None
    masks: dict[str, Callable[[Tensor], Tensor]]


@dataclass
class Call:
    """A call as it is made, and what it means.

    Attributes
    ----------
    kind : "call", "generate", "absorbed" or "graph"
    arguments : dict
        Of the method; ``data``, ``conditions`` and ``composite`` among them.
    by_hand : bool
        Whether the composite is on the model, and not given.
    inputs : list of Tensor
        Data, in float64.
    meant : list of Meant
    initial : callable
        ``(row, output of the row's root) -> initial relevance`` before targets select some of it.
    warns : list of str
        What may be told.
    wrong : str or None
        What is wrong with it.
    """

    plan: str
    model_seed: int
    dtype: torch.dtype
    method: str
    kind: str
    arguments: dict[str, Any]
    by_hand: bool
    inputs: list[Tensor]
    meant: list[Meant]
    initial: Callable[[int, Tensor], Tensor]
    warns: list[str] = field(default_factory=list)
    wrong: str | None = None

    @property
    def model(self) -> Planned:
        key = (self.plan, self.model_seed, self.dtype)
        if key not in _MODELS:
            _MODELS[key] = planned(*key)
        return _MODELS[key]

    @property
    def misleads(self) -> str | None:
        """What must be told where results are wrong, as zennit's rules know one call of a layer only."""
        wrong = self.plan == "again" and self.method.startswith("zennit")
        return "relevance is wrong" if wrong else None

    @property
    def gives_all_to_each(self) -> bool:
        """Whether zennit's rules send relevance through a sum of two branches."""
        return self.method.startswith("zennit") and any(step.kind == "add" for step in PLANS[self.plan].steps)

    @property
    def composite(self) -> Any:
        return METHODS[self.method][0]()

    def context(self, composite: Any) -> Any:
        return composite.context(self.model) if self.by_hand else nullcontext()

    def net(self) -> MatrixNet:
        explain = self.arguments.get("explain")
        names = {"x": 0, "z": 1}
        explained = None if explain is None else tuple(names.get(one, one) for one in np.atleast_1d(explain).tolist())
        key = (self.plan, self.model_seed, self.dtype, self.method, explained)
        if key not in _NETS:
            _NETS[key] = MatrixNet(planned(*key[:3]), METHODS[self.method][1], explained)
        return _NETS[key]

    def pairs(self) -> list[tuple[int, Meant]]:
        """Sample and meaning of each row."""
        n = len(self.inputs[0])
        if n == len(self.meant):
            return list(enumerate(self.meant))
        return [(sample, meant) for sample in range(n) for meant in self.meant]

    def wanted(self) -> list[RowFlow]:
        """All rows by the reference."""
        names, net, start = PLANS[self.plan].names(), self.net(), self.arguments.get("start_layer")
        last = {name.partition("#")[0]: value for name, value in names.items()}
        recorded = [(names | last).get(name, names.get(name)) for name in self.arguments.get("record_layer", ())]
        rows = []
        for row, (sample, meant) in enumerate(self.pairs()):
            in_order = sorted(meant.masks, key=lambda name: name != start)
            masked = [Masked(names[name], meant.masks[name]) for name in in_order]
            records = dict.fromkeys([*recorded, *(one.value for one in masked), *([names[start]] if start else [])])
            rows.append(
                net.row(
                    [x[sample] for x in self.inputs], masked, [*records], names.get(start),
                    self._started(row, meant), self.arguments.get("exclude_parallel", True),
                )
            )  # fmt: skip
        return rows

    def _started(self, row: int, meant: Meant) -> Callable[[Tensor], Tensor]:
        def started(output: Tensor) -> Tensor:
            initial = self.initial(row, output).expand_as(output)
            if meant.targets is None or self.arguments.get("start_layer"):
                return initial
            kept = torch.zeros(output.numel(), dtype=torch.bool)
            kept[meant.targets] = True
            return torch.where(kept.reshape(output.shape), initial, 0.0)

        return started


# --- right calls ----------------------------------------------------------------------------------------------------


def _form_of_ids(draw: random.Random, ids: list[int], size: int) -> Any:
    """Some way to write ids."""
    ids = [i - size if draw.random() < 0.2 else i for i in ids]
    forms: list[Callable[[], Any]] = [
        lambda: list(ids), lambda: tuple(ids), lambda: set(ids), lambda: np.array(ids, dtype=np.int64),
        lambda: torch.tensor(ids, dtype=torch.int64), lambda: torch.tensor(ids, dtype=torch.int32),
        lambda: [np.int64(i) for i in ids], lambda: [torch.tensor(i) for i in ids],
    ]  # fmt: skip
    if len(ids) == 1:
        one = ids[0]
        forms += [lambda: one, lambda: np.int32(one), lambda: torch.tensor(one), lambda: range(one, one + 1)]
    return draw.choice(forms)()


def _form_of_targets(draw: random.Random, targets: list[int], shape: tuple[int, ...]) -> tuple[Any, list[int]]:
    """Some way to write targets, which are classes; and their places in the flattened output."""
    size, n_places = shape[0], int(np.prod(shape[1:]))
    if len(shape) > 1 and draw.random() < 0.4:
        elements = [(draw.choice([c, c - size]), *(draw.randrange(n) for n in shape[1:])) for c in targets]
        places = [int(np.ravel_multi_index((e[0] % size, *e[1:]), shape)) for e in elements]
        return elements, places
    places = [c * n_places + i for c in targets for i in range(n_places)]
    if draw.random() < 0.2:
        mask = [c in targets for c in range(size)]
        return draw.choice([list, np.array, torch.tensor])(mask), places
    if draw.random() < 0.1:
        return [[c] for c in targets], places
    given = _form_of_ids(draw, targets, size)
    return (list(given) if isinstance(given, set | range) else given), places


class HalfMask:
    """A user's own mask: concepts count half, and others not at all."""

    def __call__(self, row: int, ids: Any, layer: str) -> Callable[[Tensor], Tensor]:
        def function(gradient: Tensor) -> Tensor:
            masked = gradient.clone()
            masked[row] = 0
            for i in np.atleast_1d(ids).tolist():
                masked[row, i] = gradient[row, i] / 2
            return masked

        return function


def keeping(ids: Sequence[int], factor: float = 1.0) -> Callable[[Tensor], Tensor]:
    """What a mask means, on the flow of one row of shape (channels, *space)."""

    def function(flow: Tensor) -> Tensor:
        kept = torch.zeros_like(flow)
        for i in ids:
            kept[i] = flow[i] * factor
        return kept

    return function


def keeping_positions(places: Mapping[int, Sequence[int]]) -> Callable[[Tensor], Tensor]:
    def function(flow: Tensor) -> Tensor:
        flat = flow.reshape(len(flow), -1)
        kept = torch.zeros_like(flat)
        for channel, positions in places.items():
            for position in positions:
                kept[channel, position] = flat[channel, position]
        return kept.reshape(flow.shape)

    return function


class Drawing:
    """Draws one call."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def some(self, items: Sequence[Any], most: int) -> list[Any]:
        return self.draw.sample(list(items), min(len(items), self.draw.randint(0, most)))

    def call(self) -> Call:
        draw = self.draw
        plan = draw.choice(list(PLANS))
        method = draw.choice([*METHODS])
        dtype = draw.choice([torch.float64] * 6 + [torch.float32, torch.bfloat16])
        seed, kind = draw.randrange(3), draw.choice(["call", "call", "generate", "absorbed"])
        if kind == "absorbed" and METHODS[method][1].flow != "multiplier":
            kind = "generate"
        call = Call(plan, seed, dtype, method, kind, {}, False, [], [], lambda row, y: y)
        call.inputs = [
            torch.randn(draw.randint(1, 3), *PLANS[plan].inputs[0], dtype=torch.float64, generator=self.generator)
        ]
        for shape in PLANS[plan].inputs[1:]:
            call.inputs.append(torch.randn(len(call.inputs[0]), *shape, dtype=torch.float64, generator=self.generator))
        self._data(call)
        call.by_hand = method in ("plus", "flat", "alpha_beta", "gradient_x_input") and draw.random() < 0.15
        self._conditions(call)
        self._rest(call)
        return call

    def _data(self, call: Call) -> None:
        draw = self.draw
        data: list[Any] = [x.to(call.dtype) for x in call.inputs]
        call.inputs = [x.double() for x in data]
        if draw.random() < 0.2:
            data = [x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 2 else x for x in data]
        if draw.random() < 0.2 and call.kind == "call":
            data = [x.requires_grad_() for x in data]
        forms: list[Any] = [tuple(data), dict(zip("xz", data, strict=False))]
        # (a list holds the samples)
        forms += [list(data[0].detach())] if len(data) == 1 else []
        call.arguments["data"] = data[0] if len(data) == 1 and draw.random() < 0.8 else draw.choice(forms)
        if len(data) == 2 and draw.random() < 0.4:
            named = isinstance(call.arguments["data"], dict)
            call.arguments["explain"] = draw.choice(["x", "z", ["z", "x"]] if named else [0, 1, [1], (0, 1)])

    def _conditions(self, call: Call) -> None:
        """Conditions, masks, and where relevance starts."""
        draw, names = self.draw, PLANS[call.plan].names()
        net, single = call.net(), [*names]
        start = draw.choice(single) if draw.random() < 0.2 else None
        if start is not None and names[start] not in net.depending:
            start = None
        shape = net.shapes[names[start] if start else -1]
        own = draw.random() < 0.25
        kinds = {name: draw.choice(["channel", "half", "positions"] if own else ["channel"]) for name in names}
        through = draw.random() < 0.6
        call.arguments |= {"exclude_parallel": through} if not through or draw.random() < 0.3 else {}
        call.arguments |= {"start_layer": start} if start else {}
        has_init, given = draw.random() < 0.3, []
        for _ in range(draw.randint(1, 4)):
            condition: dict[str, Any] = {}
            layers = sorted(self.some(single, 2), key=lambda name: -names[name])
            if draw.random() < 0.1:
                draw.shuffle(layers)
            targets = None
            if (start is None and (not has_init or draw.random() < 0.7)) or (start and draw.random() < 0.05):
                classes = draw.sample(range(net.shapes[-1][0]), draw.randint(1, 2))
                condition["y"], targets = _form_of_targets(draw, classes, net.shapes[-1])
                call.warns += ["has no effect in conditions"] if start else []
            masks = {}
            for name in layers:
                condition[name], masks[name] = self._mask(kinds[name], net.shapes[names[name]])
            given.append(condition)
            call.meant.append(Meant(targets, masks))
        call.arguments["conditions"] = given if draw.random() < 0.9 else tuple(given)
        if own:
            factories = {"channel": ChannelConcept.mask, "half": HalfMask(), "positions": ChannelConcept.mask_rf}
            call.arguments["mask_map"] = {name: factories[kind] for name, kind in kinds.items()}
        elif draw.random() < 0.1:
            call.arguments["mask_map"] = draw.choice([ChannelConcept().mask, lambda *a: ChannelConcept.mask(*a)])
        if has_init:
            self._initial(call, shape)

    def _mask(self, kind: str, shape: tuple[int, ...]) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """Ids of a layer's condition, and what they mean."""
        draw = self.draw
        ids = draw.sample(range(shape[0]), draw.randint(0, min(3, shape[0])))
        if kind == "positions":
            n = int(np.prod(shape[1:]))
            places = {i: [draw.randrange(n) for _ in range(draw.randint(1, 2))] for i in ids}
            return places, keeping_positions(places)
        if kind == "half":
            return [int(i) for i in ids], keeping(ids, 0.5)
        nothing = [[], (), torch.tensor([], dtype=torch.int64)]
        return _form_of_ids(draw, ids, shape[0]) if ids else draw.choice(nothing), keeping(ids)

    def _initial(self, call: Call, shape: tuple[int, ...]) -> None:
        draw, n_rows = self.draw, len(call.pairs())
        number = draw.choice([1, 0.5, -2, np.float64(1.5), 0])
        forms: list[tuple[Any, Callable[[int, Tensor], Tensor]]] = [
            (number, lambda row, y: torch.full_like(y, float(number))),
            (lambda output: output**2, lambda row, y: y**2),
            (lambda output: 2.0, lambda row, y: torch.full_like(y, 2.0)),
        ]
        of_row = torch.randn(n_rows, *shape, dtype=torch.float64, generator=self.generator)
        for tensor in (of_row, of_row[:1], of_row[0], of_row[:1, :1], torch.tensor(0.7, dtype=torch.float64)):
            whole = tensor.expand(n_rows, *shape)
            if tensor.dim() <= 1 or tensor.dim() == len(shape) or len(tensor) in (1, n_rows):
                forms.append((tensor, lambda row, y, whole=whole: whole[row]))
        call.arguments["init_rel"], call.initial = draw.choice(forms)

    def _rest(self, call: Call) -> None:
        draw, names = self.draw, PLANS[call.plan].names()
        if call.kind != "absorbed":
            record = self.some([*names, *{name.partition("#")[0] for name in names}], 3)
            call.arguments["record_layer"] = draw.choice([list, tuple])(record)
            counts = {name: sum(one.startswith(f"{name}#") for one in names) for name in record}
            call.warns += [f"layer {name!r} is called" for name in record if counts[name] > 1]
            if draw.random() < 0.2:
                call.arguments["on_device"] = draw.choice(["cpu", torch.device("cpu")])
        if call.kind == "generate":
            call.arguments |= {"batch_size": draw.choice([1, 2, 3, np.int64(2), 10]), "verbose": False}
            init = call.arguments.get("init_rel")
            if isinstance(init, Tensor) and init.dim() and 1 < len(init) == call.arguments["batch_size"]:
                call.arguments["batch_size"] = 10
