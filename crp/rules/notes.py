"""What is known about the tensors of a forward pass: one note for each that depends on the model's input.

A note holds for one tensor object and one version of its values. The table of functions (`crp.rules.functions`) says
how notes pass through a function. A tensor that depends on the input and has no note was made where no rule could see
it; reading it is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from crp.layers.interrupts import atomic

#: No affine operation stands between the tensor and the model's input.
FIRST = 1
#: No value is negative.
NONNEGATIVE = 2


class Born:
    """What made a tensor's values; rearranging or scaling them does not change it."""

    SQUASHED = 4  # of a squashing function such as the sigmoid, or 1 plus or minus such
    SOFTMAX = 8
    ACTIVATION = 16
    ROUTED = 32  # of a softmax or squashing function, of which some entries were chosen, or a softmax that was divided
    DIVISOR = 64  # one over something
    BALANCED = 128  # of a function between -1 and 1, such as tanh: 1 plus or minus such is squashed
    LOGARITHM = 256  # that of a sum of exponentials, or something less one: its exponential may be a softmax
    GATING = 512  # of a sigmoid, a tanh or an exponential: a number that is added is part of it, as in a gate
    EXPONENTIAL = 1024  # as the weights of attention are before they are divided by their sum
    CHOSEN = 2048  # of which an index has chosen some entries, as of the logits of experts; or that says which


BORN: int = sum(flag for name, flag in vars(Born).items() if name.isupper())
#: Where functions of autograd are whose gradient is that of what they compute.
_TRUSTED = ("crp.", "torch.")
#: Flags that a result keeps although constants are among its operands.
_NEUTRAL = FIRST | BORN
_NESTED = (tuple, list, dict)


class Note:
    """What is known about one tensor.

    Attributes
    ----------
    tensor : weakref to Tensor
    version : int
        Of the tensor's values.
    flags : int
        `FIRST`, `NONNEGATIVE`, `Born`.
    copied : Copied or None
        How its entries are copies of entries of the model's input.
    parts : object
        What a rule remembers of the call that made it (`crp.rules.deeplift`).
    below : Note or None
        Of the tensor that it was made of entry by entry.
    call : tuple or None
        What made it of that tensor: function, arguments and keywords, with notes in place of tensors.
    """

    __slots__ = ("below", "call", "copied", "flags", "parts", "tensor", "version")

    def __init__(
        self,
        tensor: Tensor,
        flags: int,
        copied: Copied | None = None,
        parts: Any = None,
        below: Note | None = None,
        call: Any = None,
    ) -> None:
        self.tensor = weakref.ref(tensor)
        self.version = tensor._version
        self.flags, self.copied, self.parts, self.below, self.call = flags, copied, parts, below, call

    def now(self) -> Tensor | None:
        """The tensor, as long as it is there and has its values."""
        tensor = self.tensor()
        return tensor if tensor is not None and tensor._version == self.version else None


class Copied:
    """How a tensor was copied from the model's input: not at all, or by a call whose operands are copies themselves.

    Parameters
    ----------
    below : Tensor or sequence of Copied
        The model's input, as the caller gave it; or how each of the call's operands was copied.
    call : callable, optional
        Gives the call's result for other operands; None where every entry of the only one stays in its place.
    """

    __slots__ = ("below", "call")

    def __init__(self, below: Tensor | Sequence[Copied], call: Callable[..., Tensor] | None = None) -> None:
        self.below, self.call = below, call

    def inputs(self) -> list[Tensor]:
        """Inputs of the model that are copied."""
        return [self.below] if isinstance(self.below, Tensor) else [i for copied in self.below for i in copied.inputs()]

    def of(self, start: Callable[[Tensor], Tensor]) -> Tensor:
        """The same copies of ``start(input)``."""
        if isinstance(self.below, Tensor):
            return start(self.below)
        below = [copied.of(start) for copied in self.below]
        return below[0] if self.call is None else self.call(*below)


class Notes:
    """Notes of one forward pass.

    Attributes
    ----------
    tolerant : int
        Number of running modules in which tensors may be made unseen.
    has_parts, has_logarithms, has_choices : bool
        Whether rules remember anything of a tensor, whether any is a logarithm of a sum of exponentials, and whether
        any is constant, but says what was chosen.
    """

    def __init__(self) -> None:
        self._notes: dict[int, Note] = {}
        #: Last seen change in place, by base, which may be gone: itself, its version, flags.
        self._writes: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        #: Views by their base, and by which of its entries they have: the same view may be taken more than once.
        self._views: dict[Any, tuple[weakref.ref[Tensor], Note]] = {}
        self._inputs: list[Any] = []  # nodes and leaves of the model's inputs in autograd's graph
        self.tolerant, self.has_parts, self.has_logarithms, self.has_choices = 0, False, False, False

    def enter(self, tensor: Tensor, leaf: Tensor | None) -> None:
        """Note an input of the model; ``leaf`` is what takes relevance that needs no value, if anything does."""
        self._notes[id(tensor)] = Note(tensor, FIRST, None if leaf is None else Copied(leaf))
        self._inputs.append(tensor if tensor.grad_fn is None else tensor.grad_fn)

    def add(
        self, value: Any, flags: int, copied: Copied | None = None, below: Note | None = None, call: Any = None
    ) -> None:
        """Note what an operation made: a tensor, or several."""
        if isinstance(value, Tensor):
            if value.requires_grad:
                note = self._notes[id(value)] = Note(value, flags, copied, None, below, call)
                base = value._base
                is_plain = base is not None and value.layout == torch.strided and not value.is_nested
                if base is not None and is_plain and below is None and not (value.is_complex() or value.is_neg()):
                    place = id(base), value.dtype, value.storage_offset(), value.shape, value.stride()
                    of_base, same = self._views.get(place, (None, note))
                    if of_base is None or of_base() is not base or same.version != value._version:
                        self._views[place] = weakref.ref(base), note
                    else:
                        same.tensor = same.tensor if same.tensor() is not None else note.tensor
                        note.below, note.call = same, (torch.clone, (same,), {})
        elif isinstance(value, tuple | list):
            for item in value:
                self.add(item, flags)

    def add_written(
        self, target: Tensor, flags: int, copied: Copied | None = None, below: Note | None = None, call: Any = None
    ) -> None:
        """Note that an operation has changed a tensor in place; its views and its base change with it."""
        base = target if target._base is None else target._base
        if base is not target:  # a part of it
            note = self._notes.get(id(base))
            whole = note.flags & flags if note is not None and note.tensor() is base else flags & ~NONNEGATIVE
            self._notes[id(base)] = Note(base, whole)
        self._notes[id(target)] = Note(target, flags, copied, None, below, call)
        self._writes[id(base)] = (weakref.ref(base), target._version, flags)

    def add_copy(self, copy: Tensor, original: Tensor) -> None:
        """Note that a tensor is a copy of another one."""
        note = self.of(original)
        if note is not None:
            self._notes[id(copy)] = Note(copy, note.flags, note.copied, note.parts, note.below, note.call)

    def remember(self, tensor: Tensor, parts: Any) -> None:
        """Keep what a rule remembers of the call that made a tensor."""
        note, self.has_parts = self.of(tensor), True
        if note is None and isinstance(tensor, Tensor) and not tensor.requires_grad:
            note = self._notes[id(tensor)] = Note(tensor, 0)
        if note is not None:
            note.parts = parts

    def add_choice(self, value: Any) -> None:
        """Note constants that say what was chosen by the data, such as an index, or a mask made of one."""
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Tensor) and not item.requires_grad:
                note = self._notes[id(item)] = self.of(item) or Note(item, 0)
                note.flags, self.has_choices = note.flags | Born.CHOSEN, True

    def is_chosen(self, tensor: Tensor) -> bool:
        """Whether some entries of a tensor were chosen, or it says which."""
        return bool(self.flags(tensor) & (Born.ROUTED | Born.CHOSEN))

    def __bool__(self) -> bool:
        return bool(self._notes)

    def of(self, tensor: Tensor) -> Note | None:
        """Note of a tensor; None where nothing is known, or it has changed."""
        note = self._notes.get(id(tensor))
        return note if note is not None and note.tensor() is tensor and note.version == tensor._version else None

    def common(self, tensors: Sequence[Tensor]) -> Note | None:
        """Note of what all of these are, or are made of entry by entry: of the last such tensor."""
        found, *others = map(self._notes.get, map(id, tensors))
        for note in others:
            below = set()  # (what this one is made of)
            while note is not None:
                below.add(note)
                note = note.below
            while found is not None and found not in below:
                found = found.below
        return found

    def nonnegative(self, tensor: Tensor) -> bool:
        """Whether a tensor is known not to be negative."""
        note = self.of(tensor)
        return note is not None and bool(note.flags & NONNEGATIVE)

    def born(self, tensor: Tensor) -> int:
        """What made the values of a tensor (`Born`)."""
        note = self.of(tensor)
        return 0 if note is None else note.flags & BORN

    def read(self, values: Iterable[Any], inputs: list[Tensor], unseen: Callable[[Tensor, bool], None]) -> int:
        """Read the operands of a call.

        Parameters
        ----------
        values : iterable
            Operands, also in lists and tuples.
        inputs : list of Tensor
            Those that depend on the model's input are appended.
        unseen : callable
            Called with a tensor that was made or (True) changed in place by something that was not seen.

        Returns
        -------
        int
            What is known of all of them.
        """
        flags = FIRST | NONNEGATIVE | BORN
        for value in values:
            if isinstance(value, Tensor):
                if not value.requires_grad:
                    flags &= _NEUTRAL
                    continue
                note = self._notes.get(id(value))
                if note is None or note.tensor() is not value or note.version != value._version:
                    note = self._find(value, unseen)
                if note is None:
                    flags &= _NEUTRAL
                else:
                    flags &= note.flags
                    inputs.append(value)
            elif isinstance(value, _NESTED) and value:
                if isinstance(value, dict):
                    flags &= self.read(value.values(), inputs, unseen)
                elif not isinstance(value[0], int):
                    flags &= self.read(value, inputs, unseen)
        return flags

    def flags(self, tensor: Tensor) -> int:
        """What is known of a tensor; nothing of one without a note."""
        note = self.of(tensor)
        return 0 if note is None else note.flags

    @atomic
    def entered(self, leaves: Sequence[Tensor], flags: Sequence[int]) -> Iterator[None]:
        """Context in which leaves stand for tensors that depend on the model's input, of which so much is known."""
        before = list(self._inputs)
        self._inputs += leaves
        self._notes |= {id(leaf): Note(leaf, known) for leaf, known in zip(leaves, flags, strict=True)}
        try:
            yield
        finally:
            self._inputs[:] = before

    def leads_outside(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the model's input as it is, or a rule remembers what it was made of."""
        note = self.of(tensor)
        is_remembered = note is not None and getattr(note.parts, "is_shifted", note.parts is not None)
        return note is None or is_remembered or self._reaches_input(tensor)

    def allow(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors that were made unseen where that is allowed."""
        self.tolerant += 1
        self.read(tensors, [], lambda tensor, is_changed: None)
        self.tolerant -= 1

    def _find(self, tensor: Tensor, unseen: Callable[[Tensor, bool], None]) -> Note | None:
        """Note of a tensor that has none of its own for its present values; None if the input has no part in it."""
        note, base = self._notes.get(id(tensor)), tensor if tensor._base is None else tensor._base
        written = self._writes.get(id(base))
        version, flags = written[1:] if written is not None and written[0]() is base else (-1, 0)
        known = note is not None and note.tensor() is tensor
        if not known and tensor._base is not None and not _is_own(tensor.grad_fn):  # a view that no operation returned
            of_base = self._notes.get(id(base))
            known = of_base is not None and of_base.tensor() is base
            if known and of_base is not None and of_base.version == tensor._version:
                flags, version = of_base.flags & ~NONNEGATIVE, tensor._version
        if not known and not self._reaches_input(tensor):
            return None
        if not known or version != tensor._version:
            # (a change in place by what was seen is noted; all else came from elsewhere)
            if not self.tolerant:
                unseen(tensor, known)
            flags = 0
        if known and note is not None and note.tensor() is tensor:
            flags &= note.flags
        new_note = self._notes[id(tensor)] = Note(tensor, flags & ~NONNEGATIVE)
        return new_note

    def _reaches_input(self, tensor: Tensor) -> bool:
        """Whether autograd knows that a tensor depends on the model's input."""
        inputs = {id(item) for item in self._inputs}
        seen: set[Any] = set()
        todo: list[Any] = [tensor.grad_fn] if tensor.grad_fn is not None else []
        if id(tensor) in inputs:
            return True
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if id(node) in inputs or id(getattr(node, "variable", None)) in inputs:
                return True
            todo += [below for below, _ in node.next_functions if below is not None]
        return False

    def clear(self) -> None:
        """Forget everything."""
        self._notes.clear()
        self._writes.clear()
        self._views.clear()
        self._inputs.clear()
        self.tolerant, self.has_parts, self.has_logarithms, self.has_choices = 0, False, False, False


def _is_own(node: Any) -> bool:
    """Whether a node of autograd's graph is of a user's own function, whose gradient may be any, as in a reversal."""
    kind = getattr(type(node), "_forward_cls", None)
    return kind is not None and not kind.__module__.startswith(_TRUSTED)
