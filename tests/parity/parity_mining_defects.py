"""The defects of zennit-crp 0.6.0 in mining and reference samples; see `parity_defects`."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from parity_cases import plus_flat
from parity_mining import MultiLabelVisualization, flat_references, tables, visualization
from parity_nets import Images, MultiLabelImages, Results, array, prefixed, settle
from parity_registry import Compute, Defect, defect_decorator
from torch import nn

from crp.concepts import ChannelConcept

CASES: dict[str, Defect] = {}
defect = defect_decorator(CASES)


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
