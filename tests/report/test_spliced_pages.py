"""Pages of a spliced dictionary's latents say what it does not explain."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from feature_net import Images, make_fv, make_net
from report_cases import Parsed

from crp.composites import EpsilonPlus
from crp.concepts import splice
from crp.concepts.spliced import spliced_parts
from crp.visualization.report import write_report
from crp.visualization.report.spliced import unexplained_of
from crp.visualization.table.store import Table
from crp.wording import percent


def dictionary(kept: int) -> SimpleNamespace:
    """Of 5 channels, the first few: the rest is its error."""
    keep = (torch.arange(5) < kept).double()
    return SimpleNamespace(encode=lambda activation: activation * keep, decode=lambda latents: latents)


@pytest.mark.parametrize("kept", [0, 2, 5], ids=["nothing", "two channels", "all"])
def test_the_error_is_that_of_the_channels_left_out(tmp_path, kept):
    net = make_net()
    with splice(net, "second", dictionary(kept)) as names:
        fv = make_fv(tmp_path, net=net, layers=[names.code])
        fv.run(EpsilonPlus(), 0, 12, progress=False)
        table = Table.open(fv.path)
        ((layer, found),) = unexplained_of(fv, EpsilonPlus(), table, ["first", names.code]).items()
        assert layer == names.code and found.n == 12
        folder = write_report(fv, EpsilonPlus(), tmp_path / "out", n_references=2, verbose=False).parent
    plain = make_fv(tmp_path / "plain")
    samples, targets = Images().data, Images().labels
    result = plain.attribution(samples, [{"y": label} for label in targets], EpsilonPlus(), ["second"])
    for value, whole in ((found.activation, result.activations["second"].square()),
                         (found.relevance, result.relevances["second"].abs())):  # fmt: skip
        assert value == pytest.approx((whole[:, kept:].sum() / whole.sum()).item(), abs=1e-9)
    sentence = f"does not explain {percent(found.activation)} of the activation (squared) and "
    sentence += f"{percent(found.relevance)} of the absolute relevance of its layer, on 12 samples"
    for page in ("layer/second.code.html", "concept/second.code/0.html"):
        assert sentence in Parsed(folder / page).text


def test_the_error_is_compared_with_the_layers_output_and_not_with_the_difference(tmp_path):
    net = make_net()
    half = SimpleNamespace(encode=lambda activation: activation, decode=lambda latents: latents / 2)
    with splice(net, "second", half) as names:
        fv = make_fv(tmp_path, net=net, layers=[names.code])
        fv.run(EpsilonPlus(), 0, 3, progress=False)
        found = unexplained_of(fv, EpsilonPlus(), Table.open(fv.path), [names.code])[names.code]
    assert found == (pytest.approx(0.25), pytest.approx(0.5), 3)


def test_other_layers_are_no_latents():
    net = make_net()
    with splice(net, "second", dictionary(2)) as names:
        assert spliced_parts(net, names.code) == names
        assert spliced_parts(net, names.error) is None and spliced_parts(net, "first") is None
    assert spliced_parts(net, "second.code") is None
