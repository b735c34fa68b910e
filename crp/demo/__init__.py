"""A small, honest example: real digits, a planted shortcut, a network that falls for it.

>>> from crp.demo import DigitNet, load_digits_data, train
>>> data = load_digits_data(seed=0)
>>> data.train.images.shape, data.test.images.shape
(torch.Size([899, 1, 32, 32]), torch.Size([898, 1, 32, 32]))
"""

from __future__ import annotations

from crp.demo.data import Box, Digits, DigitsData, Mark, load_digits_data
from crp.demo.net import DigitNet
from crp.demo.training import accuracy, predict, train

__all__ = ["Box", "DigitNet", "Digits", "DigitsData", "Mark", "accuracy", "load_digits_data", "predict", "train"]
