"""Errors of this package that are more than a bad argument."""

from __future__ import annotations


class CRPError(Exception):
    """Base of the errors of this package."""


class LoadingError(CRPError, ValueError):
    """A model, a dataset or a composite that is named in words cannot be made of them."""


class UnseenError(CRPError, RuntimeError):
    """A tensor that depends on the model's input was made by something that no rule can see.

    Such are scripted and traced parts, custom autograd functions, `torch.func` transforms, other threads and re-entrant
    checkpoints. The plain gradient would be returned under another method's name.
    """


class ConceptError(CRPError, ValueError):
    """A concept type contradicts itself: its scores are not the relevance that its masks let through."""
