"""Two tables of the same samples, of nets whose concepts are known to have moved, against numbers computed plainly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from command_cases import crp
from feature_net import Images, make_fv, make_net, mined
from zennit.composites import EpsilonPlus

from crp.attribution import CondAttribution
from crp.audit import comparing
from crp.audit.comparing import Comparison, compare
from crp.composites import Gradient
from crp.concepts import AxisConcept, ChannelConcept
from crp.visualization import FeatureVisualization
from crp.visualization.table.ranking import top_k
from crp.visualization.table.store import Table

ORDER = [3, 0, 4, 1, 2]
"""Where each channel of the layer ``second`` comes from, in `reordered`."""


def reordered():
    """The net with the channels of a layer in another order, and otherwise the same."""
    net = make_net()
    with torch.no_grad():
        for parameter in (net.second.weight, net.second.bias):
            parameter.copy_(parameter[ORDER].clone())
        net.hidden.weight.copy_(net.hidden.weight.view(7, 5, 9)[:, ORDER].reshape(7, 45).clone())
    return net


@pytest.fixture
def before(tmp_path) -> FeatureVisualization:
    return mined(tmp_path / "before")


def tables(*found: FeatureVisualization) -> list[Table]:
    return [Table.open(fv.path) for fv in found]


def values(table: Table, layer: str, mode: str, normed: bool) -> dict[tuple[int, int], np.ndarray]:
    found = {}
    for block in table.blocks(layer, mode, "sum", normed):
        found |= dict(zip(zip(block.sample.tolist(), block.target.tolist(), strict=True), block.value, strict=True))
    return found


def test_concepts_in_another_order_are_found(before, tmp_path):
    found = compare(*tables(before, mined(tmp_path / "after", net=reordered())), n_references=3)
    first, second = found.layers["first"], found.layers["second"]
    assert first.partner.tolist() == [0, 1, 2, 3] and first.kept == 4 and first.common.tolist() == [3] * 4
    now_at = np.argsort(ORDER)
    assert second.partner.tolist() == now_at.tolist() and second.kept == 0
    assert np.allclose(second.partner_correlation, 1) and (second.correlation < 0.99).all()
    assert np.allclose(second.share[1][now_at], second.share[0], atol=1e-6)
    assert not np.allclose(second.share[1], second.share[0], atol=1e-3)
    assert found.accuracy is not None and found.accuracy[0] == found.accuracy[1] and not found.moved.any()


@pytest.mark.parametrize("mode", ["relevance", "activation"])
@pytest.mark.parametrize("at_once", [5, 4096])
def test_numbers_are_those_of_the_tables(before, tmp_path, monkeypatch, mode, at_once):
    """Rows are counted that both tables have, and samples that were mined into both."""
    monkeypatch.setattr(comparing, "_AT_ONCE", at_once)
    after = make_fv(tmp_path / "after", net=make_net(1))
    after.run(EpsilonPlus(), 2, 11, batch_size=5, progress=False, targets="prediction")
    pair = tables(before, after)
    found = compare(*pair, ["second"], mode=mode, n_references=4)
    one = found.layers["second"]
    rows = [values(table, "second", mode, True) for table in pair]
    if mode == "activation":
        rows = [{(sample, 0): value for (sample, _), value in some.items()} for some in rows]
    keys = sorted(set(rows[0]) & set(rows[1]))
    assert found.n_rows == len(keys) and found.sample.tolist() == list(range(2, 11))
    assert len(keys) == 9 if mode == "activation" else 0 < len(keys) < 9
    assert np.allclose(one.share, [np.mean([some[key] for key in keys], 0) for some in rows], rtol=1e-6)
    best = [top_k(table, "second", mode, k=4, samples=found.sample).sample for table in pair]
    assert one.common.tolist() == [len(set(best[0][:, i]) & set(best[1][:, i])) for i in range(5)]
    active = [values(table, "second", "activation", False) for table in pair]
    by_sample = [{sample: value for (sample, _), value in some.items()} for some in active]
    columns = [np.array([some[sample] for sample in range(2, 11)], np.float64) for some in by_sample]
    likeness = np.corrcoef(*(column.T for column in columns))[:5, 5:]
    assert np.allclose(one.correlation, likeness.diagonal(), atol=1e-6)
    assert np.allclose(one.partner_correlation, likeness.max(1), atol=1e-6)
    assert one.partner.tolist() == likeness.argmax(1).tolist()
    assert one.changed.tolist() == sorted(range(5), key=lambda i: (one.common[i], -np.abs(one.share[:, i]).max()))
    labels = np.array([i % 3 for i in range(2, 11)])
    assert found.accuracy == tuple((found.prediction == labels).mean(1))
    assert found.moved.tolist() == (found.prediction[0] != found.prediction[1]).tolist()


def test_a_sample_of_several_targets_is_one_reference(tmp_path):
    fv = make_fv(tmp_path / "all")
    fv.run(EpsilonPlus(), progress=False, targets="all")
    for layer, one in compare(*tables(fv, fv)).layers.items():
        assert one.n_references == 8 and one.common.tolist() == [8] * len(one.common), layer


def test_concepts_that_never_vary_are_like_none(before, tmp_path):
    net = make_net()
    with torch.no_grad():
        net.second.weight[2] = 0
        net.second.bias[2] = 0.1
    one = compare(*tables(before, mined(tmp_path / "after", net=net))).layers["second"]
    assert one.correlation[2] == 0 and one.partner[2] != 2 and one.kept == 4
    one = compare(*tables(before, before)).layers["second"]
    assert one.kept == 5


def test_labels_that_are_words_tell_no_accuracy(tmp_path):
    named = ["cat", "dog", "bird"] * 4
    pair = [make_fv(tmp_path / name, Images(labels=named)) for name in "ab"]
    for fv in pair:
        fv.run(EpsilonPlus(), progress=False, targets="prediction")
    assert compare(*tables(*pair)).accuracy is None


def test_what_cannot_be_compared_is_refused(before, tmp_path):
    [table] = tables(before)

    def refused(match: str, *arguments: object, **keywords: object) -> None:
        with pytest.raises(ValueError, match=match):
            compare(table, *arguments, **keywords)

    other = make_fv(tmp_path / "composite")
    other.run(Gradient(), progress=False)
    refused("composite must be the same to be compared .*EpsilonPlus.*gradient", *tables(other))
    assert compare(table, *tables(other), mode="activation").layers["first"].kept == 4
    scored = make_fv(tmp_path / "output", net=make_net())
    scored.attribution = CondAttribution(make_net(), output=lambda found: found * 2)
    scored.run(EpsilonPlus(), progress=False)
    refused("output must be the same to be compared", *tables(scored))
    refused("'first' must be the same .*4 and 6", *tables(mined(tmp_path / "axis", layers={"first": AxisConcept(2)})))
    narrow = mined(tmp_path / "groups", layers={"first": ChannelConcept(), "second": AxisConcept(1, 5)})
    refused("concepts", *tables(narrow))
    refused("no layer is in both", *tables(mined(tmp_path / "hidden", layers=["hidden"])))
    moved = Images()
    moved.data[5] += 1
    refused("sample 5 must be the same", *tables(mined(tmp_path / "moved", moved)))
    refused(
        "sample 0 must be the same .*label 0 and .*label 1",
        *tables(mined(tmp_path / "labels", Images(labels=[1, 1, 2] * 4))),
    )
    part = make_fv(tmp_path / "part")
    part.run(EpsilonPlus(), 0, 4, progress=False)
    rest = make_fv(tmp_path / "rest")
    rest.run(EpsilonPlus(), 4, 12, progress=False)
    with pytest.raises(ValueError, match="no sample in common"):
        compare(*tables(part, rest))
    with pytest.raises(KeyError, match="'third' not found in the table"):
        compare(table, table, ["third"])
    refused("mode", table, mode="heatmap")
    refused("n_references", table, n_references=0)


def test_class_names_must_be_the_same(tmp_path):
    made = []
    for names in (["cat", "dog", "bird"], ["dog", "cat", "bird"]):
        fv = mined(tmp_path / names[0])
        [table] = tables(fv)
        table.restate(12, {**table.header.recipe, "class_names": names})
        made.append(Table.open(table.path))
    with pytest.raises(ValueError, match=r"class names must be the same .*3 with 'cat' first and 3 with 'dog' first"):
        compare(*made)


def test_rows_of_no_common_class_are_refused(tmp_path):
    pair = [make_fv(tmp_path / str(target)) for target in (0, 1)]
    for target, fv in enumerate(pair):
        fv.run(EpsilonPlus(), progress=False, targets=[target])
    with pytest.raises(ValueError, match="explain no sample for the same class"):
        compare(*tables(*pair))


def test_the_command(before, tmp_path):
    [one, other] = tables(before, mined(tmp_path / "after", net=reordered()))
    result = crp("compare", one.path, other.path, "--references", 3, "--concepts", 2)
    assert result.exit_code == 0, result.output
    head, right, first, *rows = result.output.splitlines()
    assert head == "12 of 12 samples and 12 rows in both"
    found: Comparison = compare(one, other, n_references=3)
    assert right.endswith("; another class is predicted for 0 samples") and " right before, " in right
    assert first == "first: 4 of 4 concepts most like the same number after; 3.0 of 3 references the same on average"
    assert [row.startswith("  channel ") for row in rows] == [True, True, False, True, True]
    assert rows[2].startswith("second: 0 of 5 concepts most like the same number after; ")
    worst = int(found.layers["second"].changed[0])
    assert f"  channel {worst}  share " in rows[3] and f"most like channel {ORDER.index(worst)} (1.00)" in rows[3]
    facts = json.loads(crp("compare", one.path, other.path, "--layers", "second", "--json").output)
    assert (facts["samples"], facts["rows"], facts["other_prediction"]) == (12, 12, [])
    assert [row["concept"] for row in facts["layers"]["second"]] == compare(one, other).layers[
        "second"
    ].changed.tolist()
    assert {row["concept"]: row["partner"] for row in facts["layers"]["second"]} == dict(enumerate(np.argsort(ORDER)))
    wrong = crp("compare", one.path, other.path, "--layers", "third")
    assert wrong.exit_code == 1 and "'third' not found in the table" in wrong.output
