"""The notebooks on masks, synthesis and metrics run from top to bottom, and what they claim is so."""

from __future__ import annotations

from typing import Any

import nbformat
import pytest
from notebooks import ROOT, check_stored, errors_of, execute, pictures

NOTEBOOKS = ROOT / "tutorials" / "methods"

# Run as the last cell of each notebook, with the names that the notebook has defined.
CLAIMS = {
    "perturbation_mask": """
assert on_mark["preserved"] > 0.25 and on_mark["deleted"] > 0.05 and on_mark["relevance"] > 0.3
assert preservation.heatmap.mean() < deletion.heatmap.mean() < 0.3
start, end = falling.scores[:, 0].mean(), falling.scores[:, -1].mean()
assert end < 0.3 < falling.limits[:, 1].mean() < start and start > 0.95
assert (rising.scores[:, -1] > 0.9).all() and (rising.scores[:, 0] < 0.9).all()
assert areas["relevance"] == min(areas.values())
""",
    "activation_maximization": """
for name in ("weak l2", "l2 from 0", "class mean", "variation, jitter"):
    assert pixels[name].scores[:, -1].exp().mean() > 0.9, name
assert (pixels["class mean"].images - means).abs().mean() < 0.05
assert probabilities["mean code"].min() > 0.95 and probabilities["from noise"].min() > 0.7
assert error < 1e-4
""",
    "continuity_and_selectivity": """
assert [round(value, 2) for value in kink.values()] == [70.71, 46.67, 1.41]
lrp = ["deep Taylor", "LRP (ε, z⁺)", "LRP (ε, α2β1)"]
for name in lrp:
    assert area[name] < 0.8 * area["sensitivity"], name
    assert change[name] < change["sensitivity"], name
assert set(sorted(area, key=area.get)[:3]) == {"SmoothGrad", "DeepLIFT", "simple Taylor"}
assert max(area, key=area.get) == "noise"
assert change["simple Taylor"] > 0.8 * change["sensitivity"]
assert sorted(set(change) - {"noise"}, key=change.get)[:2] == ["deep Taylor", "LRP (ε, z⁺)"]
assert max(lrp, key=area.get) == "deep Taylor"
assert set(sorted(between, key=between.get)[-3:]) == set(lrp)
assert min(between, key=between.get) == "noise" and between["SmoothGrad"] < between["sensitivity"]
""",
    "methods_compared": """
assert len(maps) >= 8 and all(found.shape == pictures.shape for found in maps.values())
for name in ("deeplift", "shapley_sampling"):
    assert torch.allclose(sums[name], difference, atol=1e-4), name
assert torch.allclose(sums["intgrad"], difference, rtol=0.03)
for name in ("deeplift", "intgrad", "shapley_sampling"):
    assert abs(shares[name] - fall.mean()) < 0.1, name
assert shares["epsilon_plus"] > fall.mean() + 0.05
assert max(shares[name] for name in ("saliency", "smoothgrad", "guided_backprop", "grad_cam")) < fall.mean() - 0.3
assert (maps["grad_cam"][2:].flatten(1) > 0).float().mean() < 0.1
assert error < 1e-5
try:
    crp.explain("cam", model, pictures, targets, layer="block.relu2")
except ValueError:
    pass
else:
    raise AssertionError("CAM of this network")
""",
    "excitation_backprop": """
assert right.float().mean() > 0.85
assert hits[CONTRASTIVE] > 0.95 > hits[EB] > 0.85
assert all(abs(total) < 0.1 for (method, _), total in sums.items() if method == CONTRASTIVE)
assert all(0.8 < total < 1.001 for (method, _), total in sums.items() if method == EB)
assert error < 1e-5
""",
}


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every notebook after its run, side by side; or the exception that ended it."""
    return execute(NOTEBOOKS, CLAIMS, tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", CLAIMS)
def test_stored_with_outputs(name: str) -> None:
    notebook = read(name)
    check_stored(notebook, NOTEBOOKS / f"{name}.ipynb")
    assert pictures(notebook) >= 2


@pytest.mark.parametrize("name", CLAIMS)
def test_runs_and_claims_hold(name: str, executed: dict[str, Any]) -> None:
    notebook = executed[name]
    if isinstance(notebook, BaseException):
        raise notebook
    assert pictures(notebook) == pictures(read(name))
    assert "Warning" not in errors_of(notebook), errors_of(notebook)
