"""What a model takes: one tensor, or several inputs, of which some are explained and the others are passed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from crp.engine.backward_hooks import _ReadingOnly
from crp.engine.door import _as_kind, is_finite
from crp.engine.tokens import Embedded, _can_embed, _in_place_of_lookup, _name_of_ids, embed
from crp.errors import InputError, InputTypeError, NameNotFoundError
from crp.layers import unwrap
from crp.layers.devices import send_to
from crp.layers.misfits import telling_misfits
from crp.values import check_form

Tensors: TypeAlias = tuple[Tensor, ...]
#: One input; a list of samples, of tensors without that axis; inputs by position, in a tuple, or by name. Other tensors
#: have the samples on their first axis.
Data: TypeAlias = "Tensor | Sequence[Any] | Mapping[str, Any] | Inputs"
#: Position or name of an input, or several of them.
Explain: TypeAlias = int | str | Sequence[int | str] | None

#: What is passed on as it is, beside tensors.
CONSTANTS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a model for some samples.

    Attributes
    ----------
    values : dict of int or str to Tensor, number, str or None
        All inputs, in order, by position or name. Tensors are of shape (samples, *input shape).
    names : tuple of int or str
        Those that are explained.
    form : "tensor", "tuple" or "dict"
        What they were given as.
    embedded : dict of int or str to Embedded
        Embeddings of inputs that are token ids and are explained.
    """

    values: dict[int | str, Any]
    names: tuple[int | str, ...]
    form: Literal["tensor", "tuple", "dict"]
    embedded: dict[int | str, Embedded] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Data, explain: Explain = None, model: nn.Module | None = None) -> Inputs:
        """Inputs as a user gives them; `check` looks at their values.

        Parameters
        ----------
        data : Tensor, list, tuple or dict
            A list holds samples, which may differ in shape. A tuple holds the model's positional arguments, a dict its
            keyword arguments. What is no tensor in these is passed on as it is.
        explain : int, str, or sequence of these, optional
            Positions (in a tuple) or names (in a dict) of the inputs that are explained; all floating ones by default,
            or, where there are none, token ids: ``"input_ids"``, or the only integers.
        model : nn.Module, optional
            What looks up the embeddings of token ids; without it they cannot be explained.

        Raises
        ------
        TypeError
            If the data, an input, or what is explained is of no such kind.
        ValueError
            If nothing is to be explained, or inputs are for different numbers of samples.
        KeyError
            If there is no input of that name or position.
        """
        if isinstance(data, Inputs):
            return data
        if isinstance(data, Tensor | list) and explain is not None:
            raise InputError(f"explain={explain!r} chooses among several inputs; data is a single one")
        if isinstance(data, list):
            return Samples.listed(data)
        if isinstance(data, Tensor):
            return cls.single(data)._embedding(model)
        if not isinstance(data, tuple | Mapping):
            raise InputTypeError(
                "data must be a floating-point tensor, which relevance can be assigned to, not "
                f"{_as_kind(data)}; samples of several shapes are a list of them, several inputs a tuple or dict"
            )
        if not data:
            raise InputTypeError("data must be a tensor, or a tuple or dict of an input for each argument; it is empty")
        form: Literal["tuple", "dict"] = "dict" if isinstance(data, Mapping) else "tuple"
        values: dict[Any, Any] = {**data} if isinstance(data, Mapping) else dict(enumerate(data))
        _check_values(values, form == "dict")
        ids = None if explain is not None else _name_of_ids(values)
        if ids is not None and isinstance(model, nn.Module) and _can_embed(model, values[ids]):
            explain = ids
        return cls(values, _explained(values, explain), form)._embedding(model)

    def _embedding(self, model: nn.Module | None) -> Inputs:
        """The same with the embeddings of token ids that are explained."""
        if not isinstance(model, nn.Module):
            return self
        model = unwrap(model)
        ids = [name for name in self.names if _can_embed(model, self.values[name])]
        return replace(self, embedded={name: embed(model, self.values, name) for name in ids}) if ids else self

    @classmethod
    def single(cls, data: Tensor) -> Inputs:
        """The only input of a model."""
        return cls({0: data}, (0,), "tensor")

    def check(self, finite: bool = True) -> None:
        """Raise an error that names an input that is explained, and cannot be.

        Parameters
        ----------
        finite : bool
            Whether to look at values, for which the host waits.

        Raises
        ------
        TypeError
            If it is no floating-point tensor.
        ValueError
            If it has NaN or infinite values.
        """
        for name, tensor in zip(self.names, self.explained, strict=True):
            check_data(tensor, "data" if self.form == "tensor" else f"input {name!r}", finite)

    def __len__(self) -> int:
        return len(self.values[self.names[0]])

    @cached_property
    def explained(self) -> Tensors:
        """What is explained of each input, of shape (samples, *input shape): of token ids, their embeddings."""
        return tuple(self.embedded[name].values if name in self.embedded else self.values[name] for name in self.names)

    @property
    def passes_on(self) -> bool:
        """Whether a tensor is passed on and not explained."""
        return sum(isinstance(value, Tensor) for value in self.values.values()) > len(self.names)

    @property
    def data(self) -> Data:
        """The inputs in the form in which they were given."""
        if self.form == "dict":
            return {str(name): value for name, value in self.values.items()}
        return self.values[0] if self.form == "tensor" else tuple(self.values.values())

    def given(self, data: Data) -> list[Tensor | None]:
        """Tensors that a user gave and that are explained; None for token ids, which have no gradient, and lists."""
        if isinstance(data, list):
            return [None]
        values: Any = {0: data} if isinstance(data, Tensor) else data.values if isinstance(data, Inputs) else data
        return [None if name in self.embedded else values[name] for name in self.names]

    def having(self, explained: Sequence[Tensor], samples: Tensor | None = None) -> Inputs:
        """Others in place of the tensors that are explained, and what is passed on for these samples."""
        others = dict(zip(self.names, explained, strict=True))
        ids = {name: embedded._replace(values=others.pop(name)) for name, embedded in self.embedded.items()}
        kept = replace(self, values={n: value for n, value in self.values.items() if n not in others}, embedded={})
        passed_on = kept.values if samples is None else kept.select(samples).values
        values = {name: others.get(name, passed_on.get(name)) for name in self.values}
        return replace(self, values=values, embedded=ids)

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor changed."""
        values = {name: change(value) if isinstance(value, Tensor) else value for name, value in self.values.items()}
        embedded = {name: entry._replace(values=change(entry.values)) for name, entry in self.embedded.items()}
        return Inputs(values, self.names, self.form, embedded)

    def select(self, samples: list[int] | Tensor) -> Inputs:
        """Some of the samples, each as often as it is named."""
        if isinstance(samples, list) and samples:
            first, end = samples[0], samples[0] + len(samples)
            if samples == list(range(first, end)):  # (no index has to be sent, and nothing is copied)
                return self if end - first == len(self) else self.each(lambda tensor: tensor[first:end])
        index = torch.as_tensor(samples)
        return self.each(lambda tensor: tensor[send_to(tensor.device, index)])

    def to(self, device: torch.device) -> Inputs:
        """The same on a device."""
        return self.each(lambda tensor: tensor.to(device))

    def run(self, model: Callable[..., Any]) -> Any:
        """What a model returns for copies of the inputs, as it may change them in place.

        Backward hooks of a user's own that come onto the graph may change nothing, or a `RuntimeError` is raised by the
        one that would.
        """
        copies = self.each(torch.clone)
        positional = [] if self.form == "dict" else [*copies.values.values()]
        named = {str(name): value for name, value in copies.values.items()} if self.form == "dict" else {}
        with telling_misfits(model, self.explained, self.values), _ReadingOnly(model):
            if not self.embedded:
                return model(*positional, **named)
            assert isinstance(model, nn.Module)
            with _in_place_of_lookup(model, copies.embedded) as embeddings:
                return model(*positional, **named, **embeddings)

    def parts(self, results: Any) -> tuple[Any, ...]:
        """Undo `shaped`."""
        return (results,) if len(self.names) == 1 else tuple(results[name] for name in self.names)

    def shaped(self, results: Sequence[Any]) -> Any:
        """Results of each input that is explained, in one object.

        The only one as it is; several in the form of the data, a tuple or dict with None for inputs that are not
        explained.
        """
        if len(results) == 1:
            return results[0]
        by_name = dict.fromkeys(self.values) | dict(zip(self.names, results, strict=True))
        return by_name if self.form == "dict" else tuple(by_name.values())


@dataclass(frozen=True)
class Samples(Inputs):
    """Samples of one input that differ in shape; a model gets them one at a time, or those of one shape together.

    Attributes
    ----------
    samples : tuple of Tensor of shape (*input shape)
    """

    samples: tuple[Tensor, ...] = ()

    @classmethod
    def listed(cls, data: list[Any]) -> Inputs:
        """Samples in a list: as one tensor, where they are of one shape."""
        for i, sample in enumerate(data):
            if not isinstance(sample, Tensor) or not sample.is_floating_point():
                raise InputTypeError(
                    f"a list holds samples, which are floating-point tensors; data[{i}] is {_as_kind(sample)}. Several "
                    "inputs are a tuple or dict of them"
                )
            check_form(sample, f"data[{i}]")
        if not data:
            raise InputError("data is an empty list; it needs a tensor for each sample")
        for i, sample in enumerate(data):
            for what in ("dtype", "device"):
                if (found := getattr(sample, what)) != (first := getattr(data[0], what)):
                    raise InputTypeError(
                        f"data[{i}] has the {what} {found}, and data[0] {first}; give all samples the same"
                    )
        if len({sample.shape for sample in data}) == 1:
            return Inputs.single(torch.stack(data))
        return cls({}, (0,), "tensor", samples=tuple(data))

    def check(self, finite: bool = True) -> None:
        """Raise an error that names a sample that cannot be explained."""
        for i, sample in enumerate(self.samples):
            check_data(sample[None], f"data[{i}]", finite)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def explained(self) -> Tensors:
        """There is no tensor of all samples."""
        shapes = sorted({tuple(sample.shape) for sample in self.samples})
        raise InputTypeError(f"samples of several shapes, {shapes}, cannot be explained together; give them one by one")

    @property
    def data(self) -> Data:
        """The samples as a list."""
        return list(self.samples)

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor changed."""
        return replace(self, samples=tuple(map(change, self.samples)))

    def select(self, samples: list[int] | Tensor) -> Inputs:
        """Some of the samples, each as often as it is named."""
        return Samples.listed([self.samples[int(i)] for i in samples])


def check_data(data: Tensor, name: str = "data", finite: bool = True) -> None:
    """Raise an error, with this name, if data are no floating-point tensor, are empty, or have values not finite.

    Without ``finite``, values may be anything.
    """
    if isinstance(data, Tensor):
        check_form(data, name)
    if not isinstance(data, Tensor) or not data.is_floating_point():
        raise InputTypeError(
            f"{name} must be a floating-point tensor, which relevance can be assigned to, not {_as_kind(data)}"
        )
    if data.dim() == 0 or len(data) == 0:
        raise InputError(f"{name} has shape {tuple(data.shape)}; it needs a batch axis with at least one sample")
    if not data.numel():
        raise InputError(f"{name} has shape {tuple(data.shape)}; a sample needs at least one value")
    if finite and not is_finite(data):
        each = torch.isfinite(data).reshape(len(data), -1).all(1)
        wrong = (~each).nonzero().flatten().tolist()
        passed_on = "" if name == "data" else "; an input that is only passed on may have them, see explain="
        raise InputError(f"{name} has NaN or infinite values in samples {wrong}{passed_on}")


def _check_values(values: Mapping[Any, Any], by_name: bool) -> None:
    for name, value in values.items():
        if by_name and not isinstance(name, str):
            raise InputTypeError(f"a dict of inputs has the names of the model's arguments as keys, not {name!r}")
        if not isinstance(value, (Tensor, *CONSTANTS)):
            made = ' (a tokenizer gives tensors by return_tensors="pt")' if isinstance(value, list) else ""
            raise InputTypeError(
                f"input {name!r} is {_as_kind(value)}{made}; inputs are tensors with the samples on their first axis, "
                "or numbers, bools, strings and None, which are passed on"
            )
    for name, value in values.items():
        if isinstance(value, Tensor):
            check_form(value, f"input {name!r}")
    sizes = {name: len(value) if value.dim() else None for name, value in values.items() if isinstance(value, Tensor)}
    if len(set(sizes.values())) > 1 or None in sizes.values():
        shapes = ", ".join(f"{name!r} of shape {tuple(values[name].shape)}" for name in sizes)
        raise InputError(
            f"the inputs are for {list(sizes.values())} samples; each must have as many, on its first axis: {shapes}. "
            "What is no sample's, as the edges of a graph, belongs to a module around the model, whose forward adds it"
        )


def _explained(values: Mapping[Any, Any], explain: Explain) -> tuple[int | str, ...]:
    """Names of the inputs that are explained, in the order of the inputs."""
    if explain is None:
        names = [n for n, value in values.items() if isinstance(value, Tensor) and value.is_floating_point()]
        if not names:
            raise InputTypeError(
                "no input is a floating-point tensor, which relevance can be assigned to, or holds token ids, int64: "
                + ", ".join(f"{n!r} is {getattr(value, 'dtype', value)}" for n, value in values.items())
            )
        return tuple(names)
    if not isinstance(explain, int | str | Sequence):
        raise InputTypeError(f"explain names inputs by position or name, or several in a list; not by {explain!r}")
    asked = [explain] if isinstance(explain, int | str) else list(explain)
    if not asked:
        raise InputError("explain is empty; name at least one input, or leave it out")
    # (positions may be counted from the end)
    places = [n + len(values) if isinstance(n, int) and n < 0 else n for n in asked]
    for name, place in zip(asked, places, strict=True):
        if isinstance(name, bool) or not isinstance(name, int | str):
            raise InputTypeError(f"explain names inputs by position or name, not by {name!r}")
        if place not in values:
            raise NameNotFoundError(f"there is no input {name!r} to explain; there are {', '.join(map(repr, values))}")
    return tuple(name for name in values if name in places)
