"""The demo's data: scikit-learn's handwritten digits with a planted shortcut, so that the right answer is known.

The 1797 real 8x8 digits (Alpaydin and Kaynak, 1998; they come with scikit-learn, nothing is downloaded) are enlarged to
24x24 and framed by 4 black pixels on each side. A small chequered square, the *mark*, is stamped into a corner of most
training images of one digit, as a watermark or a hospital's tag would be: a network can then recognise that digit by
the mark instead of by its shape. A part of the test images of the same digit carries the mark too, so that it can be
found by looking at test data; no image of another digit does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

_IMAGE_SIZE = 32
_FRAME = 4
_CLASS_NAMES = tuple(str(digit) for digit in range(10))


class Box(NamedTuple):
    """A rectangle of pixels: rows ``top`` to ``bottom`` and columns ``left`` to ``right``, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int

    def crop(self, images: Tensor) -> Tensor:
        """View of the part of the images, of shape (..., height, width), that lies in the box."""
        return images[..., self.top : self.bottom, self.left : self.right]

    def share(self, heatmap: Tensor) -> Tensor:
        """Share of the absolute relevance that falls into the box.

        Parameters
        ----------
        heatmap : Tensor of shape (..., height, width)

        Returns
        -------
        Tensor of shape (...)
            Between 0 and 1; 0 where the heatmap is zero everywhere.
        """
        magnitude = heatmap.abs()
        inside = self.crop(magnitude).sum((-2, -1))
        return inside / magnitude.sum((-2, -1)).clamp(min=torch.finfo(magnitude.dtype).tiny)


class Mark(NamedTuple):
    """The planted shortcut.

    Attributes
    ----------
    digit : int
        The class whose images carry the mark.
    box : Box
        Where it is.
    train_share, test_share : float
        Share of that class's training and test images that carry it.
    """

    digit: int = 8
    box: Box = Box(1, 1, 6, 6)
    train_share: float = 0.9
    test_share: float = 0.5

    def stamp(self, images: Tensor) -> Tensor:
        """Copy of the images, of shape (..., height, width), with the mark on each of them: white and black in turn."""
        images = images.clone()
        place = self.box.crop(images)
        rows, columns = (torch.arange(n, device=images.device) for n in place.shape[-2:])
        place.copy_((rows[:, None] + columns + 1) % 2)
        return images


class Digits(Dataset[tuple[Tensor, int]]):
    """Images with their labels.

    Attributes
    ----------
    images : Tensor of shape (n, 1, 32, 32)
        In 0..1.
    labels : Tensor of shape (n,), int64
    marked : Tensor of shape (n,), bool
        Which images carry the mark.
    """

    def __init__(self, images: Tensor, labels: Tensor, marked: Tensor) -> None:
        self.images = images
        self.labels = labels
        self.marked = marked

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class DigitsData(NamedTuple):
    """What `load_digits_data` returns.

    Attributes
    ----------
    train, test : Digits
        899 and 898 images, disjoint.
    mark : Mark
        The planted shortcut.
    class_names : tuple of str
    """

    train: Digits
    test: Digits
    mark: Mark
    class_names: tuple[str, ...]


def load_digits_data(seed: int = 0, mark: Mark | None = None) -> DigitsData:
    """Handwritten digits with the mark planted, split into a training and a test half.

    Parameters
    ----------
    seed : int
        Decides the split and which images carry the mark.
    mark : Mark, optional
        The shortcut to plant; shares of 0 plant none.

    Returns
    -------
    DigitsData

    Raises
    ------
    ImportError
        If scikit-learn, which holds the data, is not installed.
    """
    mark = Mark() if mark is None else mark
    images, labels = _read_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    half = (len(images) + 1) // 2
    train = _plant(images[order[:half]], labels[order[:half]], mark, mark.train_share, generator)
    test = _plant(images[order[half:]], labels[order[half:]], mark, mark.test_share, generator)
    return DigitsData(train, test, mark, _CLASS_NAMES)


def _read_digits() -> tuple[Tensor, Tensor]:
    """All images, enlarged and framed, and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the demo's data come with scikit-learn, which is not installed. "
            'Install it by: python -m pip install "concept-relevance[demo]"'
        ) from error
    bundle = load_digits()
    images = torch.from_numpy(bundle.images).float().div(16).unsqueeze(1)
    side = _IMAGE_SIZE - 2 * _FRAME
    images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    return F.pad(images, [_FRAME] * 4), torch.from_numpy(bundle.target).long()


def _plant(images: Tensor, labels: Tensor, mark: Mark, share: float, generator: torch.Generator) -> Digits:
    """Stamp the mark on a random share of the images of its digit."""
    candidates = (labels == mark.digit).nonzero().flatten()
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[: round(share * len(candidates))]]
    marked = torch.zeros(len(labels), dtype=torch.bool)
    marked[chosen] = True
    images = images.clone()
    images[marked] = mark.stamp(images[marked])
    return Digits(images, labels, marked)
