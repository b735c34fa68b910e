"""Layers of a model and their names, and the state in which a model runs: compiled, or for the record only."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from crp.errors import InputTypeError, NameNotFoundError
from crp.layers.interrupts import atomic
from crp.notices import kind_of
from crp.wording import first_few

running_trace: ContextVar[object] = ContextVar("crp_trace", default=None)
_referencing: ContextVar[bool] = ContextVar("referencing", default=False)


class ByChainRule(nn.Module):
    """A module inside of which every composite of `crp.composites` leaves the ordinary chain rule; base of others."""


class Followed(nn.Module):
    """A layer with something behind it; other attributes are those of the layer.

    Subclasses define ``after``: a function of the layer's output and of its arguments.
    """

    def __init__(self, layer: nn.Module, **parts: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        for name, part in parts.items():
            self._modules[name] = part  # (`add_module` would ask the layer for the name)
            part.training = layer.training
        self.training = layer.training

    def after(self, output: Tensor, *args: Any) -> Tensor:
        """What the model gets in place of the layer's output."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the layer, and what follows."""
        output = self.layer(*args, **kwargs)
        check_returned(output, self.layer)
        return self.after(output, *args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def check_returned(output: object, layer: nn.Module, name: str = "") -> None:
    """Raise a `TypeError` if what a layer returns is no tensor."""
    if not isinstance(output, Tensor):
        named = f" {name!r}" if name else ""
        is_attention = isinstance(layer, nn.MultiheadAttention)
        heads = f", such as {name + '.out_proj.input'!r} for its heads" if name and is_attention else ""
        raise InputTypeError(
            f"layer{named} ({type(layer).__name__}) returns {kind_of(output)}, not a tensor; name a layer "
            f"inside it, or after it, that returns one{heads}"
        )


@atomic
def put_behind(model: nn.Module, layer: str, make: Callable[[nn.Module], Followed]) -> Iterator[Followed]:
    """Replace a layer by itself and what follows, inside of the context; in all places where the model has it."""
    inner = find_layers(model, [layer])[layer]
    followed = make(inner)
    tables = [module._modules for module in modules_of(model).values()]
    places = [(children, name) for children in tables for name, child in children.items() if child is inner]
    try:
        for children, name in places:
            children[name] = followed
        yield followed
    finally:
        for children, name in places:
            children[name] = inner


def get_layer_names(model: nn.Module, types: Iterable[type[nn.Module]] | type[nn.Module]) -> list[str]:
    """Names of all layers of the given types, in the order of ``model.named_modules()``.

    Parameters
    ----------
    model : nn.Module
    types : iterable of module types, or a single one
        For example ``[nn.Conv2d, nn.Linear]``; subclasses count.

    Returns
    -------
    list of str

    Raises
    ------
    TypeError
        If one is no type, or the model is no module.
    """
    model = unwrap(model)
    kinds = tuple(types) if isinstance(types, Iterable) else (types,)
    if wrong := [kind for kind in kinds if not isinstance(kind, type)]:
        raise InputTypeError(f"types must be types of modules, such as [nn.Conv2d, nn.Linear]; {wrong[0]!r} is none")
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def unwrap(model: nn.Module) -> nn.Module:
    """Model inside the wrappers of `torch.compile` and `DataParallel`; what is no model, or scripted, is refused."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputTypeError(
            f"{type(model).__name__} is a scripted or traced model: its layers cannot carry rules. "
            "Pass the Python model it was made from."
        )
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """``dict(model.named_modules())``, but faster: every call of a model needs it several times."""
    modules: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    todo: list[tuple[nn.Module | None, str]] = [(model, "")]
    while todo:
        module, name = todo.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        modules[name] = module
        if children := module._modules:
            prefix = f"{name}." if name else ""
            todo += [(part, prefix + child) for child, part in reversed(children.items())]
    return modules


#: Where torch keeps layers of packed integers; those named FloatFunctional compute with numbers of floating point.
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def differentiable(model: nn.Module) -> nn.Module:
    """Model inside of wrappers. Quantized layers are refused: torch has no gradient of them, and sends zeros back."""
    model = unwrap(model)
    for name, module in modules_of(model).items():
        kind = type(module)
        if kind.__module__.startswith(_QUANTIZED) and not kind.__name__.endswith("FloatFunctional"):
            raise InputTypeError(
                f"layer {name!r} is quantized ({kind.__module__}.{kind.__qualname__}), and torch has no gradient of "
                "it; pass the model that was quantized"
            )
    return model


@atomic
def uncompiled(model: nn.Module, modules: Collection[nn.Module] | None = None) -> Iterator[None]:
    """Run compiled parts of a model as they are written, where hooks, rules and traces can reach them."""
    modules = modules_of(model).values() if modules is None else modules
    compiled = {module: module._compiled_call_impl for module in modules if module._compiled_call_impl}
    wrappers = {m: vars(m)["forward"] for m in modules if "_orig_mod" in m._modules and "forward" in vars(m)}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        for wrapper in wrappers:
            vars(wrapper)["forward"] = wrapper.get_submodule("_orig_mod").__call__
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
        for wrapper, forward in wrappers.items():
            vars(wrapper)["forward"] = forward


@atomic
def evaluating(model: nn.Module, modules: Collection[nn.Module] | None = None) -> Iterator[list[nn.Module]]:
    """Run a model in evaluation mode; yields the modules that were in training mode, and are again afterwards.

    Encoders of torch hand on what they make of padded positions, as in training: without gradients they would not.
    """
    modules = modules_of(model).values() if modules is None else modules
    training, nesting = [module for module in modules if module.training], nesting_encoders(modules)
    try:
        for module in training:
            module.training = False
        for encoder in nesting:
            encoder.use_nested_tensor = False
        yield [module for module in training if type(module).__module__ != "zennit.layer"]  # (a canonizer made those)
    finally:
        for module in training:
            module.training = True
        for encoder in nesting:
            encoder.use_nested_tensor = True


def nesting_encoders(modules: Iterable[nn.Module]) -> list[nn.TransformerEncoder]:
    """Encoders that leave padded positions out, and make zeros of them, where nobody asks for a gradient."""
    return [module for module in modules if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor]


@atomic
def without_parameter_gradients(model: nn.Module, modules: Collection[nn.Module] | None = None) -> Iterator[None]:
    """Keep a model's parameters outside autograd."""
    modules = modules_of(model).values() if modules is None else modules
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    learning = [p for p in dict.fromkeys(parameters) if p.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def find_layers(model: nn.Module, names: Iterable[str], role: str = "layer") -> dict[str, nn.Module]:
    """Modules of the given names.

    Raises
    ------
    KeyError
        If a name is not in the model; the message gives the nearest names that are.
    TypeError
        If the model is none.
    """
    unwrap(model)  # (refuses what is no model)
    names = list(names)
    modules = modules_of(model) if names else {}
    for name in names:
        if not isinstance(name, str) or name not in modules or name == "":
            raise LayerNotFoundError(name, modules, role)
    return {name: modules[name] for name in names}


def nearest(name: object, known: Iterable[str]) -> str:
    """Nearest of known names as the end of a message: ``"; nearest: 'a', 'b'"``, or nothing."""
    plain = {one.lower(): repr(one) for one in known}
    near = ", ".join(plain[one] for one in difflib.get_close_matches(str(name).lower(), plain))
    return f"; nearest: {near}" if near else ""


class LayerNotFoundError(NameNotFoundError, ValueError):
    """A layer name that is not in the model, or ``where`` else it is looked for.

    A `KeyError`, as for the drop-in contract, and a `ValueError`, as it is a bad argument.
    """

    def __init__(self, name: object, known: Iterable[str], role: str = "layer", where: str = "model") -> None:
        names = [one for one in known if one]
        hint = nearest(name, names) or f"; there are {first_few(list(map(repr, names)), 5) or 'no layers'}"
        super().__init__(f"<{role}> {name!r} not found in {where}{hint}")


class OfThread:
    """Hook of a module that acts in the thread that has made it, and does nothing where another one calls the model."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook, self._thread = hook, get_ident()
        self.__self__ = getattr(hook, "__self__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the hook returns, in its thread."""
        return self._hook(*args, **kwargs) if get_ident() == self._thread else None


@atomic
def hooked(hooks: Mapping[nn.Module, Callable[..., Any]], **options: Any) -> Iterator[None]:
    """Forward hooks on modules, inside of the context, for calls of this thread."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            # (scripted modules say that they cannot be hooked, but torch runs hooks of them)
            stack.callback(nn.Module.register_forward_hook(module, OfThread(hook), **options).remove)
        yield


def tracing() -> bool:
    """Whether a `trace` is running here; hooks that change values stay inert meanwhile."""
    return running_trace.get() is not None


@atomic
def looking() -> Iterator[None]:
    """Context in which a model runs for the record only, as in a `trace`; its warnings are silenced."""
    token = running_trace.set(looking)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        running_trace.reset(token)


def referencing() -> bool:
    """Whether a model runs on a reference input now."""
    return _referencing.get()


@atomic
def on_reference() -> Iterator[None]:
    """Context in which a model runs on a reference input."""
    token = _referencing.set(True)
    try:
        yield
    finally:
        _referencing.reset(token)
