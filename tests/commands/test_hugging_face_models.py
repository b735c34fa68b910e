"""``hf:`` models of segmentation and detection, saved in a folder: what is explained of them, and their pages."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from command_cases import crp, write_pictures

from crp.errors import LoadingError
from crp.outputs import detection, segmentation
from crp.visualization.models import load_model
from crp.visualization.table.store import Table

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NAMES = {"id2label": {0: "cat", 1: "dog", 2: "bird"}}


def segformer():
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
            strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, **NAMES,
        )
    )  # fmt: skip


def detr(kind: str = "Detr"):
    layers = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    backbone = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = getattr(transformers, f"{kind}Config")(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, **layers, **NAMES,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForObjectDetection")(config)


def yolos():
    return transformers.YolosForObjectDetection(
        transformers.YolosConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[32, 32],
            patch_size=8, num_detection_tokens=5, **NAMES,
        )
    )  # fmt: skip


MODELS = {
    "segformer": segformer,
    "detr": detr,
    "conditional_detr": partial(detr, "ConditionalDetr"),
    "yolos": yolos,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save_pretrained(name)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(name)
    return model


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "yolos"])
def test_a_detector_gives_the_logits_of_its_classes_and_none_of_no_object(here, name):
    model = save(name)
    loaded = load_model(f"hf:{name}", output=detection())
    assert loaded.classes == ["cat", "dog", "bird"] and (loaded.prepared.resize, loaded.prepared.size) == (32, 0)
    pictures = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(pixel_values=pictures)
        boxes = loaded.model(pictures)
    assert torch.equal(torch.stack([one["boxes"] for one in boxes]), found.pred_boxes)
    assert torch.equal(loaded.scores(pictures), found.logits[..., :3].max(1).values)
    has_none = found.logits.shape[-1] == 4
    assert has_none == (name != "conditional_detr")
    odds = found.logits[..., :3]
    if has_none:
        chance = found.logits.softmax(-1)
        odds = (chance / (1 - chance)).log()[..., :3]
    of_odds = load_model(f"hf:{name}", output=detection("log-odds", 2)).scores(pictures)
    torch.testing.assert_close(of_odds, odds[:, 2], rtol=1e-4, atol=1e-5)


def test_a_segmentation_gives_the_logits_of_its_pixels(here):
    model = save("segformer")
    loaded = load_model("hf:segformer", output=segmentation())
    pictures = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(pixel_values=pictures).logits
    own = logits * (logits == logits.amax(1, keepdim=True)) * (logits > 0)
    torch.testing.assert_close(loaded.scores(pictures), own.sum((2, 3)))


@pytest.mark.parametrize(("name", "output"), [("segformer", "segmentation"), ("yolos", "detection")])
def test_commands_go_from_pictures_to_pages(here, name, output):
    save(name)
    write_pictures(here / "photos", 4, "ab", 40)
    explained = ("photos/a/0.png", "--model", f"hf:{name}", "--method", "epsilon", "--out", "a.png")
    result = crp("attribute", *explained)
    assert result.exit_code == 1 and "crp.outputs has segmentation() and detection()" in result.output
    result = crp("attribute", *explained, "--output", output, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["predicted"]["name"] in NAMES["id2label"].values() and "score" in said["predicted"]
    given = ["--data", "photos", "--layers", "auto", "--targets", "prediction", "--composite", "epsilon", "--quiet"]
    result = crp("mine", "--model", f"hf:{name}", *given, "--output", output, "--out", "table")
    assert result.exit_code == 0, result.output
    table = Table.open("table")
    assert set(table.rows().target.tolist()) <= {0, 1, 2} and len(table.rows().target) == 4
    result = crp("report", "table", "--quiet", "--concepts", "1", "--references", "1")
    assert result.exit_code == 0 and Path("table/atlas/index.html").exists(), result.output


def test_a_model_of_another_kind_is_refused_as_its_head_would_be_random(here):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained("vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("vit")
    with pytest.raises(LoadingError, match="vit was made as ViTModel, and would have a part with random weights"):
        load_model("hf:vit")
