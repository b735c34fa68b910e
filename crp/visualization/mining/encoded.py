"""Samples in two steps: read in one form by the processes that load them, and made tensors a batch at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from crp.visualization.mining.datasets import Sample


class Decoder(ABC):
    """Makes samples of what was read of them; one for each run."""

    @abstractmethod
    def decode(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        """Samples as the dataset gives them, on its device; or with the problem of those that are none."""

    @abstractmethod
    def finish(self) -> None:
        """Warn of what was unusual in the run."""


class Encoded(ABC):
    """Dataset of pairs (tensor, label) that are made of files on a device.

    Attributes
    ----------
    files : Dataset
        What is read of each sample: pairs (encoded, label), which samples are recognised by, too.
    device : torch.device
        Where the dataset's tensors are made.
    """

    files: Any
    device: torch.device

    @abstractmethod
    def on(self, device: torch.device | str) -> Encoded:
        """The same samples on another device."""

    @abstractmethod
    def mark(self, kind: str | None = None) -> str:
        """Fingerprint of what makes tensors of files, on this or another kind of device."""

    @abstractmethod
    def words(self) -> dict[str, Any]:
        """What a recipe says of it."""

    @abstractmethod
    def decoder(self) -> Decoder:
        """What makes tensors of files in a run."""


def encoded_in(dataset: Any) -> Encoded | None:
    """The dataset, if its samples are made of files on a device."""
    return dataset if isinstance(dataset, Encoded) else None


def on_device(dataset: Any, device: torch.device | str) -> Any:
    """Dataset whose samples are made on a device, if it is one that makes them; any other is left as it is."""
    return dataset.on(device) if isinstance(dataset, Encoded) else dataset


def files_of(dataset: Any) -> Any:
    """What is read of a dataset."""
    return dataset.files if isinstance(dataset, Encoded) else dataset
