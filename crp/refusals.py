"""Refusals of what is given: each is a `CRPError`, and an error of the kind that Python has for it."""


class CRPError(Exception):
    """Base of the errors of this package."""


class InputError(CRPError, ValueError):
    """A value that does not fit: data, conditions, masks, weights. The message names it, and what would be right."""


class InputTypeError(CRPError, TypeError):
    """A value of a kind that does not fit."""


class NameNotFoundError(CRPError, KeyError):
    """A name that is not there: of a layer, a class, an output. The message lists those that are."""

    __str__ = Exception.__str__  # (that of a `KeyError` puts the message in quotes)


class OutOfRangeError(CRPError, IndexError):
    """A number that is not there: of a class, a channel, a token. The message says how many there are."""
