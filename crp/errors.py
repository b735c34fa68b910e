"""Errors of this package, which are also of a kind of Python's own. ``except CRPError`` catches all of them."""

from crp.refusals import CRPError, InputError, InputTypeError, NameNotFoundError, OutOfRangeError

__all__ = ["CRPError", "ConceptError", "InputError", "InputTypeError", "LoadingError", "NameNotFoundError",
           "OutOfRangeError", "StateError", "UnseenError"]  # fmt: skip


class LoadingError(InputError):
    """A model, a dataset or a composite that is named in words cannot be made of them."""


class ConceptError(InputError):
    """A concept type contradicts itself: its scores are not the relevance that its masks let through."""


class StateError(CRPError, RuntimeError):
    """A call at the wrong time: something else is on the model, or a pass that it needs was not run."""


class UnseenError(StateError):
    """A tensor was made where no rule can see it, so that the plain gradient would be given another method's name."""
