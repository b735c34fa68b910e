"""Any input gives the right rows, or an error that names the culprit."""

from __future__ import annotations

import torch
from attribution_cases import SMALL, close, small_net
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlus
from crp.engine.conditions import Rows

MODEL = small_net()
ATTRIBUTION = CondAttribution(MODEL)

odd = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.floats(), st.text(max_size=2), st.binary(max_size=1),
    st.just(2**70), st.just(...), st.complex_numbers(), st.dates(), st.just(slice(1)),
)  # fmt: skip
few = st.lists(st.integers(-3, 2), max_size=3)
ids = st.one_of(st.integers(-3, 2), few, few.map(torch.tensor))
odd_ids = st.one_of(
    odd, st.lists(odd, max_size=2), st.lists(few, max_size=2), st.sets(st.integers(0, 3), max_size=2),
    st.dictionaries(st.integers(0, 3), few, max_size=2), st.lists(st.booleans(), max_size=4).map(torch.tensor),
    st.lists(st.floats(-2, 2), max_size=2).map(torch.tensor), st.integers(-9, 9),
)  # fmt: skip
names = st.sampled_from(["y", "conv2", "conv1", "conv2#0"])
odd_names = st.one_of(st.sampled_from(["conv2#1", "nope", "", "#0", "7", "conv2.weight"]), odd)
condition = st.dictionaries(names, ids, min_size=1, max_size=3)
conditions = st.lists(condition, min_size=1, max_size=3)
odd_conditions = st.one_of(
    st.lists(st.dictionaries(names | odd_names, ids | odd_ids, max_size=3) | odd, max_size=3), odd, condition
)
start = st.one_of(st.none(), st.integers(-1, 3), st.floats(-2, 2), st.just(lambda prediction: prediction**2))
odd_start = st.one_of(
    odd, st.lists(st.integers(1, 4), max_size=3).map(torch.ones), odd.map(lambda value: lambda prediction: value)
)
arguments = {
    "record_layer": (st.lists(names, max_size=2), st.lists(names | odd_names, max_size=2) | odd),
    "start_layer": (st.none() | st.sampled_from(["conv1", "conv2#0"]), names | odd_names),
    "init_rel": (start, odd_start),
    "mask_map": (st.none(), odd | st.dictionaries(names, odd, max_size=2)),
    "composite": (st.sampled_from([None, EpsilonPlus()]), odd),
}

#: What a message may speak of.
CULPRITS = ("condition", "layer", "init_rel", "'y'", "mask", "composite")


@settings(max_examples=300, deadline=None)
@given(st.data(), st.booleans(), st.sampled_from([None, 1, 2]))
def test_any_input_is_right_or_a_clear_error(data, exclude_parallel, batch_size):
    wrong = data.draw(st.sets(st.sampled_from(["conditions", *arguments]), max_size=2), label="wrong")
    asked = data.draw(odd_conditions if "conditions" in wrong else conditions, label="conditions")
    keywords = {name: data.draw(kinds[name in wrong], label=name) for name, kinds in arguments.items()}
    keywords["exclude_parallel"] = exclude_parallel
    if "mask_map" not in wrong:
        del keywords["mask_map"]
    try:
        if batch_size is None:
            found = ATTRIBUTION(SMALL, asked, **keywords).heatmap
        else:
            parts = ATTRIBUTION.generate(SMALL, asked, batch_size=batch_size, verbose=False, **keywords)
            found = torch.cat([part.heatmap for part in parts])
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        assert any(culprit in str(error) for culprit in CULPRITS), repr(error)
        return
    except UserWarning as warning:
        assert "no effect" in str(warning)
        return
    rows = Rows.broadcast(len(SMALL), asked)
    assert len(found) == len(rows)
    assert torch.isfinite(found).all()
    assume(not isinstance(keywords["init_rel"], torch.Tensor))
    for row, (sample, one) in enumerate(zip(rows.samples, rows.conditions, strict=True)):
        alone = ATTRIBUTION(SMALL[[sample]], [one], **keywords).heatmap
        assert close(found[[row]], alone)
