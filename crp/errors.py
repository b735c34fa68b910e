"""Errors of this package, which are also of a kind of Python's own."""

from __future__ import annotations


class CRPError(Exception):
    """Base of the errors of this package."""


class LoadingError(CRPError, ValueError):
    """A model, a dataset or a composite that is named in words cannot be made of them."""


class InputError(CRPError, ValueError):
    """A value that does not fit: data, conditions, masks, weights. The message names it, and what would be right."""


class InputTypeError(CRPError, TypeError):
    """A value of a kind that does not fit."""


class UnseenError(CRPError, RuntimeError):
    """A tensor was made where no rule can see it, so that the plain gradient would be given another method's name."""


class ConceptError(CRPError, ValueError):
    """A concept type contradicts itself: its scores are not the relevance that its masks let through."""
