"""Mining of transformers of pictures: along the right axis, asked where that is not known; resumed, with references."""

from __future__ import annotations

import sys
from functools import reduce

import numpy as np
import pytest
import timm
import torch
from command_cases import crp
from feature_net import as_tensors
from mining_cases import same_rows
from preset_cases import off
from torch import nn
from transformer_families import FAMILIES, built

from crp.attribution import CondAttribution
from crp.composites import CPLRP, EpsilonPlus
from crp.concepts import AxisConcept, ChannelConcept
from crp.helper import load_maximization
from crp.trace import Passive
from crp.trace.axes import channel_axes
from crp.visualization import FeatureVisualization, Table
from crp.visualization.mining.axes import concepts_of_channels
from crp.visualization.mining.run import mine
from crp.visualization.mining.selection import list_layers, select_layers

#: Family; layer; axis of its channels, where it is known.
AXES = [
    ("torchvision_vit", "conv_proj", 1),
    ("torchvision_vit", "encoder.dropout", -1),
    ("torchvision_vit", "encoder.layers.encoder_layer_1", -1),
    ("torchvision_vit", "encoder.layers.encoder_layer_1.self_attention.out_proj.input", -1),
    ("torchvision_vit", "encoder.layers.encoder_layer_1.self_attention.out_proj", -1),
    ("torchvision_vit", "encoder.layers.encoder_layer_1.mlp.3.input", -1),
    ("torchvision_vit", "heads.head", 1),
    ("torchvision_swin", "features.0.0", 1),
    ("torchvision_swin", "features.0.1", -1),
    ("torchvision_swin", "features.1.1", -1),
    ("torchvision_swin", "permute", 1),
    ("torchvision_maxvit", "stem", 1),
    ("timm_vit", "patch_embed.proj", 1),
    ("timm_vit", "patch_embed", -1),
    ("timm_vit", "blocks.1.mlp.act", -1),
    ("timm_vit", "blocks.1.attn.norm", None),
    ("timm_swin", "layers.0.blocks.1.attn.proj.input", None),
    ("timm_swin", "layers.1", -1),
    ("timm_swin", "layers.0.blocks.0.attn.softmax", None),
    ("hf_vit", "model.vit.layers.1.mlp.fc2.input", -1),
    ("bert", "model.bert.encoder.layer.0", -1),
    ("gpt2", "model.transformer.h.1", -1),
    ("llama", "model.model.layers.1.mlp.down_proj.input", -1),
]


@pytest.mark.parametrize(("family", "layer", "axis"), AXES)
def test_what_made_a_tensor_tells_where_its_channels_are(family, layer, axis):
    model, data = built(family)
    assert channel_axes(model, data, [layer])[layer].axis == axis


class Rearranged(nn.Module):
    """Feature maps that are moved about."""

    def __init__(self, move):
        super().__init__()
        self.conv, self.place, self.move, self.unused = nn.Conv2d(3, 5, 2), nn.Identity(), move, nn.Identity()

    def forward(self, x):
        return self.place(self.move(self.conv(x))).flatten(1)


MOVES = {
    "none": (lambda y: y + 1, 1),
    "permute": (lambda y: y.permute(0, 2, 3, 1), -1),
    "permute_keyword": (lambda y: torch.permute(y, dims=(0, 2, 3, 1)), -1),
    "transpose": (lambda y: y.flatten(2).transpose(1, 2).relu(), -1),
    "mT": (lambda y: y.flatten(2).mT, -1),
    "reshape": (lambda y: y.permute(0, 2, 3, 1).reshape(len(y), -1, 5), -1),
    "back": (lambda y: y.movedim(1, -1).transpose(1, -1), 1),
    "moved": (lambda y: y.movedim(1, 3), -1),
    "moved_by_two": (lambda y: y.movedim((1, 2), (2, 3)), None),
    "middle": (lambda y: y.transpose(1, 2), None),
    "ambiguous": (lambda y: y.reshape(len(y), 4, 5, 4), None),
    "product": (lambda y: y.flatten(2) @ y.flatten(2).mT, None),
    "weighted": (lambda y: y @ torch.ones(4, 3), -1),
    "einsum": (lambda y: torch.einsum("bchw,hk->bckw", y, torch.eye(4)), None),
    "sum_of_both": (lambda y: y.sigmoid() * y, 1),
    "cat": (lambda y: torch.cat([y, y.relu()], 1), 1),
    "chunk": (lambda y: y.chunk(2, 2)[0], 1),
    "pooled": (lambda y: y.mean((2, 3))[:, :, None], 1),
    "cropped": (lambda y: y[..., 1:, 1:], 1),
    "repeated": (lambda y: y.repeat(1, 2, 1, 1), None),
    "interleaved": (lambda y: y.permute(0, 2, 3, 1).contiguous().movedim(-1, 1), 1),
    "weighted_from_the_left": (lambda y: torch.ones(5, 4) @ y, None),
    "deep": (lambda y: reduce(lambda deeper, _: deeper + 1, range(2000), y), None),
}


@pytest.mark.parametrize("move", MOVES)
def test_rearranging_moves_the_axis(move):
    function, axis = MOVES[move]
    layers = ["place", "place.input", "conv.input", "unused"]
    found = channel_axes(Rearranged(function), torch.randn(1, 3, 5, 5), layers)
    assert (found["place"].axis, found["place.input"].axis) == (axis, axis) and list(found) == layers[:3]
    assert found["conv.input"].axis is None  # (what the model is given)


# --- mining ---------------------------------------------------------------------------------------------------------

#: Family; concepts of some layers; and how many there are.
MINED = {
    "torchvision_vit": {
        "encoder.layers.encoder_layer_0.self_attention.out_proj.input": (AxisConcept(-1, groups=2), 2),
        "encoder.layers.encoder_layer_1.mlp.3.input": (AxisConcept(-1), 12),
        "encoder.layers.encoder_layer_1.ln_2": (AxisConcept(1), 5),
    },
    "timm_vit": {
        "blocks.0.attn.proj.input": (AxisConcept(-1, groups=2), 2),
        "blocks.1.mlp.act": (AxisConcept(-1), 12),
        "blocks.0": (AxisConcept(1), 5),
    },
    "timm_swin": {
        "layers.0.blocks.1.mlp.fc2.input": (AxisConcept(-1), 32),
        "layers.1": (AxisConcept(-1), 16),
    },
}


class Pictures:
    """Random pictures for a family, and labels."""

    def __init__(self, family, n=11):
        generator = torch.Generator().manual_seed(9)
        self.data = torch.randn(n, *FAMILIES[family].shape, generator=generator, dtype=torch.float64)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index], index % 5


def viewed(family, path, n=11):
    """Feature visualization of a family."""
    model, _ = built(family)
    layer_map = {layer: concept for layer, (concept, _) in MINED[family].items()}
    return FeatureVisualization(CondAttribution(model), Pictures(family, n), layer_map, path=path)


@pytest.mark.parametrize("family", MINED)
def test_what_is_mined(family, tmp_path):
    """Scores are those of single calls; a run that goes on is the same; references have the heatmaps of conditions."""
    fv = viewed(family, tmp_path / "whole")
    fv.run(CPLRP(), 0, 11, batch_size=4, progress=False)
    table = Table.open(fv.path)
    data, labels = fv.dataset.data, [i % 5 for i in range(11)]
    result = fv.attribution(data, [{"y": label} for label in labels], CPLRP(), list(fv.layer_map))
    for layer, (concept, n) in MINED[family].items():
        found = np.concatenate([block.value for block in table.blocks(layer, "relevance", "sum")])
        relevance = result.relevances[layer].reshape(11, -1, *result.relevances[layer].shape[1:])
        wanted = sum(concept.attribute(relevance[:, entry], abs_norm=False) for entry in range(relevance.shape[1]))
        assert found.shape == (11, n) and off(torch.as_tensor(found), wanted) <= 1e-9
    parts = viewed(family, tmp_path / "parts")
    parts.run(CPLRP(), 0, 8, batch_size=4, progress=False)  # (as if it were killed)
    parts.run(CPLRP(), 0, 11, batch_size=4, progress=False)
    same_rows(Table.open(parts.path), table)
    layer, (concept, n) = next(iter(MINED[family].items()))
    drawn = fv.get_max_reference(
        list(range(n)), layer, "relevance", (0, 2), CPLRP(), plot_fn=as_tensors, init="relevance"
    )
    best, _, _ = load_maximization(fv.RelMax.PATH, layer)
    for one in range(n):
        samples, heatmaps = drawn[one]
        index = best[:2, one]
        assert torch.equal(samples.double(), torch.stack([data[i] for i in index]))
        conditions = [{"y": labels[i], layer: [one]} for i in index]
        wanted = fv.attribution(
            torch.stack([data[i] for i in index]), conditions, CPLRP(), mask_map=concept.mask
        ).heatmap
        assert off(heatmaps.double(), wanted) <= 1e-5


def test_channels_that_are_tokens_are_refused(tmp_path):
    model, _ = built("timm_vit")
    attribution, data = CondAttribution(model), Pictures("timm_vit")
    with pytest.raises(
        ValueError,
        match=r"layer_map\['blocks.0'\] is ChannelConcept\(\), whose concepts are along axis 1; "
        r"but .* puts out \(1, 5, 8\), made by add\(\), whose channels come last. Give AxisConcept\(-1\)",
    ):
        mine(attribution, data, {"blocks.0": ChannelConcept()}, EpsilonPlus(), tmp_path, progress=False)
    with pytest.raises(
        ValueError,
        match=r"which axis of layer 'blocks.0.attn.norm' is that of its concepts\? It puts "
        r"out \(1, 5, 8\), made by reshape\(\), which does not tell",
    ):
        mine(attribution, data, {"blocks.0.attn.norm": ChannelConcept()}, EpsilonPlus(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="LAYER:axis=1"):
        concepts_of_channels(model, data[0][0][None], ["blocks.0.attn.norm"])
    found = concepts_of_channels(model, data[0][0][None], ["patch_embed.proj", "blocks.0", "head"])
    assert list(map(repr, found.values())) == [
        "ChannelConcept()",
        "AxisConcept(axis=-1, groups=None)",
        "ChannelConcept()",
    ]
    assert not (tmp_path / "manifest.json").exists()


def test_layers_that_are_suggested():
    for family, wanted in (
        ("timm_vit", ["blocks.0.mlp.act", "blocks.1.mlp.act"]),
        ("torchvision_vit", ["encoder.layers.encoder_layer_0.mlp.1", "encoder.layers.encoder_layer_1.mlp.1"]),
        ("timm_swin", ["layers.0", "norm"]),
    ):
        model, data = built(family)
        assert [one.name for one in list_layers(model, data) if one.suggested] == wanted, family
    assert select_layers(model, ["layers.0.blocks.*.mlp.fc2.input", "layers.0.blocks.1.mlp.fc2"]) == [
        "layers.0.blocks.0.mlp.fc2.input", "layers.0.blocks.1.mlp.fc2.input", "layers.0.blocks.1.mlp.fc2"
    ]  # fmt: skip


# --- from the command line ------------------------------------------------------------------------------------------

VIT = """
import torch
from timm.models.vision_transformer import VisionTransformer

def vit():
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, in_chans=3, embed_dim=12, depth=2, num_heads=3, num_classes=10)

class Digits:
    def __len__(self): return 8
    def __getitem__(self, index):
        return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index)), index % 10
digits = Digits()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "vits.py").write_text(VIT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "vits", raising=False)
    return tmp_path


def test_a_vit_from_the_command_line(here):
    options = ["--model", "vits:vit", "--data", "vits:digits", "--composite", "cp_lrp", "--quiet"]
    layers = ["blocks.*.attn.proj.input:heads=3", "blocks.1.mlp.act", "blocks.1:axis=1"]
    words = [word for layer in layers for word in ("--layers", layer)]
    result = crp("mine", *options, *words, "--out", "whole")
    assert result.exit_code == 0, result.output
    table = Table.open(here / "whole")
    found = {layer: (about["concept"], about["settings"]) for layer, about in table.header.recipe["layers"].items()}
    assert found == {
        layer: ("crp.concepts.axes.AxisConcept", {"axis": axis, "groups": groups})
        for layer, axis, groups in (
            ("blocks.0.attn.proj.input", -1, 3), ("blocks.1", 1, None), ("blocks.1.attn.proj.input", -1, 3),
            ("blocks.1.mlp.act", -1, None),
        )
    }  # fmt: skip
    stopped = crp("mine", *options, *words, "--out", "parts", "--stop", "5", "--batch-size", "5", "--shard-size", "5")
    assert stopped.exit_code == 0, stopped.output
    again = crp("mine", "--out", "parts", "--quiet")
    assert again.exit_code == 0, again.output
    same_rows(Table.open(here / "parts"), table, 1e-5)
    assert crp("report", "whole", "--quiet", "--references", "2").exit_code == 0
    pages = list((here / "whole" / "atlas" / "concept").rglob("*.html"))
    assert len(pages) == 3 + 3 + 48 + 5, "every head, neuron and token has a page"
    opened = FeatureVisualization.open(here / "whole")
    assert repr(opened.layer_map["blocks.1.attn.proj.input"]) == "AxisConcept(axis=-1, groups=3)"
    heads = AxisConcept(-1, groups=3)
    data = torch.stack([opened.dataset[i][0] for i in range(8)])
    values = opened.attribution(data, [{"y": i} for i in range(8)], CPLRP(), ["blocks.1.attn.proj.input"]).relevances
    wanted = heads.attribute(values["blocks.1.attn.proj.input"], abs_norm=False)
    mined = np.concatenate([block.value for block in table.blocks("blocks.1.attn.proj.input", "relevance", "sum")])
    np.testing.assert_allclose(mined, wanted.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("blocks.0.attn.norm", "which axis of layer 'blocks.0.attn.norm' is that of its concepts?"),
        ("blocks.0:tokens", "--layers blocks.0:tokens: behind the colon must be heads=N"),
        ("blocks.0:axis=0", "behind the colon must be heads=N, such as heads=12, or axis=N"),
        ("blocks.0.attn.proj.input:heads=5", "12 places along axis -1, which are not 5 equal groups"),
    ],
)
def test_wrong_words(here, layers, message):
    result = crp("mine", "--model", "vits:vit", "--data", "vits:digits", "--layers", layers, "--out", "a", "--quiet")
    assert result.exit_code == 1 and message in result.output, result.output


def test_a_model_of_timm_by_name(here):
    """A model with weights from a file, pictures from folders: nothing is downloaded."""
    from PIL import Image

    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), "weights.pt")
    for i in range(4):
        folder = here / "pictures" / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (160, 160, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    result = crp(
        "mine", "--model", "timm:test_vit", "--checkpoint", "weights.pt", "--data", "pictures", "--targets",
        "prediction", "--layers", "blocks.5.attn.proj.input:heads=2", "--out", "table", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    table = Table.open("table")
    assert table.layers == ("blocks.5.attn.proj.input",) and not table.coverage().missing
    assert crp("report", "table", "--quiet", "--references", "1").exit_code == 0
    shown = crp("layers", "timm:test_vit", "--checkpoint", "weights.pt").output
    assert "* blocks.5.mlp.act" in shown and "  blocks.5 " in shown


class Counted(nn.Module):
    """A net that counts its calls, and has a batch norm that in training needs more than one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
        self.head, self.calls = nn.Linear(4, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.head(self.body(x).flatten(1))


def test_a_model_in_training_mode_is_mined_in_evaluation_mode(tmp_path):
    torch.manual_seed(0)
    model, data = Counted().double().train(), [(torch.randn(3, 5, 5).double(), i % 2) for i in range(4)]
    folders = tmp_path / "training", tmp_path / "evaluation"
    with pytest.warns(UserWarning, match="training mode"):
        found = mine(CondAttribution(model), data, {"body.0": ChannelConcept()}, EpsilonPlus(), folders[0])
    assert model.training and model.body[3].training
    expected = mine(CondAttribution(model.eval()), data, {"body.0": ChannelConcept()}, EpsilonPlus(), folders[1])
    same_rows(found, expected)


def test_axes_are_looked_for_once_for_samples_of_one_form():
    calls, model = [], Counted().double().eval()
    model.register_forward_pre_hook(Passive(lambda *_: calls.append(None)))
    sample = torch.randn(1, 3, 5, 5).double()

    def n_calls(data):
        before = len(calls)
        assert channel_axes(model, data, ["body.0"])["body.0"].axis == 1
        return len(calls) - before

    assert [n_calls(sample), n_calls(sample), n_calls(torch.cat([sample, sample]))] == [1, 0, 0]
    assert n_calls(torch.randn(1, 3, 6, 5).double()) == 1
    with pytest.raises(RuntimeError):
        channel_axes(model, sample[:, :2], ["body.0"])
    with pytest.raises(RuntimeError):
        channel_axes(model, sample.float(), ["body.0"])
    model.body[0] = nn.Linear(5, 5).double()
    with pytest.raises(RuntimeError):
        channel_axes(model, sample, ["body.0"])  # (the batch norm has other channels now)
