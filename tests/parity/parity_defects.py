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

S and C are the numbers of the project's list of such defects; the two N were found here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from parity_cases import plus_flat
from parity_mining import MultiLabelVisualization, flat_references, tables, visualization
from parity_nets import (
    Images,
    MultiLabelImages,
    Results,
    array,
    flat_attribution,
    images,
    plain_net,
    prefixed,
    settle,
    shared_gradient_net,
)
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept

Compute = Callable[[], Results]


@dataclass(frozen=True)
class Defect:
    """One defect: its number in the list of the peer's defects, and the two ways to compute the same figures."""

    number: str
    asked: Compute
    right: Compute

    def compute(self) -> Results:
        """What the peer gives for both; ``asked/error`` where it raises."""
        try:
            asked = self.asked()
        except Exception as error:
            asked = {"error": np.array(repr(error))}
        return prefixed(asked=asked, right=self.right())


CASES: dict[str, Defect] = {}


def defect(number: str) -> Callable[[Callable[[], tuple[Compute, Compute]]], None]:
    def register(build: Callable[[], tuple[Compute, Compute]]) -> None:
        CASES[f"{number}_{build.__name__}"] = Defect(number, *build())

    return register


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


def mined(start: int, stop: int, batch_size: int = 16, **keywords) -> Results:
    with visualization(**keywords) as fv:
        fv.run(plus_flat(), start, stop, batch_size)
        return tables(fv)


@defect("C1")
def last_batch_of_one() -> tuple[Compute, Compute]:
    return lambda: mined(0, 51, 10), lambda: mined(0, 51, 17)


@defect("S20")
def two_runs_in_one_folder() -> tuple[Compute, Compute]:
    def asked() -> Results:
        with visualization() as fv:
            fv.run(plus_flat(), 0, 40, 16)
            fv.run(plus_flat(), 40, 90, 16)
            return tables(fv)

    return asked, lambda: mined(0, 90)


class OneBroken(Images):
    """The last image is not finite."""

    def __init__(self) -> None:
        super().__init__(60)
        self.data[-1, 0, 3, 3] = float("nan")


@defect("S16")
def image_that_is_not_finite() -> tuple[Compute, Compute]:
    def asked() -> Results:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is skipped
            return mined(0, 60, dataset=OneBroken())

    return asked, lambda: mined(0, 59, dataset=OneBroken())


class HasLabel(MultiLabelImages):
    """Label 1 where the image carries label ``wanted``, else 0."""

    wanted = 3

    def __getitem__(self, index: int):
        image, hot = super().__getitem__(index)
        return image, int(hot[self.wanted])


@defect("S15")
def activation_statistics_of_several_targets() -> tuple[Compute, Compute]:
    def asked() -> Results:
        found = mined(0, 90, dataset=MultiLabelImages(), kind=MultiLabelVisualization)
        return {key.replace("/3/", "/"): value for key, value in found.items() if "ActStats" in key and "/3/" in key}

    def right() -> Results:
        found = mined(0, 90, dataset=HasLabel())
        return {key.replace("/1/", "/"): value for key, value in found.items() if "ActStats" in key and "/1/" in key}

    return asked, right


def named(block: str) -> nn.Module:
    """Two convolutions of equal width in a block that the caller names."""
    model = nn.Sequential()
    model.add_module(block, nn.Sequential())
    model.get_submodule(block).add_module("a", nn.Conv2d(3, 4, 3))
    model.get_submodule(block).add_module("b", nn.Conv2d(4, 4, 3))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(256, 5))
    return settle(model, 13)


@defect("S14")
def layer_names_with_numbers() -> tuple[Compute, Compute]:
    def figures(block: str) -> Results:
        layer_map = {f"{block}.a": ChannelConcept(), f"{block}.b": ChannelConcept()}
        found = mined(0, 50, model=named(block), layer_map=layer_map)
        return {key.replace(block, "block"): value for key, value in found.items()}

    return lambda: figures("enc_1_2_"), lambda: figures("encoder")


def references(ids, batch_size: int = 32, concept: ChannelConcept | None = None, **keywords) -> Results:
    layer_map = {"conv2": concept or ChannelConcept()}
    with visualization(layer_map=layer_map) as fv:
        fv.run(plus_flat(), 0, 60, 16)
        found = fv.get_max_reference(
            ids, "conv2", composite=plus_flat(), plot_fn=None, batch_size=batch_size, **keywords
        )
        return flat_references({i: found[int(i)] for i in torch.as_tensor(ids).flatten().tolist()})


@defect("C3")
def concept_ids_as_a_tensor() -> tuple[Compute, Compute]:
    return lambda: references(torch.tensor([[2, 0]])), lambda: references([2, 0])


@defect("N1")
def receptive_fields_in_batches() -> tuple[Compute, Compute]:
    return lambda: references([1, 6], 3, rf=True), lambda: references([1, 6], 32, rf=True)


@defect("N2")
def normed_statistics_of_a_negative_concept() -> tuple[Compute, Compute]:
    def means(norm: bool) -> Results:
        with visualization(layer_map={"conv1": ChannelConcept()}) as fv:
            fv.run(plus_flat(), 0, 90, 30)
            targets, values = fv.compute_stats(2, "conv1", "activation", norm=norm)
            return {"targets": np.array(targets), "values": array(values)}

    def right() -> Results:
        found = means(norm=False)
        return found | {"values": found["values"] / abs(found["values"][0])}

    return lambda: means(norm=True), right


class Mirrored(ChannelConcept):
    """Concept ``i`` is the channel ``7 - i``."""

    def mask(self, batch_id, concept_ids, layer_name=None):
        return ChannelConcept.mask(batch_id, [7 - i for i in concept_ids], layer_name)

    def mask_rf(self, batch_id, c_n_map, layer_name=None):
        return ChannelConcept.mask_rf(batch_id, {7 - i: neurons for i, neurons in c_n_map.items()}, layer_name)

    def attribute(self, relevance, mask=None, layer_name=None, abs_norm=True):
        return super().attribute(relevance, mask, layer_name, abs_norm).flip(1)

    def reference_sampling(self, relevance, layer_name=None, max_target="sum", abs_norm=True):
        return tuple(part.flip(1) for part in super().reference_sampling(relevance, layer_name, max_target, abs_norm))


@defect("S19")
def concept_of_the_user() -> tuple[Compute, Compute]:
    def asked() -> Results:
        found = {flag: references([1, 5], concept=Mirrored(), rf=flag == "rf") for flag in ("rf", "whole")}
        return prefixed(**found)

    def right() -> Results:
        found = {flag: references([6, 2], rf=flag == "rf") for flag in ("rf", "whole")}
        renamed = {"6": "1", "2": "5"}
        return {
            f"{flag}/{renamed[key[0]]}{key[1:]}": value
            for flag, values in found.items()
            for key, value in values.items()
        }

    return asked, right
