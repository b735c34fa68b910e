"""Mining runs and reference samples that both sides compute; ``crp`` is whichever package the process imports."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from parity_cases import plus_flat
from parity_nets import CLASSES, Images, MultiLabelImages, Results, array, normalise, prefixed, untied_net
from parity_registry import Case, case_decorator
from torch import Tensor
from torch.utils.data import Dataset

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.helper import load_maximization, load_stat_targets, load_statistics
from crp.visualization import FeatureVisualization

LAYERS = ("conv1", "conv2", "fc1")
SIZE = 90

CASES: dict[str, Case] = {}


#: ``@case(ActStats="S15")`` marks the tables whose name contains ``ActStats`` as wrong in zennit-crp.
case = case_decorator(CASES, "*{}*")


class MultiLabelVisualization(FeatureVisualization):
    def multitarget_to_single(self, multi_target: Any) -> np.ndarray:
        return np.flatnonzero(multi_target)


@contextlib.contextmanager
def visualization(
    dataset: Dataset | None = None, kind: type[FeatureVisualization] = FeatureVisualization, **keywords: Any
) -> Iterator[FeatureVisualization]:
    """An index in a folder that lasts as long as the context; nothing is printed."""
    keywords.setdefault("layer_map", {layer: ChannelConcept() for layer in LAYERS})
    attribution = CondAttribution(keywords.pop("model", None) or untied_net())
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        keywords = {"preprocess_fn": normalise, "path": folder} | keywords
        yield kind(attribution, dataset or Images(), **keywords)


def tables(fv: FeatureVisualization) -> Results:
    """Every table that `crp.helper` reads from an index."""
    found: Results = {}

    def keep(name: str, table: Any) -> None:
        for part, values in zip(("data", "rel", "rf"), table, strict=True):
            found[f"{name}/{part}"] = np.array(values)

    for maximization, name in ((fv.RelMax, "RelMax"), (fv.ActMax, "ActMax")):
        for layer in fv.layer_map:
            keep(f"{name}/{layer}", load_maximization(maximization.PATH, layer))
    for statistics, name in ((fv.RelStats, "RelStats"), (fv.ActStats, "ActStats")):
        targets = sorted(load_stat_targets(statistics.PATH).tolist())
        found[f"{name}/targets"] = np.array(targets)
        for layer in fv.layer_map:
            for target in targets:
                keep(f"{name}/{layer}/{target}", load_statistics(statistics.PATH, layer, target))
    return found


@case()
def mining() -> Results:
    """Top tables and class statistics for each meaning of "maximal", the last batch uneven."""
    results = {}
    for target in ("sum", "max"):
        for norm in (True, False):
            with visualization(max_target=target, abs_norm=norm) as fv:
                fv.run(plus_flat(), 0, SIZE, batch_size=16, checkpoint=2)
                results[f"{target}_{'normed' if norm else 'unnormed'}"] = tables(fv)
    return prefixed(**results)


@case()
def mining_with_gradients() -> Results:
    with visualization() as fv:
        fv.run(None, 0, SIZE, 32)
        return tables(fv)


@case()
def mining_a_part() -> Results:
    with visualization() as fv:
        fv.run(plus_flat(), 13, 52, 8)
        return tables(fv)


@case()
def mining_in_two_processes() -> Results:
    with visualization() as fv:
        first = fv.run_distributed(plus_flat(), 0, 50, batch_size=16)
        second = fv.run_distributed(plus_flat(), 50, SIZE, batch_size=16)
        fv.collect_results({key: first[key] + second[key] for key in first})
        return tables(fv)


@case(ActStats="S15")
def mining_several_targets() -> Results:
    with visualization(MultiLabelImages(), MultiLabelVisualization) as fv:
        fv.run(plus_flat(), 0, SIZE, 16)
        return tables(fv)


@case(**{"activation/conv1/normed/values": "N2"})
def statistics() -> Results:
    """Classes for which a concept is most relevant or most active."""
    results: Results = {}
    with visualization() as fv:
        fv.run(plus_flat(), 0, SIZE, 16)
        for mode in ("relevance", "activation"):
            for layer, concept in (("conv1", 2), ("conv2", 5), ("fc1", 0)):
                for name, keywords in {
                    "default": {},
                    "few": {"top_N": 3, "mean_N": 4},
                    "normed": {"top_N": CLASSES, "mean_N": 40, "norm": True},
                }.items():
                    targets, values = fv.compute_stats(concept, layer, mode, **keywords)
                    results[f"{mode}/{layer}/{name}/targets"] = np.array(targets)
                    results[f"{mode}/{layer}/{name}/values"] = array(values)
    return results


def flat_references(references: dict[Any, Any]) -> Results:
    """Samples, and heatmaps where there are any, by concept."""
    found: Results = {}
    for key, value in references.items():
        samples, *rest = value if isinstance(value, tuple) else (value,)
        found[f"{key}/samples"] = array(samples)
        found |= {f"{key}/heatmaps": array(heatmaps) for heatmaps in rest}
    return found


def plot(samples: Tensor, heatmaps: Tensor, rf: bool) -> tuple[Tensor, Tensor]:
    return samples + float(rf), 2 * heatmaps


@case()
def max_references() -> Results:
    results = {}
    with visualization() as fv:
        fv.run(plus_flat(), 0, SIZE, 16)
        for mode in ("relevance", "activation"):
            for layer in LAYERS:
                for name, keywords in {
                    "samples": {"composite": None},
                    "heatmaps": {"composite": plus_flat()},
                    "receptive_field": {"composite": plus_flat(), "rf": True},
                    "range": {"composite": plus_flat(), "rf": True, "r_range": (3, 7)},
                    "batches": {"composite": plus_flat(), "r_range": (0, 7), "batch_size": 3},
                    "gradient_rules": {"composite": type(plus_flat())()},
                }.items():
                    found = fv.get_max_reference([0, 3, 5], layer, mode, plot_fn=None, **keywords)
                    results[f"{mode}/{layer}/{name}"] = flat_references(found)
        results["int"] = flat_references(fv.get_max_reference(4, "conv2", composite=plus_flat(), plot_fn=None))
        results["plot"] = flat_references(
            fv.get_max_reference([2, 1], "conv2", "relevance", (0, 4), plus_flat(), True, plot)
        )
    return prefixed(**results)


@case()
def statistics_references() -> Results:
    results = {}
    with visualization() as fv:
        fv.run(plus_flat(), 0, SIZE, 16)
        for mode in ("relevance", "activation"):
            for layer in LAYERS:
                for name, keywords in {
                    "samples": {"composite": None},
                    "heatmaps": {"composite": plus_flat(), "r_range": (1, 5)},
                    "receptive_field": {"composite": plus_flat(), "rf": True},
                }.items():
                    found = fv.get_stats_reference(2, layer, [0, 3], mode, plot_fn=None, **keywords)
                    results[f"{mode}/{layer}/{name}"] = flat_references(found)
        results["int"] = flat_references(fv.get_stats_reference(4, "conv2", 1, composite=plus_flat(), plot_fn=plot))
    return prefixed(**results)


@case()
def samples() -> Results:
    """What the visualization loads."""
    with visualization() as fv:
        plain, label = fv.get_data_sample(7, preprocessing=False)
        prepared, _ = fv.get_data_sample(7)
        batch, labels = fv.get_data_concurrently([4, 2, 9], preprocessing=True)
    return {
        "plain": array(plain),
        "label": np.array(label),
        "prepared": array(prepared),
        "batch": array(batch),
        "labels": np.array([int(label) for label in labels]),
        "requires_grad": np.array([prepared.requires_grad, isinstance(plain, torch.Tensor)]),
    }
