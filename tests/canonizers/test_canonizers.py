"""Batch norm is merged exactly, in the order of execution, and undone bit for bit."""

import contextlib
import gc
import weakref

import pytest
import torch
from canonizer_cases import Merged, randomize
from torch import nn

from crp.canonizers import Canonizer, MergeBatchNorm, Reporting, for_model

PAIRS = {
    "linear": (lambda b: nn.Linear(5, 6, bias=b), nn.BatchNorm1d, (4, 5)),
    "conv1d": (lambda b: nn.Conv1d(4, 6, 3, bias=b), nn.BatchNorm1d, (2, 4, 7)),
    "conv2d": (lambda b: nn.Conv2d(4, 6, 3, padding=1, bias=b), nn.BatchNorm2d, (2, 4, 5, 5)),
    "grouped": (lambda b: nn.Conv2d(4, 6, 3, groups=2, bias=b), nn.BatchNorm2d, (2, 4, 5, 5)),
    "depthwise": (lambda b: nn.Conv2d(6, 6, 3, groups=6, bias=b), nn.BatchNorm2d, (2, 6, 5, 5)),
    "conv3d": (lambda b: nn.Conv3d(2, 6, 2, bias=b), nn.BatchNorm3d, (2, 2, 3, 3, 3)),
    "transposed": (lambda b: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=b), nn.BatchNorm2d, (2, 4, 3, 3)),
    "transposed_grouped": (lambda b: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=b), nn.BatchNorm1d, (2, 4, 5)),
}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", list(PAIRS))
def test_merge_is_exact_and_undone_bit_for_bit(name, bias, affine, untouched):
    make, norm, shape = PAIRS[name]
    model = nn.Sequential(make(bias), randomize(norm(6, affine=affine, eps=1e-3))).double().eval()
    data = torch.randn(shape, dtype=torch.float64)
    reference = model(data).detach()
    with untouched(model), Merged(model, data) as merged:
        assert merged.canonizer.left == {}
        torch.testing.assert_close(merged.output, reference, rtol=1e-13, atol=1e-13)
        hidden = model[0](data)
        torch.testing.assert_close(hidden, reference, rtol=1e-13, atol=1e-13)
        assert model[1](hidden) is hidden  # not executed


def test_order_is_that_of_execution_and_not_of_registration(untouched):
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm2 = randomize(nn.BatchNorm2d(3))
            self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.norm1 = randomize(nn.BatchNorm2d(3))

        def forward(self, x):
            return self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))

    model, data = Swapped().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    reference = model(data).detach()
    with untouched(model), Merged(model, data) as merged:
        torch.testing.assert_close(merged.output, reference, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(model.conv1(data), model.norm1(model.conv1(data)))
        assert merged.canonizer.left == {}


class Branching(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 3, 1), randomize(nn.BatchNorm2d(3)), how

    def forward(self, x):
        y = self.conv(x)
        if self.how == "added":
            return self.norm(y) + y
        if self.how == "relu":
            return self.norm(torch.relu(y))
        if self.how == "twice":
            return self.norm(self.norm(y))
        return self.norm(torch.cat([y[:, :1], y[:, 1:]], 1))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("added", "'conv', whose output is also read by add; output is read by add"),
        ("relu", "comes from relu"),
        ("twice", "called 2 times"),
        ("cat", "comes from cat"),
    ],
    ids=["added", "relu", "twice", "cat"],
)
def test_batch_norm_that_does_not_alone_read_a_linear_layer_is_left_alone_with_a_reason(how, reason, untouched):
    model, data = Branching(how).double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    reference = model(data).detach()
    with untouched(model), Merged(model, data) as merged:
        assert torch.equal(merged.output, reference)
        assert merged.canonizer.merged == {}
        assert reason in merged.canonizer.left["norm"]


def test_batch_norm_in_training_mode_is_left_alone():
    # (a forward pass then updates running statistics, whoever makes it)
    with Merged(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).train(), torch.randn(4, 5)) as merged:
        assert "training mode" in merged.canonizer.left["1"]


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).eval(), (2, 5, 5), "another axis"),
        (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False)).eval(), (4, 5), "no running"),
        (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).train(), (4, 5), "training mode"),
    ],
    ids=["tokens", "no_statistics", "training"],
)
def test_batch_norm_that_is_not_a_fixed_affine_map_is_left_alone(model, shape, reason, untouched):
    # (a forward pass in training mode updates running statistics, whoever makes it)
    guard = untouched(model) if not model.training else contextlib.nullcontext()
    with guard, Merged(model, torch.randn(shape)) as merged:
        assert reason in merged.canonizer.left["1"]


def test_merged_weights_are_those_of_today():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), randomize(nn.BatchNorm2d(4))).double().eval()
    data = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    with Merged(model, data):
        first = model[0].weight
    with Merged(model, data):
        assert model[0].weight is first  # computed once
    with torch.no_grad():
        model[1].running_var.mul_(2)
    with Merged(model, data) as merged:
        assert model[0].weight is not first
    torch.testing.assert_close(merged.output, model(data), rtol=1e-12, atol=1e-13)


def test_a_training_step_is_noticed():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), randomize(nn.BatchNorm2d(4))).double().eval()
    data = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    with Merged(model, data):
        pass
    model.train()(data)
    model.eval()
    with Merged(model, data) as merged:
        pass
    torch.testing.assert_close(merged.output, model(data), rtol=1e-12, atol=1e-13)


def test_a_changed_structure_is_traced_again():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), randomize(nn.BatchNorm2d(4))).double().eval()
    data = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    with Merged(model, data) as merged:
        assert merged.canonizer.left == {}
    model.insert(1, nn.ReLU())
    reference = model(data).detach()
    with Merged(model, data) as merged:
        assert list(merged.canonizer.left) == ["2"]
        assert torch.equal(merged.output, reference)


def test_a_model_that_is_gone_is_not_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    with Merged(model, torch.randn(1, 3, 2, 2)):
        pass
    gone = weakref.ref(model[0])
    del model
    gc.collect()
    assert gone() is None


def test_float32_merge_is_computed_once_rounded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), randomize(nn.BatchNorm2d(4, eps=1e-3))).eval()
    data = torch.randn(2, 3, 6, 6)
    reference = model.double()(data.double()).detach()
    model.float()
    with Merged(model, data) as merged:
        torch.testing.assert_close(merged.output.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d])
def test_auto_merges_batch_norm_where_there_is_any(norm):
    inner = norm() if norm is nn.LazyBatchNorm2d else norm(2)
    assert [type(c) for c in for_model(nn.Sequential(nn.Linear(2, 2), nn.Sequential(inner)))] == [MergeBatchNorm]


@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2)])
def test_auto_is_nothing_where_there_is_no_batch_norm(norm):
    assert for_model(nn.Sequential(nn.Linear(2, 2), norm)) == []


def test_instances_report():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.BatchNorm1d(2)).eval()
    (instance,) = MergeBatchNorm().apply(model)
    assert isinstance(instance, Reporting)
    assert isinstance(instance, Canonizer)
    assert (instance.merged, instance.left) == ({}, {})  # nothing is known yet
    model(torch.ones(1, 2))
    assert instance.merged == {"1": "0"}
    assert instance.left == {"3": "input comes from '2' (ReLU); output is read by the model's output"}
    instance.remove()
