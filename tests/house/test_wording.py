"""Lists in messages, and shares in text."""

from __future__ import annotations

import re

import numpy as np
import pytest
from house_plan import PACKAGE

from crp.notices import kind_of
from crp.wording import counted, first_few, percent


@pytest.mark.parametrize(
    ("n_words", "n", "kind", "wanted"),
    [
        (0, 2, "", ""),
        (2, 2, "layers", "w0, w1"),
        (3, 2, "", "w0, w1 and 1 more"),
        (5, 2, "layers", "w0, w1 and 3 more layers"),
    ],
)
def test_the_first_few_words(n_words, n, kind, wanted):
    assert first_few([f"w{i}" for i in range(n_words)], n, kind) == wanted


def test_one_thing_is_no_plural():
    assert [counted(n, "layer") for n in range(3)] == ["0 layers", "1 layer", "2 layers"]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1, "100.0 %"),
        (0.0636, "6.4 %"),
        (0.0096, "1.0 %"),
        (0.0004, "0.04 %"),
        (-0.004, "−0.40 %"),
        (1e-5, "< 0.01 %"),
        (-1e-30, "> −0.01 %"),
        (-0.0, "0 %"),
        (float("nan"), "nan %"),
    ],
)
def test_shares_are_written_with_the_digits_they_need(share, text):
    assert percent(share) == text.replace(" ", "\N{NO-BREAK SPACE}")


def test_shares_are_written_by_this_function_alone():
    code = [path for path in PACKAGE.rglob("*.py") if path.name != "wording.py"]
    assert [str(path) for path in code if re.search(r":[+,]?(\.\d+)?%\}", path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        ({}, "a dict"),
        (1, "an int"),
        (ArithmeticError(), "an ArithmeticError"),
        (np.zeros((2, 3)), "an ndarray of shape (2, 3)"),
    ],
)
def test_kinds_have_their_article_and_shape(value, text):
    assert kind_of(value) == text


def test_kinds_are_named_by_this_function_alone():
    code = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert [str(path) for path, text in code.items() if re.search(r"\ban? (\"\s*f\")?\{(type\(|kind)", text)] == []
