"""Places where zennit-crp 0.6.0 is wrong under torch >= 2, each beside a formulation in which it is right.

``asked`` is the call as a user writes it; ``right`` gets the same figures from zennit-crp in a way that avoids the
defect. Ours must give the figures of ``right`` when ``asked``.

======  ===============================================================================================
S1      relevance recorded at a conditioned layer is masked, and doubled with ``exclude_parallel``
S2, S3  conditions with different layers: rows change their order; a zip becomes a product
S4      ``init_rel`` that is a float is ignored
S5      a condition without target shifts the targets of the others
S6      ``generate`` takes targets as channels of the start layer
S7      ``generate`` mixes several samples
S9      ``overwrite_data_grad=False``: heatmaps contain those of earlier groups of conditions
S10     masks write into a gradient that a parallel branch shares
S14     layers whose names contain numbers are merged
S15     activation statistics know only the first of several targets
S16     a sample that is not finite comes first everywhere
S19     the masks of a concept class of the user are not used for reference heatmaps
S20     a second run replaces the first
C1      a last batch of one sample raises
C2      ``generate`` with a callable ``init_rel`` and no target raises
C3      concept ids in a tensor raise
C12     a mask raises where the gradient is an expanded tensor
C13     ``record_layer`` as a tuple raises
N1      receptive-field heatmaps after the first batch of references are not masked
N2      ``compute_stats(norm=True)`` turns the sign where the largest mean is negative
======  ===============================================================================================

Those up to S10, C2, C12 and C13 are shown here, those of mining in `parity_mining_defects`. S and C are the numbers of
the project's list of such defects; the two N were found here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from parity_cases import plus_flat
from parity_nets import (
    Results,
    array,
    flat_attribution,
    images,
    plain_net,
    settle,
    shared_gradient_net,
)
from parity_registry import Compute, Defect, defect_decorator
from torch import Tensor, nn

from crp.attribution import CondAttribution

CASES: dict[str, Defect] = {}
defect = defect_decorator(CASES)


def ask(data: Tensor, conditions: list, *, model: nn.Module | None = None, composite: object = "lrp", **keywords):
    rules = plus_flat() if composite == "lrp" else composite
    return CondAttribution(model or plain_net())(data, conditions, rules, **keywords)


def keep(row: int, channels: list[int], layer_name: str | None = None) -> Callable[[Tensor], Tensor]:
    """Channel mask that does not write into the gradient."""

    def mask(grad: Tensor) -> Tensor:
        kept = torch.ones_like(grad)
        kept[row] = 0
        kept[row, channels] = 1
        return grad * kept

    return mask


def rows(*results: Results) -> Results:
    return {key: np.concatenate([result[key] for result in results]) for key in results[0]}


@defect("S1")
def relevance_at_a_conditioned_layer() -> tuple[Compute, Compute]:
    def asked() -> Results:
        conditions = [{"y": [1], "conv2": [2]}, {"y": [3], "conv2": [0, 5]}]
        return {
            flow: array(ask(images(2), conditions, exclude_parallel=flow == "exclusive").relevances["conv2"])
            for flow in ("exclusive", "masks_only")
        }

    def right() -> Results:
        relevance = array(ask(images(2), [{"y": [1]}, {"y": [3]}], record_layer=["conv2"]).relevances["conv2"])
        return {"exclusive": relevance, "masks_only": relevance}

    return asked, right


@defect("S1")
def relevance_at_nested_conditions() -> tuple[Compute, Compute]:
    def asked() -> Results:
        attr = ask(images(1), [{"y": [1], "fc1": [0, 3, 4], "conv2": [2, 5], "conv1": [1]}])
        return {name: array(attr.relevances[name]) for name in ("fc1", "conv2", "conv1")}

    def right() -> Results:
        above = {"fc1": {"y": [1]}, "conv2": {"y": [1], "fc1": [0, 3, 4]}}
        above["conv1"] = above["conv2"] | {"conv2": [2, 5]}
        return {
            name: array(ask(images(1), [condition], record_layer=[name]).relevances[name])
            for name, condition in above.items()
        }

    return asked, right


@defect("S1")
def relevance_while_generating() -> tuple[Compute, Compute]:
    conditions = [{"y": [i], "conv2": [i + 1]} for i in range(5)]

    def asked() -> Results:
        parts = CondAttribution(plain_net()).generate(images(1), conditions, plus_flat(), batch_size=2, verbose=False)
        return {"conv2": np.concatenate([array(part.relevances["conv2"]) for part in parts])}

    def right() -> Results:
        attr = ask(images(1), [{"y": [i]} for i in range(5)], record_layer=["conv2"])
        return {"conv2": array(attr.relevances["conv2"])}

    return asked, right


DIFFERENT_KEYS = [{"y": [0]}, {"y": [1], "conv2": [2]}, {"y": [3]}]


@defect("S2")
def order_of_different_conditions() -> tuple[Compute, Compute]:
    def asked() -> Results:
        return flat_attribution(ask(images(1), DIFFERENT_KEYS, record_layer=["conv1"]), ["conv1"])

    def right() -> Results:
        one_by_one = (ask(images(1), [condition], record_layer=["conv1"]) for condition in DIFFERENT_KEYS)
        return rows(*(flat_attribution(attr, ["conv1"]) for attr in one_by_one))

    return asked, right


@defect("S3")
def zip_of_different_conditions() -> tuple[Compute, Compute]:
    def asked() -> Results:
        return flat_attribution(ask(images(3), DIFFERENT_KEYS, record_layer=["conv1"]), ["conv1"])

    def right() -> Results:
        samples = [row[None].detach().requires_grad_() for row in images(3)]
        one_by_one = (
            ask(sample, [condition], record_layer=["conv1"])
            for sample, condition in zip(samples, DIFFERENT_KEYS, strict=True)
        )
        return rows(*(flat_attribution(attr, ["conv1"]) for attr in one_by_one))

    return asked, right


@defect("S4")
def float_init_rel() -> tuple[Compute, Compute]:
    def asked() -> Results:
        conditions = [{"y": [1]}, {"y": [2]}]
        return {
            "float": array(ask(images(2), conditions, init_rel=0.5).heatmap),
            "numpy": array(ask(images(2), conditions, init_rel=np.float32(2)).heatmap),
        }

    def right() -> Results:
        conditions = [{"y": [1]}, {"y": [2]}]
        return {
            name: array(ask(images(2), conditions, init_rel=torch.full((2, 5), value).double()).heatmap)
            for name, value in {"float": 0.5, "numpy": 2.0}.items()
        }

    return asked, right


@defect("S5")
def conditions_without_targets_among_others() -> tuple[Compute, Compute]:
    def asked() -> Results:
        attr = ask(images(1), [{}, {"y": [3]}, {"conv2": [1]}], init_rel=1, exclude_parallel=False)
        return {"heatmap": array(attr.heatmap)}

    def right() -> Results:
        alone = [ask(images(1), [c], init_rel=1).heatmap for c in ({}, {"y": [3]}, {"conv2": [1]})]
        return {"heatmap": array(torch.cat(alone))}

    return asked, right


@defect("S6")
def generate_with_start_layer_and_target() -> tuple[Compute, Compute]:
    conditions = [{"y": [1], "conv2": [2]}, {"y": [0], "conv2": [4]}]

    def asked() -> Results:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that y has no effect
            parts = CondAttribution(plain_net()).generate(
                images(1), conditions, plus_flat(), start_layer="conv2", verbose=False
            )
            return {"heatmap": np.concatenate([array(part.heatmap) for part in parts])}

    def right() -> Results:
        return {"heatmap": array(ask(images(1), [{"conv2": [2]}, {"conv2": [4]}], start_layer="conv2").heatmap)}

    return asked, right


@defect("S7")
def generate_for_several_samples() -> tuple[Compute, Compute]:
    conditions = [{"y": [i], "conv2": [i]} for i in range(5)]

    def asked() -> Results:
        parts = CondAttribution(plain_net()).generate(images(2), conditions, plus_flat(), batch_size=3, verbose=False)
        return {"heatmap": np.concatenate([array(part.heatmap) for part in parts])}

    return asked, lambda: {"heatmap": array(ask(images(2), conditions).heatmap)}


@defect("S9")
def kept_data_grad() -> tuple[Compute, Compute]:
    def asked() -> Results:
        attribution = CondAttribution(plain_net(), overwrite_data_grad=False)
        return {"heatmap": array(attribution(images(1), DIFFERENT_KEYS, plus_flat()).heatmap)}

    def right() -> Results:
        alone = [ask(images(1), [condition]).heatmap for condition in DIFFERENT_KEYS]
        return {"heatmap": array(torch.cat(alone))}

    return asked, right


@defect("S10")
def mask_beside_a_branch_that_shares_the_gradient() -> tuple[Compute, Compute]:
    conditions = [{"y": [1], "b": [2]}]

    def figures(**keywords) -> Results:
        attr = ask(
            images(1), conditions, model=shared_gradient_net(), composite=None, record_layer=["a"],
            exclude_parallel=False, **keywords,
        )  # fmt: skip
        return {"heatmap": array(attr.heatmap), "a": array(attr.relevances["a"])}

    return figures, lambda: figures(mask_map=keep)


@defect("C2")
def generate_with_a_function_and_no_target() -> tuple[Compute, Compute]:
    conditions = [{"conv2": [i]} for i in range(5)]

    def asked() -> Results:
        parts = CondAttribution(plain_net()).generate(
            images(1), conditions, plus_flat(), init_rel=torch.exp, batch_size=3, verbose=False
        )
        return {"heatmap": np.concatenate([array(part.heatmap) for part in parts])}

    return asked, lambda: {"heatmap": array(ask(images(1), conditions, init_rel=torch.exp).heatmap)}


class SummedMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).sum((2, 3))


@defect("C12")
def mask_of_an_expanded_gradient() -> tuple[Compute, Compute]:
    def figures(**keywords) -> Results:
        model = settle(SummedMaps(), 12)
        conditions = [{"y": [0, 1, 2], "conv": [1]}]
        return {"heatmap": array(ask(images(1), conditions, model=model, composite=None, **keywords).heatmap)}

    return figures, lambda: figures(mask_map=keep)


@defect("C13")
def record_layer_as_a_tuple() -> tuple[Compute, Compute]:
    def figures(record_layer) -> Results:
        return flat_attribution(ask(images(1), [{"y": [1]}], record_layer=record_layer))

    return lambda: figures(("conv1", "conv2")), lambda: figures(["conv1", "conv2"])
