"""What one forward pass of a model did, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from crp.errors import NameNotFoundError
from crp.layers import LayerNotFoundError
from crp.layers.addresses import PROJECTIONS, Address, attention_around


class TensorKind(NamedTuple):
    """Shape and type of a tensor."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(eq=False)
class ModuleCall:
    """One call of one module.

    Attributes
    ----------
    layer : str
        Name in ``model.named_modules()``; ``""`` is the model itself.
    kind : type
        Type of the module.
    number : int
        Counts the calls of this module from 0.
    parent : ModuleCall or None
        The call inside which this one happened.
    is_leaf : bool
        Whether no other module was called inside.
    inputs, outputs : list of Node
        What came in and what was handed out, one node per tensor.
    given, returned : TensorKind or None
        The first tensor that the module was called with, and the one that its forward returned, if it was only one.
    input_changed, output_changed : bool
        Whether a hook replaced them, or wrote to them.
    """

    layer: str
    kind: type[nn.Module]
    number: int
    parent: ModuleCall | None = field(repr=False)
    is_leaf: bool = True
    inputs: list[Node] = field(default_factory=list, repr=False)
    outputs: list[Node] = field(default_factory=list, repr=False)
    given: TensorKind | None = field(default=None, repr=False)
    returned: TensorKind | None = field(default=None, repr=False)
    input_changed: bool = field(default=False, repr=False)
    output_changed: bool = field(default=False, repr=False)

    def within(self, other: ModuleCall) -> bool:
        """Whether this call is `other`, or happened inside it."""
        return any(call is other for call in self.around())

    def ran(self, reader: Reader) -> bool:
        """Whether a reader ran inside this call."""
        return reader.call is not None and reader.call.within(self)

    def around(self) -> Iterator[ModuleCall]:
        """Itself and the calls inside which it happened, the innermost first."""
        call: ModuleCall | None = self
        while call is not None:
            yield call
            call = call.parent


class Operand(NamedTuple):
    """A tensor in the place where a function read it.

    Attributes
    ----------
    node : Node or None
        What it was; None for a parameter, a buffer or another constant.
    parameter : str or None
        Its name, if it is a parameter of the model.
    """

    node: Node | None
    parameter: str | None

    @property
    def origins(self) -> frozenset[int]:
        """Numbers of the model's inputs on which it depends; none for a constant."""
        return frozenset() if self.node is None else self.node.origins


@dataclass(eq=False)
class FunctionCall:
    """One call of a function of torch.

    Attributes
    ----------
    function : callable
    name : str
        Plain name: `F.relu`, `torch.relu_` and `Tensor.relu` are all ``"relu"``.
    call : ModuleCall or None
        The innermost module call in which it ran.
    arguments : tuple
        `Operand` for each tensor; numbers, texts and sequences of these as they were; `Ellipsis` for anything else.
    keywords : dict
        The same.
    returned : TensorKind or None
        The result, if it was one tensor.
    outputs : list of Node
        What it made, and what it wrote to.
    """

    function: Callable[..., Any] = field(repr=False)
    name: str
    call: ModuleCall | None
    arguments: tuple[Any, ...] = field(repr=False)
    keywords: dict[str, Any] = field(repr=False)
    returned: TensorKind | None = field(repr=False)
    outputs: list[Node] = field(default_factory=list, repr=False)

    def ran(self, reader: Reader) -> bool:
        """Whether a reader is this call."""
        return reader.function is self

    @property
    def operands(self) -> list[Operand]:
        """All tensors among the arguments."""
        return list(_operands((*self.arguments, *self.keywords.values())))

    @property
    def inputs(self) -> list[Node]:
        """The operands that came from somewhere, each once."""
        return list(dict.fromkeys(operand.node for operand in self.operands if operand.node is not None))


def _operands(values: Collection[Any]) -> Iterator[Operand]:
    for value in values:
        if isinstance(value, Operand):
            yield value
        elif isinstance(value, tuple):
            yield from _operands(value)


class Reader(NamedTuple):
    """Who read a tensor: the function's name, the module call in which it ran, and the call itself."""

    operation: str
    call: ModuleCall | None
    function: FunctionCall | None = None

    def __str__(self) -> str:
        if self.call is None or not self.call.layer:
            return self.operation
        if self.call.is_leaf:
            return repr(self.call.layer)
        return f"{self.operation} in {self.call.layer!r}"


@dataclass(eq=False)
class Node:
    """What one tensor held between two changes.

    Attributes
    ----------
    kind : "input", "operation" or "output"
        Input of the model, made (or written) by an operation, or handed out by a module call.
    name : str
        Name of the operation or of the layer.
    call : ModuleCall or None
        The call in which the operation ran, or whose output this is.
    sources : list of Node
        What it was made from.
    readers : list of Reader
        Everything that read it.
    origins : frozenset of int
        Numbers of the model's inputs through which a gradient would go back, among all tensors that it is called with.
    function : FunctionCall or None
        The operation.
    maker : Node or None
        For an output: what it was inside the call. It shares its list of readers.
    """

    kind: Literal["input", "operation", "output"]
    name: str
    call: ModuleCall | None
    sources: list[Node] = field(repr=False)
    readers: list[Reader] = field(default_factory=list, repr=False)
    origins: frozenset[int] = frozenset()
    function: FunctionCall | None = field(default=None, repr=False)
    maker: Node | None = field(default=None, repr=False)

    def __str__(self) -> str:
        if self.kind == "input":
            return "the model's input"
        if self.kind == "output" and self.call is not None:
            return f"{self.name!r} ({self.call.kind.__name__})"
        return str(Reader(self.name, self.call))


@dataclass(eq=False)
class Trace:
    """Record of one forward pass; it holds neither tensors nor modules.

    Attributes
    ----------
    modules : dict of str to type
        Types of all modules of the model, called or not.
    calls : list of ModuleCall
        In the order in which they began: containers before what they contain.
    operations : list of FunctionCall
        Calls of functions of torch that made or changed a tensor, or read its values, in the order of execution.
    parameter_readers : dict of str to list of Reader
        Who read a parameter. The names of one that several modules hold have one list.
    """

    modules: dict[str, type[nn.Module]]
    calls: list[ModuleCall] = field(default_factory=list)
    operations: list[FunctionCall] = field(default_factory=list)
    parameter_readers: dict[str, list[Reader]] = field(default_factory=dict)

    def address(self, name: str, role: str = "layer") -> Address:
        """What the name of a layer means.

        Raises
        ------
        KeyError
            If the model has no such layer; the message gives the nearest names.
        """
        address = Address.of(name, self.modules)
        if address.layer not in self.modules:
            raise LayerNotFoundError(name, self.modules, role)
        return address

    def calls_of(self, layer: str) -> list[ModuleCall]:
        """All calls of one layer, the first one first.

        Raises
        ------
        KeyError
            If the model has no such layer; the message gives the nearest names.
        """
        if layer not in self.modules:
            raise LayerNotFoundError(layer, self.modules)
        return [call for call in self.calls if call.layer == layer]

    def upstream(self, layer: str, names: Collection[str]) -> list[str]:
        """Nearest layers among `names` from whose outputs the output of `layer` was made.

        Names are read as in `crp.layers.addresses`: that of a layer's input is a place of its own, next to the layer;
        ``"relu#1"`` is its second call alone.

        Returns
        -------
        list of str
            Without repetition, in the order of the inputs. Over all calls of `layer`: where a later call depends on an
            earlier one, `layer` feeds itself. For a container, its own inner layers are the nearest ones.

        Raises
        ------
        KeyError
            If the model has no such layer, or the forward pass did not call it.
        """
        name, is_input, number = self.address(layer)
        attention = attention_around(name, self.modules)
        calls = [call for call in self.calls_of(attention or name) if number in (None, call.number)]
        if not calls:
            raise NameNotFoundError(f"layer {layer!r} is in the model, but the forward pass did not call it")
        feeding: dict[str, None] = {}
        todo: list[Node] = []
        if attention is not None and not is_input:
            own = [_named_among(names, f"{name}.input", call) for call in calls]
            if any(own):
                return list(dict.fromkeys(place for place in own if place))
        for call in calls:
            if is_input or attention is not None:
                todo += call.inputs
            else:
                for output in call.outputs:
                    todo += self._below(output, names, feeding)
        todo.reverse()
        seen: set[int] = set()
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.kind == "output" and (found := self._named(node, names)) is not None:
                feeding[found] = None
            else:
                todo.extend(reversed(self._below(node, names, feeding)))
        return list(feeding)

    @staticmethod
    def _below(node: Node, names: Collection[str], feeding: dict[str, None]) -> list[Node]:
        """What a node was made from, without what came through the input of a layer in ``names``, which feeds it."""
        below = []
        for source in node.sources:
            calls = [] if node.call is None else node.call.around()
            entered = (_named_among(names, f"{call.layer}.input", call) for call in calls if source in call.inputs)
            place = next((place for place in entered if place), None)
            if place is None:
                below.append(source)
            else:
                feeding[place] = None
        return below

    def _named(self, node: Node, names: Collection[str]) -> str | None:
        """Name in ``names`` of what a module has put out; that of the output projection for attention, or its input."""
        layers = [f"{node.name}.{name}" for name in PROJECTIONS]
        layers = [layer for layer in layers if attention_around(layer, self.modules) is not None]
        inside = [place for layer in layers for place in (layer, f"{layer}.input")]
        return next((found for name in (node.name, *inside) if (found := _named_among(names, name, node.call))), None)


def _named_among(names: Collection[str], place: str, call: ModuleCall | None) -> str | None:
    """Name among ``names`` of a place of a layer in one of its calls: the place's, or that with the call's number."""
    numbered = place if call is None else f"{place}#{call.number}"
    return place if place in names else numbered if numbered in names else None
