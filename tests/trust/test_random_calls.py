"""Random calls give what matrices give, or an error in our own words; the model is as it was.

``CRP_RANDOM_CALLS=20000`` tries so many; a fifth of them are graphs.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from matrix_nets import PLANS, OutOfOrder, RowFlow
from random_calls import METHODS, Call, Drawing
from random_graphs import GraphCall
from trust_cases import differences, state
from wrong_calls import is_ours, spoil

from crp.attribution import CondAttribution
from crp.types import AttributionResults

#: Calls that are tried, and how far they may be off.
N_CALLS = int(os.environ.get("CRP_RANDOM_CALLS", "500"))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}


def draw(seed: int) -> Call:
    """A right call, or a wrong one."""
    drawing = Drawing(seed)
    call = drawing.call()
    if drawing.draw.random() < 0.35:
        while not spoil(drawing, call):
            pass
    return call


def answer(call: Call) -> Any:
    """What a call gives: results, an account, or an error."""
    arguments = dict(call.arguments)
    composite = arguments.pop("composite", None)
    right = call.composite
    composite = right if composite is None else composite
    with call.context(right):
        attribution = CondAttribution(call.model)
        given = (
            arguments.pop("data"),
            arguments.pop("conditions"),
            None if call.by_hand and composite is right else composite,
        )
        if call.kind == "absorbed":
            return attribution.absorbed(*given, **arguments)
        if call.kind == "generate":
            return list(attribution.generate(*given, **arguments))
        return [attribution(*given, **arguments)]


def differs(
    call: Call, what: str, found: torch.Tensor, wanted: list[torch.Tensor], scale: float | None = None
) -> list[str]:
    """What is wrong with one tensor, on the scale of its largest value by default."""
    right = torch.stack(wanted)
    if found.shape != right.shape or found.dtype != call.dtype:
        return [f"{what} has shape {tuple(found.shape)} and {found.dtype}, not {tuple(right.shape)}"]
    if not torch.isfinite(found).all():
        return [f"{what} is not finite"]
    if call.dtype not in TOLERANCE:
        return []
    scale = max(float(right.abs().max()) if scale is None else scale, 1e-12)
    off = float((found.detach().double() - right).abs().max()) / scale
    return [f"{what} is off by {off:.1e}"] if off > TOLERANCE[call.dtype] else []


def wrong_results(call: Call, parts: list[AttributionResults], rows: list[RowFlow]) -> list[str]:
    names = PLANS[call.plan].names()
    last = {name.partition("#")[0]: value for name, value in names.items()} | names
    heatmaps = [part.heatmap for part in parts]
    explained = sorted(call.net().depending & {*range(len(call.inputs))})
    problems = []
    for i in explained:
        of_input = [h if isinstance(h, torch.Tensor) else list(h.values() if isinstance(h, dict) else h)[i]
                    for h in heatmaps]  # fmt: skip
        problems += differs(call, f"heatmap {i}", torch.cat(of_input), [row.heatmaps[i] for row in rows])
    problems += differs(call, "prediction", torch.cat([p.prediction for p in parts]), [row.prediction for row in rows])
    wanted = {*call.arguments.get("record_layer", ()), *(name for meant in call.meant for name in meant.masks)}
    wanted |= {call.arguments["start_layer"]} if "start_layer" in call.arguments else set()
    if any({*part.relevances} != wanted or {*part.activations} != wanted for part in parts):
        return [*problems, f"{[*parts[0].relevances]} are recorded, not {wanted}"]
    for name in wanted:
        for what in ("activations", "relevances"):
            found = torch.cat([getattr(part, what)[name] for part in parts])
            in_rows = [getattr(row, what).get(last[name]) for row in rows]
            if None in [None if t is None else 0 for t in in_rows]:
                continue  # (a layer of another row's condition)
            problems += differs(call, f"{what} of {name}", found, in_rows)
    return problems


def wrong_account(call: Call, found: Any, rows: list[RowFlow]) -> list[str]:
    explained = sorted(call.net().depending & {*range(len(call.inputs))})
    wanted = {
        "initial": [row.initial for row in rows],
        "input": [sum(row.heatmaps[i].sum().item() for i in explained) for row in rows],
        "total": [sum(row.kept.values()) for row in rows],
    }
    # (shares may cancel each other, so that they are compared on the scale of all that started)
    scale = max(map(abs, wanted["initial"] + wanted["input"] + wanted["total"]))
    problems = []
    for what, values in wanted.items():
        in_rows = [torch.tensor(value, dtype=torch.float64) for value in values]
        problems += differs(call, what, getattr(found, what), in_rows, scale)
    return problems


def problems(seed: int) -> list[str]:
    """What is wrong with one call: nothing, if it is as it should be."""
    call = draw(seed)
    before = state(call.model)
    try:
        rows = None if call.wrong else call.wanted()
    except OutOfOrder:
        rows, call.wrong = None, "order"
    found, error = None, None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = answer(call)
        except Exception as raised:
            error = raised
    if changed := differences(before, state(call.model)):
        return [f"changed: {changed}"]
    if error is not None and not is_ours(error):
        return [f"raw: {error!r}"]
    if error is not None:
        return [] if call.wrong else [f"refused: {error!r}"]
    names = [str(one.message) for one in told]
    if call.wrong and call.wrong.startswith(("mask", "ids")) and any("no effect" in name for name in names):
        return []  # (a mask that nothing reaches is not called)
    if call.wrong:
        return [f"accepted: {call.wrong}"]
    expected = [*call.warns, "have no effect", "reads inputs that are passed on only", "Flat gives all"]
    expected += [call.misleads] if call.misleads else []
    expected += ["adds branches up"] if call.gives_all_to_each else []
    wrong = [f"told: {name}" for name in names if not any(part in name for part in expected)]
    if call.misleads and any(call.misleads in name for name in names):
        return wrong  # (where nothing is told, relevance has reached last calls only, and is right)
    if any(row.missed for row in rows) and not any("no effect" in name for name in names):
        wrong.append("silent: a condition without effect")
    return wrong + (wrong_account if call.kind == "absorbed" else wrong_results)(call, found, rows)


def problems_of_graph(seed: int) -> list[str]:
    asked = GraphCall.of(seed)
    before = state(asked.call.model)
    try:
        with warnings.catch_warnings():
            if asked.call.gives_all_to_each:
                warnings.filterwarnings("ignore", "the model adds branches up")
            found = asked.answer()
        wrong = [f"accepted: {asked.wrong}"] if asked.wrong else asked.problems(found)
    except Exception as error:
        right = is_ours(error) and asked.wrong
        wrong = [] if right else [f"{'refused' if is_ours(error) else 'raw'}: {error!r}"]
    changed = differences(before, state(asked.call.model))
    return [*wrong, f"changed: {changed}"] if changed else wrong


@pytest.mark.promise(
    "Results",
    "Any call, right or wrong, gives what matrices give, or an error in our own words; 500 random ones in the "
    "default run, 20,000 by `CRP_RANDOM_CALLS`",
)
@pytest.mark.parametrize("part", range(5))
@pytest.mark.timeout(20000)
def test_random_calls(part):
    found = {}
    for seed in range(part, N_CALLS, 5):
        if wrong := (problems_of_graph if part == 4 else problems)(seed):
            found[seed] = wrong
    assert found == {}


def test_they_are_of_every_kind():
    calls = [draw(seed) for seed in range(200)]
    for kinds in ([c.kind for c in calls], [c.plan for c in calls], [c.method for c in calls]):
        assert min(Counter(kinds).values()) >= 5
    assert {call.method for call in calls} == {*METHODS} and {call.plan for call in calls} == {*PLANS}
    assert {call.kind for call in calls} == {"call", "generate", "absorbed"}
    assert 0.2 < sum(call.wrong is not None for call in calls) / len(calls) < 0.5
