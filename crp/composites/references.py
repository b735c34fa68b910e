"""Operations of the forward pass on a reference input, to compare with those of the pass on the data."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from crp.errors import StateError
from crp.layers.interrupts import atomic
from crp.layers.nested import changed, tensors_in
from crp.rules.deeplift import same_values
from crp.rules.layer import Layer
from crp.rules.operation import Operation


class _ReferenceCalls:
    """Calls that have a rule, in the order in which the model's pass on the data will meet them.

    Attributes
    ----------
    is_recording : bool
        Whether the model runs on the reference now.
    is_on : bool
        Whether it does, or has, and constants are to be compared.
    """

    def __init__(self) -> None:
        self.is_recording = self.is_on = False
        self._calls: list[Layer] = []
        self._constants: list[tuple[str, list[Tensor | float], list[int]]] = []

    @atomic
    def recording(self) -> Iterator[None]:
        """Context in which the model runs on the reference; nothing is kept if it fails."""
        self.clear()
        self.is_recording = self.is_on = True
        try:
            yield
        except BaseException:
            self.clear()
            raise
        finally:
            self.is_recording = False

    def keep(self, layer: Layer) -> None:
        """Keep a call."""
        self._calls.append(_detached(layer))

    def next_for(self, layer: Layer) -> Layer | None:
        """The same call on the reference; None if there was no such pass.

        Raises
        ------
        RuntimeError
            If the model did something else there.
        """
        if not self._calls:
            return None
        reference = self._calls.pop(0)
        shapes = [[tuple(tensor.shape) for tensor in one.inputs] for one in (layer, reference)]
        of_data, of_reference = (str(layer), str(reference))
        if reference.name == layer.name and not all(map(_comparable, *shapes)):
            of_data, of_reference = (f"{layer} on {of_one}" for of_one in shapes)
        elif reference.name == layer.name:
            return reference
        raise StateError(
            f"the model ran {of_data} for the data, but {of_reference} for the reference: its path depends on the "
            "values, so that they cannot be compared"
        )

    def differ(self, op: Operation) -> bool:
        """Whether a call without a rule reads other constants than it did for the reference."""
        read = op.args[:1] if op.known.reads_first else (op.args, op.kwargs)
        constants: list[Tensor | float] = [value for value in op.args if isinstance(value, float)]
        constants += [t for t in tensors_in(read) if not op.depends(t) and not isinstance(t, nn.Parameter)]
        if not constants:
            return False
        name, versions = op.known.name, [getattr(value, "_version", 0) for value in constants]
        if self.is_recording:
            if op.overwrites:
                constants = [value.clone() if isinstance(value, Tensor) else value for value in constants]
                versions = [0] * len(constants)
            self._constants.append((name, constants, versions))
            return False
        if not self._constants:
            return True
        of_reference, others, versions = self._constants.pop(0)
        return name != of_reference or not all(map(_is_same, constants, others, versions))

    def is_used(self) -> bool:
        """Whether calls on a reference are kept."""
        return bool(self._calls)

    def clear(self) -> list[Layer]:
        """Forget all calls; those that are left."""
        left, self._calls, self._constants, self.is_on = self._calls, [], [], False
        return left


def _is_same(value: Tensor | float, value0: Tensor | float, version: int) -> bool:
    """Whether a constant has not changed, as far as that can be known."""
    if not isinstance(value, Tensor) or not isinstance(value0, Tensor):
        return isinstance(value, float) and value == value0
    return value.shape != value0.shape or value0._version != version or same_values(value, value0)


def _comparable(shape: tuple[int, ...], of_reference: tuple[int, ...]) -> bool:
    """Whether two tensors differ in the number of samples only, of which a reference has one or as many."""
    if shape[:1] == of_reference[:1]:
        return shape == of_reference
    return shape[1:] == of_reference[1:] and of_reference[0] > 0 and shape[0] % of_reference[0] == 0


def _detached(layer: Layer) -> Layer:
    # One copy of each tensor, as the model may overwrite tensors later.
    known: dict[int, Tensor] = {}
    mine = {id(tensor) for tensor in layer.inputs}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = tensor.detach().clone() if id(tensor) in mine else tensor.detach()
        return known[id(tensor)]

    args, kwargs = changed((tuple(layer.args), dict(layer.kwargs)), copied)
    inputs = tuple(copied(tensor) for tensor in layer.inputs)
    output = changed(layer.output, lambda tensor: tensor.detach().clone())
    return Layer(
        layer.function, args, kwargs, inputs, layer.known, place=layer.place, module=layer.module, result=output
    )
