"""The tutorials run from top to bottom in a clean place, and what they claim is so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from notebooks import CHECKPOINT, ROOT, check_stored, errors_of, execute, pictures
from PIL import Image

pytestmark = pytest.mark.timeout(900)  # (the first test waits for all notebooks)
TUTORIALS = ROOT / "tutorials"
PICTURES = {
    "1_attribution": 11,
    "2_feature_visualization": 11,
    "3_your_own_rule": 5,
    "4_your_own_composite": 2,
    "5_your_own_canonizer": 1,
    "6_finding_and_removing_a_shortcut": 3,
    "7_prototypes_and_audit": 3,
    "8_correcting_a_shortcut": 1,
    "9_directions_and_autoencoders": 2,
    "10_segmentation_and_detection": 2,
    "12_vision_transformers": 4,
    "11_language_models": 4,
}
#: Those that explain VGG16 as well.
SWITCHED = {"1_attribution", "2_feature_visualization"}
#: Those that train models of their own for a minute.
LONG = {
    "9_directions_and_autoencoders",
    "10_segmentation_and_detection",
    "11_language_models",
    "12_vision_transformers",
}

# Run as the last cell of each notebook, with the names that the notebook has defined.
CLAIMS = {
    "1_attribution": """
assert accuracy(model, data.test) > 0.95
assert unchanged
assert torch.allclose(relevance.sum(1), heatmap, atol=1e-6)
assert 0.7 < heatmap.sum() / prediction[0, TARGET] < 1.05
assert difference < 1e-5
assert torch.allclose(result.heatmap, attribution(sample, [
    {"y": TARGET, layer: [channel]} for layer, channel in place
], composite).heatmap)

# the suspect lives on the mark, and nothing holds more of what lies there
assert names[TARGET] == "8"
assert in_corner[suspect] > 0.6
assert shares[suspect] > 0.07
assert connections[UPPER, suspect][0][1] == strongest[0]

# the experiments
assert plain_rate < 0.05
assert stamped_rate > plain_rate + 0.2
assert rate_without < 0.9 * stamped_rate
assert accuracy_without > 0.93
""",
    "2_feature_visualization": """
assert table.coverage().seen == [(0, 898)] and not table.coverage().missing
assert SUSPECT_CLASS == data.mark.digit
assert spread.max() > 1.3 * np.delete(spread, row, axis=0).max()
assert references_marked >= 0.8
assert with_mark > 3 * abs(without_mark)
assert targets[0] == SUSPECT_CLASS

# its receptive fields see the mark
samples, heatmaps = fv.get_max_reference(suspect, LAYER, composite=composite, rf=True, plot_fn=None)[suspect]
around = type(data.mark.box)(0, 0, 8, 8)
assert around.share(heatmaps).mean() > 0.8

assert sample[0, suspect] == top_k(table, LAYER).sample[0, suspect]
assert position.max() < 16 * 16
""",
    "3_your_own_rule": """
assert max(*laws_of_magnitude.values(), *laws_of_repaired.values()) < 1e-10
assert abs(laws_of_energy["conservation"] - 1) < 1e-10 and laws_of_energy["homogeneity"] < 1e-10

# who makes the call does not matter, but a bias that is added later does
assert list(like.values()) == ["with bias"] * 2 + ["without bias"] * 4

# what the rules say of the mark, and what erasing it does
assert 0.85 < truth < 1
assert found["Magnitude"] < found["z⁺"] < truth - 0.3 and found["LRP-0"] > truth + 0.15
assert list(shares.values()) == sorted(shares.values())
assert abs(shares[1] - truth) < 0.1 and abs(gammas[0.1] - truth) < 0.1

# what is kept: biases by z⁺, black windows of the first layer by Magnitude
kept = {name: {layer: shares["empty"].item() for layer, shares in a.layers.items()} for name, a in accounts.items()}
assert sum(shares["bias"].item() for shares in accounts["z⁺"].layers.values()) > 0.5
assert sum(shares["bias"].abs().item() for shares in accounts["Magnitude"].layers.values()) < 1e-10
assert kept["Magnitude"]["conv1"] > 0.99 * sum(kept["Magnitude"].values()) > 0.5
assert agreement["FromRest"] > agreement["Pass"] + 0.2
""",
    "4_your_own_composite": """
assert "logcumsumexp" in str(caught[0].message) and not composite.report(model, sample).left
rules = {name: rule.split("(")[0] for name, rule in reached.items()}
assert rules == {
    "net.conv1": "ZBox", "net.conv2": "Gamma", "net.block.conv1": "ZPlus", "net.block.conv2": "Gamma", "net.fc": "LRP0"
}
assert "0.05" in reached["net.block.conv2"] and reached_changed["net.conv1"] == "ZBox"
assert "'net.block.relu1'" in refused[0] and "nearest" in refused[1] and "Flat" in not_plain
assert [len(operations) for operations in inside.values()] == [5, 5, 1]
assert [{rule for _, rule in operations} for operations in inside.values()] == [
    {"Gamma", "ordinary chain rule"}, {"ordinary chain rule"}, {"Whole"}
]
assert "net.pool2" in unseen and "Whole" in unseen
assert max(falls[name] for name in composites) < falls["random"] - 1
assert min(lasts[name] for name in composites) > lasts["random"] + 1
assert max(falls["Graded"], falls["LRP-0"]) < falls["EpsilonPlusFlat"] - 0.1
assert min(lasts["Graded"], lasts["EpsilonPlusFlat"]) > lasts["LRP-0"] + 0.3
""",
    "5_your_own_canonizer": """
assert abs(ratio_ours - 1) < 1e-5 and ratio_zennit > 1.5
assert negative_plain > 0.03 and negative_merged < 1e-10
assert max(kept_plain.values()) > 0.1 and set(kept_merged.values()) == {0.0}
assert difference["LRP-0"] < 1e-10 and difference["z⁺"] > 0.05
assert abs(agreements["z⁺"][0] - agreements["z⁺"][1]) < 0.05
assert changes["zennit's in ours"] > 1e3 * changes["ours in zennit's"]
assert undone
""",
    "6_finding_and_removing_a_shortcut": """
assert (CLASS, first.where) == (data.mark.digit, "at the top left")
assert {(one.target, one.where) for one in suspects[:5]} == {(CLASS, first.where)} and len(alike) >= 2
assert page.exists() and (page.parent / "suspects.html").exists()
assert torch.equal(suspicious, data.test.marked)

before, one, all_alike, along, after = results.values()
assert before["accuracy"] > 0.95 and before["with corner"] > 0.99
assert before["without"] < 0.8 and before["fooled"] > 0.5 and before["relevance"] > 0.5
assert before["fooled"] > one["fooled"] + 0.2 and one["fooled"] > all_alike["fooled"] + 0.1
assert along["fooled"] < 0.15 and all(abs(r["accuracy"] - before["accuracy"]) < 0.02 for r in (one, all_alike, along))
assert after["accuracy"] > before["accuracy"] and after["without"] > 0.93 and after["fooled"] < 0.02
assert suspects_after[0].score < first.score / 3
assert all(one.where != first.where for one in suspects_after[:5])
""",
    "9_directions_and_autoencoders": """
assert min(shares.values()) > 0.65 and shares["CAV"] > 0.8 and shares["latent"] > 0.8
assert abs((parts.heatmap.sum(0) - whole.heatmap[0])).max() < 1e-5
assert abs(right - alone) > 0.1 * abs(right)
assert explained > 0.8 and active < 0.2
assert change < 1e-4 and moved < 1e-5 and 0 < error < 0.2
assert torch.allclose(total, after.relevances[names.code].flatten(1).sum(1)
                      + after.relevances[names.error].flatten(1).sum(1))
assert drop.mean() > 0.2
""",
    "10_segmentation_and_detection": """
assert plain_threes < 0.1 and stamped_threes > 0.3
assert (account.rest / account.initial).abs().max() < 1e-5
assert of_pixels.heatmap.any() and means.max() > means.min() + 0.1
with_mark, without, of_threes, of_stamped = rates
assert with_mark > 0.9 and of_stamped > 0.8 and without < 0.3 and of_threes < 0.1
assert on_mark > 0.1 and outside > on_mark
assert [tuple(heatmap.shape) for heatmap in several.heatmap] == [(48, 48), (44, 44)]
assert agreement > 0.5
""",
    "7_prototypes_and_audit": """
# marked 8s are prototypes, and a cluster, of their own
assert set(marked_share) == {0.0, 1.0} and set(shares) == {0.0, 1.0}
assert parts.sizes == [43, 43] and {marked[parts.members(i)].double().mean().item() for i in (0, 1)} == {0.0, 1.0}
assert 100 * difference[suspect] > 10 and suspect in [concept for concept, _ in parts.strongest(0)]

# an outlier is named, and a mistake is told from another
assert all(predict(model, images[one.sample][None]) != CLASS for one in audited[:3])
assert len(threes) == 8 and all(carry[one.prototype] for one in findings["a 3 with the mark"])
assert len(moved) >= 3 and all(one.percentile == 0 and one.over for one in findings["an 8, its mark moved"])
assert {"prototypes/relu2.html", "audit/relu2.html", "clusters/relu2/8.html"} <= set(pages)
""",
    "8_correcting_a_shortcut": """
assert min(on_the_mark.values()) > 0.7 and on_the_mark["CAV"] > 0.85
before, projected, at_mean, reactive, in_three, without_channels, control, penalised = results.values()
assert before["without"] < 0.7 and before["fooled"] > 0.6 and before["relevance"] > 0.65
assert all(one["fooled"] < 0.15 and one["without"] > before["without"]
           for one in (projected, at_mean, reactive, without_channels))
assert all(one["relevance"] < 0.55 for one in (projected, at_mean, reactive, without_channels))
assert in_three["fooled"] < 0.05 and in_three["without"] > 0.8 and in_three["relevance"] < 0.27
assert penalised["fooled"] < control["fooled"] - 0.08 and penalised["fooled"] < before["fooled"] - 0.2
assert all(abs(one["accuracy"] - before["accuracy"]) < 0.015 for one in results.values())
assert changed.share[0] > 0.4 and changed.share[1] < 0.01 and changed.accuracy[1] > 0.95
assert after == before
""",
    "12_vision_transformers": """
assert rates["as it is"]["accuracy"] > 0.85 and rates["as it is"]["fooled"] > 0.5

# heads: they add up; the one that is found hands on the mark, and without it the mark fools least
assert (of_heads[:4].sum(0) - of_heads[4]).abs().max() < 1e-5
assert of_heads[HEAD, :8, :8].abs().sum() > 0.5 * of_heads[HEAD].abs().sum()
fooled = [rates[f"without head {head}"]["fooled"] for head in range(4)]
assert fooled[HEAD] == min(fooled) < 0.6 * rates["as it is"]["fooled"]

# neurons: their references carry the mark
assert ((data.mark.stamp(best) - best).abs().amax((1, 2, 3)) < 1e-6).float().mean() > 0.7
assert rates["without neurons"]["fooled"] < 0.8 * rates["as it is"]["fooled"]

assert min(areas["AttnLRP"], areas["CP-LRP"], areas["integrated gradients"]) > 0.3
""",
    "11_language_models": """
assert accuracy > 0.97
assert min(min(found[name]) for name in ("AttnLRP", "CP-LRP")) > 0.8 > 2 * max(found["gradient × input"])

# relevance says which heads carry the answer
assert shares[0].sum() > 5 * shares[1].abs().sum()
assert without_best < without_rest - 0.1 and without_upper > 0.95
assert parts[order[0]].argmax() == places[INDEX] and (parts[order[0]] > parts[order[-1]])[places[INDEX]]

# a neuron that reads a digit
assert table.coverage().missing == [] and table.n_concepts(LAYERS[0]) == 4
assert sum(WORDS[digit].strip() in word for word in strongest) >= 6
assert all(text.explained == PAIRS for text in top)
""",
}


@pytest.fixture(scope="module")
def executed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every notebook whose test is asked for, after its run, side by side; or the exception that ended it."""
    mine = [item for item in request.session.items if "executed" in getattr(item, "fixturenames", ())]
    asked = {item.callspec.params["name"] for item in mine if item.path == request.path}
    return execute(TUTORIALS, {name: CLAIMS[name] for name in CLAIMS if name in asked}, tmp_path_factory.mktemp)


def read(name: str) -> Any:
    return nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in TUTORIALS.glob("*.ipynb")} == set(CLAIMS)


def test_notebooks_run_one_after_the_other_in_one_folder() -> None:
    """What one writes is not in the way of another."""
    written = {}
    for name in CLAIMS:
        code = "".join(cell.source for cell in read(name).cells if cell.cell_type == "code")
        assert 'path="' not in code.replace('path="results/', ""), name
        for place in set(re.findall(r'"(results/[^"]*)"', code)) - {CHECKPOINT}:
            assert written.setdefault(place, name) == name, place


@pytest.mark.parametrize("name", CLAIMS)
def test_stored_with_outputs(name: str) -> None:
    notebook = read(name)
    check_stored(notebook, TUTORIALS / f"{name}.ipynb")
    assert pictures(notebook) == PICTURES[name]
    if name in SWITCHED:
        assert 'MODEL = "digits"' in next(cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in CLAIMS]
)
def test_runs_and_claims_hold(name: str, executed: dict[str, Any]) -> None:
    notebook = executed[name]
    if isinstance(notebook, BaseException):
        raise notebook
    assert pictures(notebook) == PICTURES[name]
    assert "Warning" not in errors_of(notebook), errors_of(notebook)


def test_the_picture_of_the_readme_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("make_pictures", TUTORIALS / "make_pictures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    stored = script.PATH
    monkeypatch.setattr(script, "PATH", tmp_path / "overview.png")
    train = script.train
    monkeypatch.setattr(script, "train", lambda digits, **options: train(digits, **{**options, "epochs": 2}))
    script.main()
    with Image.open(script.PATH) as made, Image.open(stored) as kept:
        assert made.size == kept.size
    assert stored.stat().st_size < 300_000
