"""Where every tensor of one forward pass came from.

`trace` runs a model once and follows every tensor: module calls are seen by hooks, everything between them (``+``,
`torch.cat`, slices, in-place operations, functional layers) by a `torch.overrides.TorchFunctionMode`. `crp.graph` asks
questions of the record.

What runs inside one function of torch (all of `multi_head_attention_forward`) is one operation. Operations that torch
does not show to Python (the C++ part of a custom `autograd.Function`, a round trip through numpy) lose the trail; the
output of the module around them then counts as made from all of that module's inputs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crp.layers import LayerNotFoundError, uncompiled, unwrap

#: Functions that look at a tensor without reading its values.
_METADATA = frozenset(
    """__get__ __len__ data_ptr dim element_size get_device has_names is_complex is_contiguous is_conj is_floating_point
    is_inference is_neg is_pinned is_same_size is_signed ndimension nelement numel result_type size storage_offset
    stride untyped_storage""".split()  # noqa: SIM905
)


@dataclass(eq=False)
class Call:
    """One call of one module.

    Attributes
    ----------
    layer : str
        Name in ``model.named_modules()``; ``""`` is the model itself.
    module : nn.Module
    number : int
        Counts the calls of this module from 0.
    parent : Call or None
        The call inside which this one happened.
    is_leaf : bool
        Whether no other module was called inside.
    inputs, outputs : list of Node
        What came in and what was handed out, one node per tensor.
    """

    layer: str
    module: nn.Module = field(repr=False)
    number: int
    parent: Call | None = field(repr=False)
    is_leaf: bool = True
    inputs: list[Node] = field(default_factory=list, repr=False)
    outputs: list[Node] = field(default_factory=list, repr=False)

    def within(self, other: Call) -> bool:
        """Whether this call is `other`, or happened inside it."""
        call: Call | None = self
        while call is not None and call is not other:
            call = call.parent
        return call is other


class Reader(NamedTuple):
    """Who read a tensor: an operation, and the module call in which it ran."""

    operation: str
    call: Call | None

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
    call : Call or None
        The call in which the operation ran, or whose output this is.
    sources : list of Node
        What it was made from.
    readers : list of Reader
        Everything that read it.
    is_passed_on : bool
        Whether this is the output of a container, made inside by ``sources[0]``, whose list of readers it shares.
    """

    kind: Literal["input", "operation", "output"]
    name: str
    call: Call | None
    sources: list[Node] = field(repr=False)
    readers: list[Reader] = field(default_factory=list, repr=False)
    is_passed_on: bool = False

    def __str__(self) -> str:
        if self.kind == "input":
            return "the model's input"
        if self.kind == "output" and self.call is not None:
            return f"{self.name!r} ({type(self.call.module).__name__})"
        return str(Reader(self.name, self.call))


@dataclass(eq=False)
class Trace:
    """Record of one forward pass; it holds modules, but no tensors.

    Attributes
    ----------
    modules : dict of str to nn.Module
        All modules of the model, called or not.
    calls : list of Call
        In the order in which they began: containers before what they contain.
    parameter_readers : dict of int to list of Reader
        Who read a parameter, by the parameter's `id`.
    """

    modules: dict[str, nn.Module]
    calls: list[Call] = field(default_factory=list)
    parameter_readers: dict[int, list[Reader]] = field(default_factory=dict)

    def calls_of(self, layer: str) -> list[Call]:
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
        calls = self.calls_of(layer)
        if not calls:
            raise KeyError(f"layer {layer!r} is in the model, but the forward pass did not call it")
        todo = [node for call in calls for output in call.outputs for node in output.sources]
        todo.reverse()
        found: dict[str, None] = {}
        seen: set[int] = set()
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.kind == "output" and node.name in names:
                found[node.name] = None
            else:
                todo.extend(reversed(node.sources))
        return list(found)


_active: ContextVar[_Recorder | None] = ContextVar("crp_trace", default=None)


def tracing() -> bool:
    """Whether a `trace` is running here; hooks that change values stay inert meanwhile."""
    return _active.get() is not None


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> Trace:
    """Run the model once and record which module calls and operations made which tensor.

    Runs without gradients, and in the mode (training or evaluation) in which the model is. Afterwards, also after an
    exception, the model is as before (hooks, flags, buffers); so are the random generators and the tensors given.

    Parameters
    ----------
    model : nn.Module
        Wrappers of `torch.compile` and `DataParallel` are looked through.
    *args, **kwargs
        What the model is called with.

    Returns
    -------
    Trace
    """
    model = unwrap(model)
    recorder = _Recorder(model)
    token = _active.set(recorder)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(uncompiled(model))
            stack.enter_context(_undisturbed(model))
            given = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
            named = {key: arg.clone() if isinstance(arg, Tensor) else arg for key, arg in kwargs.items()}
            for tensor in _tensors((given, named)):
                recorder.keep(tensor, Node("input", "input", None, []))
            stack.enter_context(recorder.hooks())
            stack.enter_context(recorder)
            model(*given, **named)
    finally:
        _active.reset(token)
    return recorder.trace


class _Recorder(TorchFunctionMode):
    """Follows tensors from operation to operation, and from module to module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace(dict(model.named_modules()))
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._stack: list[Call] = []
        # A tensor is known by its id, as long as the reference beside it is alive. Its version tells whether it was
        # written through another view since; by whom, `_writes` tells (by storage).
        self._nodes: dict[int, tuple[weakref.ref[Tensor], Node, int | None]] = {}
        self._writes: dict[int, Node] = {}

    def keep(self, tensor: Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = (weakref.ref(tensor), node, _version(tensor))

    def find(self, tensor: Tensor) -> Node | None:
        if (entry := self._nodes.get(id(tensor))) is None or entry[0]() is not tensor:
            return None
        _, node, version = entry
        return node if version == _version(tensor) else self._writes.get(_storage(tensor), node)

    def find_all(self, tensors: Iterable[Tensor]) -> list[Node]:
        nodes = {id(node): node for tensor in tensors if (node := self.find(tensor)) is not None}
        return list(nodes.values())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = list(_tensors((args, kwargs or {})))
        sources, versions = self.find_all(given), [_version(tensor) for tensor in given]
        result = func(*args, **(kwargs or {}))
        made = list(_tensors(result))
        name = getattr(func, "__name__", str(func))
        if not made and name in _METADATA:
            return result
        written = [t for t, version in zip(given, versions, strict=True) if version != _version(t)]
        if name == "__set__" and len(given) > 1:  # x.data = y
            written.append(given[0])
        new = [tensor for tensor in made if not any(tensor is other for other in given)]
        if made and not new and not written:  # handed back as it was: contiguous(), dropout in evaluation
            return result

        call = self._stack[-1] if self._stack else None
        reader = Reader(_operation(func, name), call)
        for node in sources:
            node.readers.append(reader)
        for tensor in given:
            if id(tensor) in self._parameters:
                self.trace.parameter_readers.setdefault(id(tensor), []).append(reader)
        for tensor in written:
            node = self._writes[_storage(tensor)] = Node("operation", reader.operation, call, sources)
            self.keep(tensor, node)
        for tensor in new:
            self.keep(tensor, Node("operation", reader.operation, call, sources))
        return result

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks on all modules, outermost, so that what others' hooks do counts as done by the module."""
        counts: dict[str, int] = {}

        def enter(layer: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            if _active.get() is not self:  # another thread uses the model
                return
            parent = self._stack[-1] if self._stack else None
            if parent is not None:
                parent.is_leaf = False
            number = counts.get(layer, 0)
            counts[layer] = number + 1
            call = Call(layer, module, number, parent, inputs=self.find_all(_tensors((args, kwargs))))
            self.trace.calls.append(call)
            self._stack.append(call)

        def leave(layer: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if _active.get() is not self:
                return None
            while self._stack[-1].layer != layer:  # a call that the model left by an exception, and caught
                self._stack.pop()
            output = self._hand_out(self._stack[-1], output)
            self._stack.pop()
            return output

        with contextlib.ExitStack() as stack:
            for layer, module in self.trace.modules.items():
                first = module.register_forward_pre_hook(partial(enter, layer), prepend=True, with_kwargs=True)
                stack.callback(first.remove)
                last = module.register_forward_hook(partial(leave, layer), with_kwargs=True)
                stack.callback(last.remove)
            yield

    def _hand_out(self, call: Call, output: Any) -> Any:
        """Record the outputs of a call that ends; returns what the module shall return."""
        if isinstance(output, Tensor) and self.find(output) in call.inputs:
            # The input itself: identity, dropout in evaluation. An alias tells its readers from those of the input.
            output = output.detach()
        for tensor in _tensors(output):
            maker = self.find(tensor)
            if maker is not None and maker in call.inputs:
                continue
            if call.parent is None and maker is not None:
                maker.readers.append(Reader("the model's output", None))
            if call.is_leaf or maker is None:
                node = Node("output", call.layer, call, call.inputs)
            else:
                node = Node("output", call.layer, call, [maker], maker.readers, is_passed_on=True)
            call.outputs.append(node)
            self.keep(tensor, node)
        return output


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested sequences, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _tensors(getattr(value, entry.name))


def _version(tensor: Tensor) -> int | None:
    """Count of in-place changes, shared by all views; None where torch keeps no count."""
    return None if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return id(tensor)


def _operation(func: Callable[..., Any], name: str) -> str:
    """Plain name of a function of torch: ``__iadd__`` is add, ``relu.default`` relu, and the getter of ``x.T`` T."""
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", "attribute")
    return name.split(".")[0].strip("_")


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers and the random number generators back."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {tensor.device.index for tensor in model.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(sorted(devices)):
        try:
            yield
        finally:
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, saved):  # batch norm does not count its changes as versions
                    buffer.copy_(saved)
