"""Calls of kernels, made again for other inputs."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18
from torchvision.ops import nms

from crp.attribution import CondAttribution
from crp.composites import EpsilonPlusFlat
from crp.engine.kernel_calls import CallRecorder, KernelCalls
from crp.engine.recordings import NotReplayableError
from crp.engine.replayed import Replayed
from crp.layers.devices import can_be_read, holds, is_recording, recording

WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def recorded(run: Callable[[Tensor], Any], data: Tensor) -> KernelCalls:
    return CallRecorder().record(lambda tensors: {"y": run(tensors["x"])}, {"x": data})


def gradient(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        hidden = (leaf @ WEIGHT).tanh().exp() / 3
        hidden = hidden[torch.tensor([0, 2, 2])].mul(2).add_(1)
        (found,) = torch.autograd.grad(hidden.split(2, 1)[1].amax(1).sum() + hidden.sort(1).values[:, 2].sum(), leaf)
    return found


COMPUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a gradient": gradient,
    "several outputs": lambda x: torch.linalg.svd(x.T @ x)[1] + x.max(1)[0].sum(),
    "in place": lambda x: x.clone().t().add_(x.T).relu_()[:, :2],
    "a list": lambda x: torch.stack(x.unbind(1)) + torch.cat(x.chunk(2, 1), 1).T,
    "mapped": lambda x: torch.func.vmap(lambda row: (row @ WEIGHT).softmax(0))(x),
    "its input": lambda x: x,
    "a view of it": lambda x: x[1:].T,
    "a constant": lambda x: WEIGHT,
    "values of what is always the same": lambda x: (
        x * float(torch.arange(4).sum()) + torch.arange(5)[torch.ones(5) > 0][:4]
    ),
    "its data": lambda x: (x.data * 3).data * 2,
    "written over": lambda x: ((x * 2).exp() + 1 / (x * x + 1)).clamp(max=3),
    "written over, chosen": lambda x: torch.where(x > 0, (x * 2).tanh(), (x - 1).neg()),
    "written over, by numbers": lambda x: 2 ** (x * 2).pow(3).lerp(x, 0.5).remainder(3),
    "read later": lambda x: (lambda y: (y * 3, y.sigmoid() + y)[1])(x + 1),
    "read later, as a view": lambda x: (lambda y: (lambda row, z: z * row)(y[0], y * 3))(x + 1),
    "a part, read later as a whole": lambda x: (lambda y: (y[0] * 3) * y)(x + 1),
    "read later, as it is": lambda x: (lambda y: (lambda same, z: z * same)(y.detach(), y * 3))(x + 1),
    "beside itself": lambda x: (lambda y: y + y.T)(x[:4] * 2),
    "beside another part of it": lambda x: (lambda y: y[:3] * y[3:])(x * 2),
    "by itself": lambda x: (lambda y: y * y)(x * 2),
    "of another form": lambda x: (x * 2)[:1] + (x * 3) + ((x * 2).float() * (x[0] * 2).float()).double(),
    "of other strides": lambda x: (x.T * 2).T.contiguous() + (x.T * 2).T,
    "of its form": lambda x: x * x.shape[0] + torch.zeros_like(x).fill_(x.numel()),
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_calls_give_what_the_computation_gives(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    run = COMPUTATIONS[name]
    program = recorded(run, first)
    for data in (second, first, second * 3):
        exact, before = run(data).clone(), data.clone()
        found = program.replay({"x": data}, None)["y"]
        assert torch.equal(found, exact) and found.stride() == run(data).stride()
        found.fill_(7.0)  # (it is the caller's own)
        assert torch.equal(data, before)
    assert program.replay({"x": first}, []) == {}


def test_errors_of_operations_come_again() -> None:
    """Also of those that only look at values."""
    program = recorded(torch.linalg.cholesky, torch.eye(3))
    with pytest.raises(torch.linalg.LinAlgError, match="positive-definite"):
        program.replay({"x": -torch.eye(3)}, None)


def with_data_set(x: Tensor) -> Tensor:
    y = x * 2
    y.data = y.abs()  # (of positive numbers, the same)
    return y + 1


def in_memory_of_what_was_fixed(x: Tensor) -> Tensor:
    """A value of numbers that lie where others have lain that depend on nothing."""
    for _ in range(100):
        place = torch.zeros(x.shape, dtype=x.dtype).data_ptr()
        y = x * 2
        if y.data_ptr() == place:
            break
    return x * float(y[0, 0])


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a value of a constant": (lambda x: x * float(WEIGHT[0, 0]), "depends on values"),
    "a value written to what was fixed": (
        lambda x: x * float(torch.ones(4).double().copy_(x[0])[1:].sum()),
        "depends on values",
    ),
    "a value in memory of what was fixed": (in_memory_of_what_was_fixed, "depends on values"),
    "a random value": (lambda x: x * float(torch.rand(1)), "draws random numbers"),
    "a value": (lambda x: x * float(x.sum()), "depends on values"),
    "places of values": (lambda x: x.nonzero(), "depends on values"),
    "a mask": (lambda x: x[x > 0], "depends on values"),
    "a mask of bytes": (lambda x: x[(x > 0).to(torch.uint8)], "depends on values"),
    "random numbers": (lambda x: x * torch.rand(4), "draws random numbers"),
    "dropout": (lambda x: nn.functional.dropout(x, 0.5), "draws random numbers"),
    "what is not torch's": (lambda x: nms(x.abs(), x[:, 0], 0.5), "is unknown"),
    "writes to its input": (lambda x: x.add_(1), "writes to what was there before"),
    "writes to a part of a constant": (lambda x: WEIGHT[:, 0].zero_() + x.sum(), "writes to what was there before"),
    "other data of a tensor": (with_data_set, "no call tells how it came by it"),
    "its memory": (lambda x: torch.from_numpy(x.numpy()) * 2, "no call tells how it came by it"),
    "memory of its own": (lambda x: torch.from_numpy((x * 3).numpy()) * 2, "no call tells how it came by it"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
def test_what_cannot_be_made_again_is_refused(name: str) -> None:
    run, message = REFUSED[name]
    with pytest.raises(NotReplayableError, match=message):
        recorded(run, torch.ones(6, 4, dtype=torch.float64))


def test_an_operand_that_nobody_reads_again_is_written_over() -> None:
    def run(x: Tensor) -> Tensor:
        largest, places = x.detach().max(1)
        y = x * WEIGHT + (largest * 2)[places]
        return torch.where(y > 0, ((y + 1) * WEIGHT).tanh() / 2, 0 * y)

    program = recorded(run, torch.randn(4, 4, dtype=torch.float64))
    called: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called[func.name()] += 1
            return func(*args, **(kwargs or {}))

    data = torch.randn(4, 4, dtype=torch.float64)
    with Counting():
        program.replay({"x": data}, None)
    over = {"aten::mul.out": 3, "aten::add.out": 1, "aten::tanh.out": 1, "aten::div.out": 1, "aten::where.self_out": 1}
    read = {"aten::max.dim": 1, "aten::mul.Tensor": 1, "aten::index.Tensor": 1, "aten::gt.Scalar": 1}
    assert called == over | read | {"aten::add.Tensor": 1}


def test_what_is_given_out_is_not_written_over() -> None:
    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        y = tensors["x"] * 2
        return {"y": y, "row": y[0], "more": y * 3}

    program = CallRecorder().record(run, {"x": torch.ones(6, 4)})
    found = program.replay({"x": torch.full((6, 4), 5.0)}, None)
    assert found is not None and found["y"].eq(10).all() and found["row"].eq(10).all() and found["more"].eq(30).all()


def depends(x: Tensor) -> Tensor:
    """Of which the recording relies on what `holds` found."""
    return x * 2 if holds(lambda: x.amin() >= 0) else x.abs() * 3


def test_conditions_are_looked_at_again() -> None:
    above = torch.rand(6, 4) + 0.1
    below = -above
    with recording():
        program = recorded(depends, above)
        splitting = recorded(depends, below)
        assert depends(above).equal(above * 3)  # (nobody takes the condition down any more)
    assert depends(above).equal(above * 2)
    assert program.replay({"x": above + 1}, None)["y"].equal((above + 1) * 2)
    assert program.replay({"x": below}, None) is None
    assert splitting.replay({"x": above}, None)["y"].equal(above * 3)  # (right for all)


def test_nothing_is_looked_at_while_something_is_recorded() -> None:
    tensor = torch.ones(2)
    assert can_be_read(tensor)
    with recording():
        with recording():
            pass
        assert is_recording() and not can_be_read(tensor)
    assert not is_recording()


def test_conditions_of_other_threads_are_not_taken_down() -> None:
    data, found = torch.rand(6, 4), []

    def run(x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: found.append(depends(data + 1)))
        thread.start()
        thread.join()
        return depends(x)

    with recording():
        program = recorded(run, data)
    assert found[0].equal((data + 1) * 3) and program.replay({"x": data}, None)["y"].equal(data * 2)


def test_weights_are_read_as_they_are() -> None:
    weight = torch.ones(4, dtype=torch.float64)
    program = recorded(lambda x: x * weight, torch.ones(2, 4, dtype=torch.float64))
    weight.mul_(5)
    assert program.replay({"x": torch.full((2, 4), 2.0)}, None)["y"].eq(10).all()


def test_no_tensor_between_calls_is_kept_while_recording() -> None:
    made: list[StorageWeakRef] = []

    def run(x: Tensor) -> Tensor:
        for _ in range(20):
            x = x * 2
            made.append(StorageWeakRef(x.untyped_storage()))
            assert sum(not ref.expired() for ref in made) <= 3
        return x

    first = torch.ones(4)
    gc.collect()
    assert recorded(run, first).replay({"x": first * 3}, None)["y"].eq(3 * 2.0**20).all()


def test_threads_replay_in_turn() -> None:
    """Each gets what belongs to its own data."""
    model = resnet18(weights=None).eval()
    attribution, plain, rules = CondAttribution(model), CondAttribution(model), EpsilonPlusFlat()
    plain.replay, attribution._replayed = False, Replayed(CallRecorder(cost=0))
    images = torch.randn(8, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = [plain(image, [{"y": 3}], rules).heatmap for image in images]
    found: dict[int, list[Tensor]] = {}

    def work(place: int) -> None:
        found[place] = [attribution(images[place], [{"y": 3}], rules).heatmap for _ in range(8)]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(heatmap, exact[place]) for place in range(8) for heatmap in found[place])
    assert attribution._replayed.replays.replayed > 20
