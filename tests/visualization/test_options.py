"""Options that several calls share: the keywords that type checkers know are those that there are."""

from __future__ import annotations

from dataclasses import fields

import pytest
from feature_net import make_fv, make_net
from zennit.composites import EpsilonPlus

from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from crp.visualization import Table, mine
from crp.visualization.mining.job import MiningKeywords, MiningOptions, RunKeywords
from crp.visualization.report.write import ReportKeywords, ReportOptions
from crp.visualization.synthesis import SynthesisKeywords, SynthesisSettings

PAIRS = {
    "mining": (MiningKeywords, MiningOptions),
    "report": (ReportKeywords, ReportOptions),
    "synthesis": (SynthesisKeywords, SynthesisSettings),
}


@pytest.mark.parametrize("name", PAIRS)
def test_keywords_and_options_are_the_same(name):
    keywords, options = PAIRS[name]
    known = {field.name: field.type for field in fields(options)}
    assert {key: str(getattr(kind, "__forward_arg__", kind)) for key, kind in _own(keywords).items()} == known


def _own(keywords: type) -> dict[str, object]:
    found: dict[str, object] = {}
    for base in (RunKeywords, keywords) if keywords is MiningKeywords else (keywords,):
        found |= base.__annotations__
    return found


def test_an_option_that_is_none_is_named(tmp_path):
    fv = make_fv(tmp_path)
    with pytest.raises(TypeError, match=r"mining has no option 'batchsize'; there are batch_size, shard_size"):
        mine(CondAttribution(make_net()), fv.dataset, {"first": ChannelConcept()}, None, tmp_path / "t", batchsize=3)
    with pytest.raises(TypeError, match=r"mining has no option 'workers'"):
        fv.run(EpsilonPlus(), workers=3)
    assert not Table.exists(fv.path)


@pytest.mark.parametrize("name", ["preprocess", "single_targets", "device", "fingerprints", "shard_size"])
def test_what_a_feature_visualization_says_itself_is_no_option_of_its_run(tmp_path, name):
    fv = make_fv(tmp_path)
    with pytest.raises(TypeError, match=f"{name} is said by FeatureVisualization itself"):
        fv.run(EpsilonPlus(), **{name: None})
    assert not Table.exists(fv.path)
