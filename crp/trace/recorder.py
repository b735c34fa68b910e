"""Recording one forward pass of a model."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdRef

from crp.layers import running_trace, uncompiled, unwrap
from crp.layers.interrupts import atomic
from crp.layers.nested import changed, tensors_in
from crp.layers.state import Snapshot, undisturbed, version_of
from crp.trace.record import FunctionCall, ModuleCall, Node, Operand, Reader, TensorKind, Trace

#: Functions that look at a tensor without reading its values.
_METADATA = frozenset(
    """__get__ __len__ data_ptr dim element_size get_device has_names is_complex is_contiguous is_conj is_floating_point
    is_inference is_neg is_pinned is_same_size is_signed ndimension nelement numel result_type size storage_offset
    stride untyped_storage""".split()  # noqa: SIM905
)
#: Functions that neither write to a parameter nor hand out a view of it; large ones go into these.
_READING = frozenset(
    """addmm bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d einsum gru linear lstm matmul
    mm multi_head_attention_forward""".split()  # noqa: SIM905
)
#: Functions whose result does not depend on the values of their operands, or not differentiably.
_CONSTANT = frozenset(
    """data detach empty_like full_like new_empty new_empty_strided new_full new_ones new_tensor new_zeros ones_like
    rand_like randint_like randn_like zeros_like""".split()  # noqa: SIM905
)
#: Functions that wait for a gradient, which does not come.
_WAITING = frozenset({"register_hook", "register_post_accumulate_grad_hook", "retain_grad"})
#: Context in which functions of torch are not recorded.
_unrecorded = torch._C.DisableTorchFunction
#: Longest sequence of numbers that is recorded.
_LONGEST = 64


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> Trace:
    """Run the model once and record which module calls and operations made which tensor.

    Runs without gradients, and in the mode (training or evaluation) in which the model is. Afterwards, also after an
    exception, the model, what it was called with and random generators are as before; see `undisturbed`.

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
    with _recording(recorder, model, args, kwargs) as (positional, named):
        model(*positional, **named)
    return recorder.trace


@atomic
def _recording(recorder: _Recorder, model: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[list[Any], Any]]:
    """Context in which a recorder sees all that a model does; yields copies of what the model is called with."""
    token = running_trace.set(recorder)
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")  # (the model warns again when it runs for the user)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(uncompiled(model))
            recorder.snapshot = stack.enter_context(undisturbed(model, args, kwargs, later=recorder.later(model)))
            positional, named = changed((list(args), kwargs), lambda tensor: tensor.detach().clone())
            for number, tensor in enumerate(tensors_in((positional, named))):
                recorder.keep(tensor, Node("input", "input", None, [], origins=frozenset([number])))
            stack.enter_context(recorder.hooks(model))
            stack.enter_context(recorder)
            yield positional, named
    finally:
        running_trace.reset(token)


class _Recorder(TorchFunctionMode):
    """Follows tensors from operation to operation, and from module to module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace({name: type(module) for name, module in model.named_modules()})
        #: First name of each parameter, by its id.
        self._parameters: dict[int, str] = {}
        for prefix, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    full = f"{prefix}.{name}" if prefix else name
                    first = self._parameters.setdefault(id(parameter), full)
                    self.trace.parameter_readers[full] = self.trace.parameter_readers.get(first, [])
        self._stack: list[ModuleCall] = []
        self._is_paused = False
        self.snapshot: Snapshot | None = None
        # A tensor is found by its id while the weak reference beside it is alive. If its version has changed since, it
        # was written to through another view; `_writes` has the node of that write, by storage.
        self._nodes: dict[int, tuple[weakref.ref[Tensor], Node, int | None]] = {}
        self._writes: dict[Hashable, Node] = {}

    def keep(self, tensor: Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = (weakref.ref(tensor), node, version_of(tensor))

    def find(self, tensor: Tensor) -> Node | None:
        if (entry := self._nodes.get(id(tensor))) is None or entry[0]() is not tensor:
            return None
        _, node, version = entry
        return node if version == version_of(tensor) else self._writes.get(_storage(tensor), node)

    def find_all(self, tensors: Iterable[Tensor]) -> list[Node]:
        nodes = {id(node): node for tensor in tensors if (node := self.find(tensor)) is not None}
        return list(nodes.values())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if self._is_paused:
            return func(*args, **kwargs)
        if name in _WAITING:
            return RemovableHandle(OrderedDict())
        operands = list(tensors_in((args, kwargs)))
        if name not in _READING and name not in _METADATA:
            self._keep_parameters(operands)
        sources, versions = self.find_all(operands), [version_of(tensor) for tensor in operands]
        arguments = self._recordable(args), {key: self._recordable(value) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        made = list(tensors_in(result))
        if not made and name in _METADATA:
            return result
        if name == "__get__":  # a view, as `weight.T` is
            self._keep_parameters(operands)
        written = [t for t, version in zip(operands, versions, strict=True) if version != version_of(t)]
        if name == "__set__" and len(operands) > 1:  # x.data = y
            written.append(operands[0])
        new = [tensor for tensor in made if not any(tensor is other for other in operands)]
        if made and not new and not written:  # handed back as it was: contiguous(), dropout in evaluation
            return result
        call = self._stack[-1] if self._stack else None
        function = FunctionCall(func, _operation(func, name), call, *arguments, _kind(result))
        self._record(function, operands, sources, written, new)
        return result

    def _record(
        self,
        function: FunctionCall,
        operands: list[Tensor],
        sources: list[Node],
        written: list[Tensor],
        new: list[Tensor],
    ) -> None:
        """Record a call: who reads what, and what was made or changed of which sources."""
        self.trace.operations.append(function)
        reader = Reader(function.name, function.call, function)
        for node in sources:
            node.readers.append(reader)
        for tensor in operands:
            if id(tensor) in self._parameters:
                self.trace.parameter_readers[self._parameters[id(tensor)]].append(reader)
        passes = function.name not in _CONSTANT
        for tensor in written:
            origins = _origins(sources if passes else self.find_all([tensor]))
            self._writes[_storage(tensor)] = self._made(tensor, function, sources, origins)
        for tensor in new:
            differentiable = passes and (tensor.is_floating_point() or tensor.is_complex())
            self._made(tensor, function, sources, _origins(sources) if differentiable else frozenset())

    def _made(self, tensor: Tensor, function: FunctionCall, sources: list[Node], origins: frozenset[int]) -> Node:
        node = Node("operation", function.name, function.call, sources, origins=origins, function=function)
        function.outputs.append(node)
        self.keep(tensor, node)
        return node

    @staticmethod
    def later(model: nn.Module) -> Iterator[Tensor]:
        """Parameters that can only be changed by functions that the recorder sees."""
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                yield from (parameter for parameter in module._parameters.values() if parameter is not None)

    def _keep_parameters(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in self._parameters and self.snapshot is not None:
                self.snapshot.keep_now(tensor)

    def _recordable(self, value: Any) -> Any:
        """An argument of a function without its tensors."""
        if isinstance(value, Tensor):
            return Operand(self.find(value), self._parameters.get(id(value)))
        if value is None or isinstance(value, int | float | complex | str):
            return value
        if isinstance(value, Mapping):
            return self._recordable((*value.values(),))
        if not isinstance(value, tuple | list):
            return ...
        items = tuple(self._recordable(item) for item in value)
        return items if len(items) <= _LONGEST or any(isinstance(item, Operand) for item in items) else ...

    @atomic
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Hooks on all modules, around the hooks of others, so that what these change counts as done by the module."""
        names, counts = {module: name for name, module in model.named_modules()}, dict[str, int]()
        # Inputs, or outputs, of a call before the hooks of others.
        before: dict[ModuleCall, list[tuple[WeakIdRef, int | None]]] = {}

        def enter(layer: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            if running_trace.get() is not self:  # another thread uses the model
                return
            parent = self._stack[-1] if self._stack else None
            if parent is not None:
                parent.is_leaf = False
            number = counts.get(layer, 0)
            counts[layer] = number + 1
            with _unrecorded():
                call = ModuleCall(layer, type(module), number, parent, inputs=self.find_all(tensors_in((args, kwargs))))
                call.given = next((kind for value in (*args, *kwargs.values()) if (kind := _kind(value))), None)
                before[call] = _versions(*args, *kwargs.values())
            self.trace.calls.append(call)
            self._stack.append(call)

        def entered(layer: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            if (call := self._current(layer)) is not None:
                with _unrecorded():
                    call.input_changed = before.pop(call) != _versions(*args, *kwargs.values())

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            layer = names.get(module)
            if layer is not None and (call := self._current(layer)) is not None:
                with _unrecorded():
                    call.returned = _kind(output)
                    before[call] = _versions(output)

        def left(layer: str, module: nn.Module, args: Any, output: Any) -> Any:
            if (call := self._current(layer)) is None:
                return None
            with _unrecorded():
                call.output_changed = before.pop(call) != _versions(output)
            output = self._hand_out(call, output)
            self._stack.pop()
            return output

        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")  # (as above)
            # (methods of `nn.Module`, as those of scripted modules raise an error)
            before_forward, after_forward = nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook
            # (torch calls hooks on all modules before those of a module)
            on_all: Any = torch_module._global_forward_hooks
            stack.callback((handle := torch_module.register_module_forward_hook(leave)).remove)
            on_all.move_to_end(handle.id, last=False)
            for module, layer in names.items():
                for register, hook, options in (
                    (before_forward, enter, {"prepend": True, "with_kwargs": True}),
                    (before_forward, entered, {"with_kwargs": True}),
                    (after_forward, left, {}),
                ):
                    stack.callback(register(module, partial(hook, layer), **options).remove)
            yield

    def _current(self, layer: str) -> ModuleCall | None:
        """Innermost call of a layer; None in another thread that uses the model."""
        if running_trace.get() is not self:
            return None
        while self._stack[-1].layer != layer:  # a call that the model left by an exception, and caught
            self._stack.pop()
        return self._stack[-1]

    def _hand_out(self, call: ModuleCall, output: Any) -> Any:
        """Record the outputs of a call that ends; returns what the module shall return."""
        with _unrecorded():
            node = self.find(output) if isinstance(output, Tensor) else None
        if node is not None and node in call.inputs:
            # The output is the input itself (identity, dropout in evaluation); an alias keeps their readers apart.
            node.readers.append(Reader("identity", call))
            self._is_paused = True
            output = output.detach()
            self._is_paused = False
        with _unrecorded():
            for tensor in tensors_in(output):
                maker = self.find(tensor)
                if maker is None or maker not in call.inputs:
                    self._hand_out_one(call, tensor, maker)
        return output

    def _hand_out_one(self, call: ModuleCall, tensor: Tensor, maker: Node | None) -> None:
        if call.parent is None and maker is not None:
            maker.readers.append(Reader("the model's output", None))
        if maker is None or (call.is_leaf and not (maker.call and maker.call.within(call))):
            node = Node("output", call.layer, call, call.inputs, origins=_origins(call.inputs))
        else:
            sources = call.inputs if call.is_leaf else [maker]
            node = Node("output", call.layer, call, sources, maker.readers, maker.origins, maker=maker)
        call.outputs.append(node)
        self.keep(tensor, node)


def _origins(nodes: Iterable[Node]) -> frozenset[int]:
    return frozenset().union(*(node.origins for node in nodes))


def _kind(value: object) -> TensorKind | None:
    """Shape and type, if it is a tensor that has these."""
    return TensorKind(value.shape, value.dtype) if isinstance(value, Tensor) and not value.is_nested else None


def _versions(*values: Any) -> list[tuple[WeakIdRef, int | None]]:
    """Tensors as they are: equal to what they are later, if they are the same and nobody wrote to them between."""
    return [(WeakIdRef(value), version_of(value)) for value in values if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> Hashable:
    """The memory of a tensor, as a key; while there is one, no other tensor's memory has the same."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return WeakIdRef(tensor)


def _operation(func: Callable[..., Any], name: str) -> str:
    """Plain name of a function of torch: ``__iadd__`` is add, ``relu.default`` relu, and the getter of ``x.T`` T."""
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", "attribute")
    return name.split(".")[0].strip("_")
