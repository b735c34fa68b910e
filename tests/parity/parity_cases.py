"""Attribution calls that both sides run; ``crp`` is whichever package the process imports.

A case returns named arrays. ``wrong`` names those in which zennit-crp 0.6.0 is known to be wrong, each with the number
of the defect; `parity_defects` shows the right values.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from parity_nets import (
    Results,
    dense_output_net,
    flat_attribution,
    images,
    plain_net,
    prefixed,
    residual_net,
    resnet,
    reused_net,
    seeded,
    signal_net,
    table_net,
)
from parity_registry import Case, case_decorator
from torch import Tensor, nn
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import (
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    GuidedBackprop,
    LayerMapComposite,
    MixedComposite,
    NameMapComposite,
)
from zennit.core import Composite
from zennit.rules import AlphaBeta, Epsilon, Gamma, Pass, WSquare, ZPlus
from zennit.torchvision import ResNetCanonizer

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept

CASES: dict[str, Case] = {}
#: ``@case(layer="S1")`` marks the relevance that zennit-crp records at that layer as wrong.
case = case_decorator(CASES, "*relevances/{}")


def composites() -> dict[str, Composite | None]:
    merge = [SequentialMergeBatchNorm()]
    return {
        "gradient": None,
        "plus": EpsilonPlus(canonizers=merge),
        "plus_flat": EpsilonPlusFlat(canonizers=merge),
        "gamma_box": EpsilonGammaBox(low=-3.0, high=3.0, canonizers=merge),
        "alpha_beta": EpsilonAlpha2Beta1(canonizers=merge),
        "alpha_beta_flat": EpsilonAlpha2Beta1Flat(canonizers=merge),
        "no_canonizer": EpsilonPlusFlat(),
        "guided": GuidedBackprop(),
        "names": NameMapComposite(
            [(["conv1"], WSquare()), (["conv2", "fc1"], Gamma(0.3)), (["fc2"], Epsilon(1e-3))], canonizers=merge
        ),
        "layers": LayerMapComposite([(nn.ReLU, Pass()), (nn.Conv2d, ZPlus()), (nn.Linear, Epsilon())]),
        "mixed": MixedComposite(
            [NameMapComposite([(["conv2"], AlphaBeta(2, 1))]), LayerMapComposite([(nn.Linear, Epsilon(0.25))])]
        ),
    }


def plus_flat() -> Composite:
    return EpsilonPlusFlat(canonizers=[SequentialMergeBatchNorm()])


LAYERS = ["conv1", "conv2", "fc1"]


@case()
def every_composite() -> Results:
    attribution, data = CondAttribution(plain_net()), images(2)
    return prefixed(
        **{
            name: flat_attribution(attribution(data, [{"y": [1]}, {"y": [3]}], composite, record_layer=list(LAYERS)))
            for name, composite in composites().items()
        }
    )


@case(conv2="S1")
def every_composite_conditioned() -> Results:
    attribution, data = CondAttribution(plain_net()), images(2)
    conditions = [{"y": [1], "conv2": [2]}, {"y": [3], "conv2": [0, 5]}]
    return prefixed(
        **{
            name: flat_attribution(attribution(data, conditions, composite, record_layer=["conv1", "fc1"]))
            for name, composite in composites().items()
        }
    )


@case(conv2="S1")
def zipped() -> Results:
    conditions = [{"y": [0], "conv2": [1]}, {"y": [4], "conv2": [2, 3]}, {"y": [2], "conv2": [7]}]
    return flat_attribution(CondAttribution(plain_net())(images(3), conditions, plus_flat(), ["conv1"]))


@case(conv2="S1")
def product() -> Results:
    attribution = CondAttribution(plain_net())
    conditions = [{"y": [0], "conv2": [1]}, {"y": [4], "conv2": [2, 3]}, {"y": [2], "conv2": [7]}]
    return prefixed(
        two_by_three=flat_attribution(attribution(images(2), conditions, plus_flat(), ["conv1"])),
        one_by_three=flat_attribution(attribution(images(1), conditions, plus_flat(), ["conv1"])),
        three_by_one=flat_attribution(attribution(images(3), conditions[:1], plus_flat(), ["conv1"])),
        masks_only=flat_attribution(attribution(images(2), conditions, plus_flat(), ["conv1"], exclude_parallel=False)),
    )


@case(fc1="S1", conv2="S1", conv1="S1")
def several_layers() -> Results:
    attribution, data = CondAttribution(plain_net()), images(2)
    ordered = [
        {"y": [1], "fc1": [0, 3, 4, 7], "conv2": [2, 5], "conv1": [0, 1, 4]},
        {"y": [0], "fc1": [1, 2, 6], "conv2": [1, 6], "conv1": [3, 5]},
    ]
    shuffled = [{name: cond[name] for name in ("conv1", "y", "fc1", "conv2")} for cond in ordered]
    return prefixed(
        exclusive=flat_attribution(attribution(data, ordered, plus_flat(), ["relu2", "pool1"])),
        masks_only=flat_attribution(
            attribution(data, ordered, plus_flat(), ["relu2", "pool1"], exclude_parallel=False)
        ),
        any_order=flat_attribution(
            attribution(data, shuffled, plus_flat(), ["relu2", "pool1"], exclude_parallel=False)
        ),
        gradient=flat_attribution(attribution(data, ordered, None, ["relu2", "pool1"])),
    )


@case(conv1="S1", last="S1")
def shortcut() -> Results:
    """With and without the parallel branch of a residual block; a parallel layer is recorded as zeros."""
    attribution, data = CondAttribution(residual_net()), images(2)
    conditions = [{"y": [1], "conv1": [0, 2]}, {"y": [3], "conv1": [1, 5]}]
    above = [{"y": [1], "last": [0, 2], "conv1": [4]}, {"y": [3], "last": [1, 5], "conv1": [3]}]
    composite = LayerMapComposite([(nn.ReLU, Pass()), (nn.Conv2d, ZPlus()), (nn.Linear, Epsilon())])
    results = {}
    for kind, rules in {"gradient": None, "rules": composite}.items():
        for flow, exclusive in {"exclusive": True, "masks_only": False}.items():
            for level, asked in {"inner": conditions, "nested": above}.items():
                attr = attribution(data, asked, rules, ["stem", "shortcut", "conv2"], exclude_parallel=exclusive)
                results[f"{kind}_{flow}_{level}"] = flat_attribution(attr)
    return prefixed(**results)


@case(**{"layer2.0.conv1": "S1", "layer3.0.conv2": "S1"})
def torchvision_resnet() -> Results:
    attribution, data = CondAttribution(resnet()), images(2, shape=(3, 32, 32))
    composite = EpsilonPlusFlat(canonizers=[ResNetCanonizer()])
    record = ["layer1.0.conv1", "layer2.0.downsample.0", "layer3.0.conv1"]
    conditions = [{"y": [1], "layer2.0.conv1": [3, 40]}, {"y": [2], "layer2.0.conv1": [0]}]
    return prefixed(
        unconditioned=flat_attribution(attribution(data, [{"y": [0]}], composite, record)),
        exclusive=flat_attribution(attribution(data, conditions, composite, record)),
        masks_only=flat_attribution(attribution(data, conditions, composite, record, exclude_parallel=False)),
        nested=flat_attribution(
            attribution(data, [{"y": [1], "layer3.0.conv2": [7], "layer2.0.conv1": [1, 2]}], composite, record)
        ),
    )


@case(conv2="S1")
def start_layer() -> Results:
    attribution, data = CondAttribution(plain_net()), images(2)
    conditions = [{"conv2": [2]}, {"conv2": [1, 4]}]

    def at_start(composite: Composite | None, conditions: list, **keywords: object) -> Results:
        return flat_attribution(
            attribution(data, conditions, composite, ["conv1", "fc1"], start_layer="conv2", **keywords)
        )

    return prefixed(
        lrp=at_start(plus_flat(), conditions),
        gradient=at_start(None, conditions),
        masks_only=at_start(plus_flat(), conditions, exclude_parallel=False),
        constant=at_start(plus_flat(), conditions, init_rel=1),
        tensor=at_start(plus_flat(), conditions, init_rel=seeded(2, 8, 6, 6, seed=20)),
        function=at_start(plus_flat(), conditions, init_rel=lambda out: out.clamp(min=0) ** 2),
    )


@case(conv1="S1")
def start_layer_condition_below() -> Results:
    attribution, data = CondAttribution(plain_net()), images(2)
    conditions = [{"conv1": [2]}, {"conv1": [1, 4]}]
    return prefixed(
        exclusive=flat_attribution(attribution(data, conditions, plus_flat(), ["pool1"], start_layer="conv2")),
        masks_only=flat_attribution(
            attribution(data, conditions, plus_flat(), ["pool1"], start_layer="conv2", exclude_parallel=False)
        ),
    )


@case()
def start_layer_unconditioned() -> Results:
    attribution, data = CondAttribution(plain_net()), images(2)
    return flat_attribution(attribution(data, [{}], plus_flat(), ["conv1"], start_layer="fc1"))


@case(conv2="S1")
def initial_relevance() -> Results:
    attribution, data = CondAttribution(plain_net()), images(3)
    with_target = [{"y": [1], "conv2": [2]}, {"y": [0, 3], "conv2": [1]}, {"y": [2], "conv2": [4, 5]}]
    without = [{"conv2": cond["conv2"]} for cond in with_target]
    starts = {
        "constant": 1,
        "numpy_constant": np.int64(3),
        "tensor": seeded(3, 5, seed=21),
        "function": lambda out: out.softmax(-1),
    }
    results = {}
    for kind, init_rel in starts.items():
        for name, conditions in {"target": with_target, "all": without}.items():
            results[f"{kind}_{name}"] = flat_attribution(
                attribution(data, conditions, plus_flat(), ["conv1"], init_rel=init_rel)
            )
    results["gradient"] = flat_attribution(attribution(data, with_target, None, ["conv1"], init_rel=2))
    return prefixed(**results)


@case(conv2="S1", fc1="S1")
def empty_ids() -> Results:
    """``[]`` masks a layer wholly."""
    attribution, data = CondAttribution(plain_net()), images(2)
    conditions = [{"y": [1], "fc1": [1, 2, 3, 6], "conv2": []}, {"y": [3], "fc1": [0, 1, 4, 5], "conv2": [1, 2]}]
    return prefixed(
        exclusive=flat_attribution(attribution(data, conditions, plus_flat(), ["conv1"])),
        masks_only=flat_attribution(attribution(data, conditions, plus_flat(), ["conv1"], exclude_parallel=False)),
        start=flat_attribution(attribution(data, [{"conv2": []}], plus_flat(), ["conv1"], start_layer="conv2")),
    )


@case(conv2="S1")
def kinds_of_ids() -> Results:
    """Targets and concepts as int, list, numpy number, tensor, and from the end; several targets are summed."""
    attribution, data = CondAttribution(plain_net()), images(1)
    kinds = {
        "int": {"y": 4, "conv2": 2},
        "several": {"y": [0, 2, 4], "conv2": [6, 1]},
        "numpy": {"y": np.int64(3), "conv2": np.array([1, 5])},
        "tensor": {"y": torch.tensor(1), "conv2": torch.tensor([3, 0])},
        "scalar_tensor": {"y": torch.tensor([2]), "conv2": torch.tensor(4)},
        "from_the_end": {"y": [-1], "conv2": [-2, 0]},
    }
    return prefixed(
        **{kind: flat_attribution(attribution(data, [cond], plus_flat(), ["conv1"])) for kind, cond in kinds.items()}
    )


@case(conv2="S1", conv1="S1")
def mask_maps() -> Results:
    """A function of the user, one per layer, and neurons instead of channels."""
    attribution, data = CondAttribution(plain_net()), images(2)

    def keep_rows(row: int, rows: list[int], layer_name: str | None = None) -> object:
        def mask(grad: Tensor) -> Tensor:
            kept = torch.zeros_like(grad[row])
            kept[..., rows, :] = 1
            grad = grad.clone()
            grad[row] *= kept
            return grad

        return mask

    neurons = [{"y": [1], "conv2": {2: [0, 7], 3: [5]}}, {"y": [2], "conv2": {1: [11, 12, 13]}}]
    mixed = [{"y": [1], "conv2": [0, 2], "conv1": [3]}, {"y": [2], "conv2": [1, 5], "conv1": [4, 0]}]
    per_layer = {"conv2": keep_rows, "conv1": ChannelConcept.mask}
    return prefixed(
        neurons=flat_attribution(attribution(data, neurons, plus_flat(), ["pool1"], ChannelConcept.mask_rf)),
        neurons_of_instance=flat_attribution(
            attribution(data, neurons, plus_flat(), ["pool1"], ChannelConcept().mask_rf, exclude_parallel=False)
        ),
        own=flat_attribution(
            attribution(data, [{"y": [1], "conv2": [0, 2]}], plus_flat(), ["pool1"], mask_map=keep_rows)
        ),
        per_layer=flat_attribution(attribution(data, mixed, plus_flat(), ["pool1"], mask_map=per_layer)),
    )


@case()
def other_shapes() -> Results:
    """Maps as outputs, tables and signals."""
    dense, table = CondAttribution(dense_output_net()), CondAttribution(table_net())
    signal = CondAttribution(signal_net())
    targets = [{"y": [1]}, {"y": [0, 2]}]
    return prefixed(
        maps=flat_attribution(dense(images(2), targets, EpsilonPlus(), ["conv1"])),
        table=flat_attribution(table(images(2, shape=(7,)), targets, Composite(), ["fc1"])),
        table_lrp=flat_attribution(table(images(2, shape=(7,)), targets, EpsilonPlus(), ["fc1"])),
        signal=flat_attribution(signal(images(2, shape=(2, 16)), targets, EpsilonPlus(), ["conv1", "conv2"])),
    )


@case()
def module_that_runs_twice() -> Results:
    """Its last call is recorded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        attr = CondAttribution(reused_net())(images(2), [{"y": [1]}, {"y": [0, 2]}], None, ["twice"])
    return flat_attribution(attr)


@case(conv1="S1", conv2="S1", fc1="S1")
def other_shapes_conditioned() -> Results:
    dense, table = CondAttribution(dense_output_net()), CondAttribution(table_net())
    signal = CondAttribution(signal_net())
    table_condition = [{"y": [1], "fc1": [2, 5]}]
    return prefixed(
        maps=flat_attribution(dense(images(2), [{"y": [1], "conv1": [2, 4]}], EpsilonPlus())),
        table=flat_attribution(table(images(2, shape=(7,)), table_condition, EpsilonPlus())),
        signal=flat_attribution(
            signal(images(2, shape=(2, 16)), [{"y": [3], "conv2": [0], "conv1": [1, 2]}], EpsilonPlus())
        ),
    )
