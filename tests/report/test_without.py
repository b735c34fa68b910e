"""Predictions without a concept: rows of one sample share what is below the layer, where the model can take that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crp.attribution import CondAttribution
from crp.concepts import AxisConcept, ChannelConcept, DirectionConcept
from crp.visualization.without import predict_without


class Net(nn.Module):
    """Net whose branch passes by the layer that is changed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.layer = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.wide, self.out = nn.Linear(6, 4), nn.Linear(3, 4)
        self.rows_below: list[int] = []
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        below = self.below(x).tanh()
        self.rows_below.append(len(x))
        return self.above(below, self.layer(below), len(x))

    def above(self, below: Tensor, layer: Tensor, n_rows: int) -> Tensor:
        return self.out((below + layer).tanh().mean((2, 3)))


class Joined(Net):
    def above(self, below: Tensor, layer: Tensor, n_rows: int) -> Tensor:
        return self.wide(torch.cat([below, layer], 1).tanh().mean((2, 3)))


class Counted(Net):
    """Net that counts its rows below the layer, and would make one of all."""

    def above(self, below: Tensor, layer: Tensor, n_rows: int) -> Tensor:
        return self.out(layer.permute(0, 2, 3, 1).reshape(n_rows, -1, 3).tanh().mean(1))


class Mixed(Net):
    """The same, which gives as many rows as it should, each of which depends on all."""

    def above(self, below: Tensor, layer: Tensor, n_rows: int) -> Tensor:
        together = layer.permute(0, 2, 3, 1).reshape(n_rows, -1, 3)
        together = together - together.mean(1, keepdim=True)
        return self.out(together.reshape(-1, 25, 3).tanh().mean(1))


@pytest.mark.parametrize(
    ("kind", "is_shared"),
    [(Net, True), (Joined, False), (Counted, False), (Mixed, False)],
    ids=["added", "joined", "counted", "mixed"],
)
@pytest.mark.parametrize("n", [1, 3])
def test_each_row_is_what_the_sample_gives_alone(kind, is_shared, n):
    net = kind()
    attribution, sample = CondAttribution(net), torch.randn(1, 2, 5, 5, dtype=torch.float64)
    masks = [ChannelConcept.mask(row, [row], "layer") for row in range(n)]
    found = predict_without(attribution, sample, "layer", masks)
    rows_below = max(net.rows_below)
    for row in range(n):
        below = net.below(sample).tanh()
        kept = torch.ones(3, dtype=torch.float64)
        kept[row] = 0
        expected = net.above(below, net.layer(below) * kept[:, None, None], 1)[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-12)
    assert rows_below == (1 if is_shared else n)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_part_of_a_direction_is_what_its_dual_reads(scale):
    """Multipliers become ``(d m) e``; of the activation, ``(e a) d`` is left out."""
    net, sample = Net(), torch.randn(1, 2, 5, 5, dtype=torch.float64)
    concept = DirectionConcept([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    masks = [concept.mask(row, [row], "layer") for row in range(3)]
    found = predict_without(CondAttribution(net), sample, "layer", masks, scale=scale)
    below = net.below(sample).tanh()
    activation = net.layer(below)
    coefficients = torch.einsum("kc,nchw->knhw", concept.dual, activation)
    parts = [coefficients[k, :, None] * concept.directions[k][:, None, None] for k in range(2)]
    for row, part in enumerate([*parts, activation - sum(parts)]):
        expected = net.above(below, activation - (1 - scale) * part, 1)[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-12)


def test_samples_of_their_own_are_not_joined():
    net = Net()
    samples = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    attribution = CondAttribution(net)
    masks = [ChannelConcept.mask(row, [0], "layer") for row in range(3)]
    found = predict_without(attribution, samples, "layer", masks)
    for row in range(3):
        alone = predict_without(attribution, samples[row : row + 1], "layer", masks[:1])
        torch.testing.assert_close(found[row], alone[0], rtol=1e-12, atol=1e-12)


def test_an_error_of_the_model_is_raised():
    class Failing(Net):
        def above(self, below: Tensor, layer: Tensor, n_rows: int) -> Tensor:
            raise ValueError("of the model's own")

    masks = [ChannelConcept.mask(row, [row], "layer") for row in range(2)]
    sample = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="of the model's own"):
        predict_without(CondAttribution(Failing()), sample, "layer", masks)


class Language(nn.Module):
    """Scores of 40 tokens at each of 6 positions, by a linear layer that the model tells, as those of Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(2, 3), nn.Linear(3, 40)
        self.scored: list[int] = []
        self.double().eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.layer(x).tanh().cumsum(1))
        self.scored.append(scores.shape[0] * scores.shape[1])
        return self.after(scores)

    def after(self, scores: Tensor) -> Tensor:
        return scores


class Unknown(Language):
    get_output_embeddings = None  # type: ignore[assignment]


class Centred(Language):
    """Its scores at one position depend on those at all."""

    def after(self, scores: Tensor) -> Tensor:
        return scores - scores.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "scored"),
    [(Language, 3 + 6), (Unknown, 18 + 6), (Centred, 3 + 6 + 18)],
    ids=["at one position", "no layer is told", "positions depend on each other"],
)
@pytest.mark.parametrize("positions", [[-1, -1, -1], [2, 5, 0]], ids=str)
def test_scores_at_one_position(kind, scored, positions):
    net, text = kind(), torch.randn(1, 6, 2, dtype=torch.float64)
    concept = AxisConcept(-1)
    masks = [concept.mask(row, [row], "layer") for row in range(3)]
    attribution = CondAttribution(net)
    expected = predict_without(attribution, text, "layer", masks)[range(3), positions]
    net.scored.clear()
    found = predict_without(attribution, text, "layer", masks, positions)
    assert found.shape == (3, 40) and sum(net.scored) == scored
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(predict_without(attribution, text, "layer", masks[:1], positions[:1]), expected[:1])
    assert not net.head._forward_pre_hooks


def test_an_output_of_ones_own_is_whole():
    net, text = Language(), torch.randn(1, 6, 2, dtype=torch.float64)
    masks = [AxisConcept(-1).mask(row, [row], "layer") for row in range(3)]
    own = CondAttribution(net, output=lambda scores: scores.flip(1))
    found = predict_without(own, text, "layer", masks, [0, 0, 0])
    expected = predict_without(CondAttribution(net), text, "layer", masks, [-1, -1, -1])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Trained(Net):
    """A net whose training mode draws numbers, and counts what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.normed, self.dropped = nn.BatchNorm2d(3).double(), nn.Dropout()
        self.normed.running_mean.fill_(0.3)  # type: ignore[union-attr, operator]

    def above(self, below: Tensor, layer: Tensor, n_rows: int) -> Tensor:
        return super().above(below, self.dropped(self.normed(layer)), n_rows)


@pytest.mark.filterwarnings("ignore:the model is in training mode")
@pytest.mark.parametrize("n", [1, 3])
def test_a_model_in_training_mode_is_asked_in_evaluation_mode(n):
    net, sample = Trained().eval(), torch.randn(n, 2, 5, 5, dtype=torch.float64)
    masks = [ChannelConcept.mask(row, [row], "layer") for row in range(3)]
    masks, attribution = masks[: n if n > 1 else 3], CondAttribution(net)
    expected = predict_without(attribution, sample, "layer", masks)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.train()
    torch.testing.assert_close(predict_without(attribution, sample, "layer", masks), expected)
    torch.testing.assert_close(net.state_dict(), before)
    assert net.training and net.normed.training


class Again(Net):
    """A net that calls its layer twice."""

    def above(self, below: Tensor, layer: Tensor, n_rows: int) -> Tensor:
        return super().above(below, self.layer(layer.tanh()), n_rows)


@pytest.mark.parametrize("n", [1, 2])
def test_one_call_of_several(n):
    net = Again()
    attribution, sample = CondAttribution(net), torch.randn(1, 2, 5, 5, dtype=torch.float64)
    masks = [ChannelConcept.mask(row, [row], "layer") for row in range(n)]
    assert predict_without(attribution, sample, "layer", masks) is None
    assert predict_without(attribution, sample, "layer#2", masks) is None
    below = net.below(sample).tanh()
    first = net.layer(below)
    for row in range(n):
        kept = torch.ones(3, 1, 1, dtype=torch.float64)
        kept[row] = 0
        expected = Net.above(net, below, net.layer((first * kept).tanh()), 1)
        torch.testing.assert_close(predict_without(attribution, sample, "layer#0", masks)[row], expected[0])
        expected = Net.above(net, below, net.layer(first.tanh()) * kept, 1)
        torch.testing.assert_close(predict_without(attribution, sample, "layer#1", masks)[row], expected[0])


class Windows(Net):
    """A net whose layer sees the five columns of each sample as samples of their own."""

    def forward(self, x: Tensor) -> Tensor:
        below = self.below(x).tanh()
        windows = self.layer(below.permute(0, 3, 1, 2).flatten(0, 1)[..., None])
        return self.above(below, windows.unflatten(0, (len(x), 5)).squeeze(-1).permute(0, 2, 3, 1), len(x))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_rows_of_a_layer_with_other_rows_are_not_known(n):
    sample = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    masks = [ChannelConcept.mask(row, [0], "layer") for row in range(n)]
    assert predict_without(CondAttribution(Windows()), sample, "layer", masks) is None


def test_a_layer_that_the_model_lacks_is_told():
    masks = [ChannelConcept.mask(0, [0], "layers")]
    with pytest.raises(KeyError, match="'layers' not found in model; nearest: 'layer'"):
        predict_without(CondAttribution(Net()), torch.randn(1, 2, 5, 5).double(), "layers", masks)
