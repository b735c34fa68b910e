"""Threads that share a model, or parts of one; plain calls of the model beside; forks and spawned processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zennit.composites
from torch import nn
from trust_cases import CONDITIONS, differences, images, net, state, zennit_merged

import crp
from crp.attribution import CondAttribution
from crp.attributors import SmoothGrad
from crp.composites import EpsilonPlus, EpsilonPlusFlat
from crp.engine.attached import put_on
from crp.engine.turns import TURNS


@pytest.fixture(autouse=True)
def _frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def without_norm(seed: int = 0) -> nn.Module:
    model = net(seed)
    model[1] = nn.Identity()
    return model.eval()


def sharing(model: nn.Module) -> list[nn.Module]:
    """Three module objects with the same layers; and one with the same parameters only."""
    tied = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *model[1:]).double().eval()
    tied[0].weight, tied[0].bias = model[0].weight, model[0].bias
    return [one.eval() for one in (model, nn.Sequential(*model), nn.Sequential(model), tied)]


def attribute(model: nn.Module, make: Callable[[], Any], shared: Any = None) -> Callable[[], torch.Tensor]:
    data = images()
    conditions = [{"y": 1}, {"y": 2}]
    return lambda: CondAttribution(model)(data, conditions, shared or make()).heatmap


def together(jobs: list[Callable[[], torch.Tensor]], n_calls: int) -> tuple[int, list[str]]:
    """Each job in a thread, again and again; the number of calls, and what was wrong."""
    wanted = [job() for job in jobs]
    wrong: list[str] = []
    done = [0] * len(jobs)

    def run(number: int) -> None:
        try:
            while sum(done) < n_calls and not wrong:
                if not torch.allclose(jobs[number](), wanted[number], rtol=1e-9, atol=1e-12):
                    wrong.append(f"job {number}, call {done[number]}")
                done[number] += 1
        except BaseException as error:
            wrong.append(f"job {number}: {error!r}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not any(thread.is_alive() for thread in threads)
    return sum(done), wrong


def mixtures() -> dict[str, Callable[[], tuple[nn.Module, list[Callable[[], torch.Tensor]]]]]:
    def shared_layers(make: Callable[[], Any]) -> Callable[[], Any]:
        def made() -> tuple[nn.Module, list[Callable[[], torch.Tensor]]]:
            model = net()
            return model, [attribute(one, make) for one in sharing(model)]

        return made

    def plain_beside(make: Callable[[], Any], is_judged: bool = True) -> Callable[[], Any]:
        def made() -> tuple[nn.Module, list[Callable[[], torch.Tensor]]]:
            model, data = without_norm(), images(seed=5)
            # (zennit's rules swap weights in their backward pass, which plain calls may see meanwhile)
            plain = lambda: model(data).detach() * is_judged  # noqa: E731
            return model, [attribute(model, make), plain, attribute(model, make), plain]

        return made

    def one_composite() -> tuple[nn.Module, list[Callable[[], torch.Tensor]]]:
        model, other, shared = net(), net(1), EpsilonPlusFlat()
        return model, [attribute(one, EpsilonPlusFlat, shared) for one in (model, other, model)]

    def methods() -> tuple[nn.Module, list[Callable[[], torch.Tensor]]]:
        model, data = without_norm(), images()
        smooth = lambda: SmoothGrad(model, n=2, seed=0)(data, 1)[1]  # noqa: E731
        return model, [smooth, attribute(model, EpsilonPlus), lambda: model(data).detach()]

    return {
        "shared layers, ours": shared_layers(EpsilonPlusFlat),
        "shared layers, zennit's with a canonizer": shared_layers(zennit_merged),
        "plain calls beside ours": plain_beside(EpsilonPlusFlat),
        "plain calls beside zennit's": plain_beside(zennit.composites.EpsilonPlusFlat, is_judged=False),
        "plain calls beside none": plain_beside(lambda: None),
        "one composite for several models": one_composite,
        "methods": methods,
    }


@pytest.mark.promise(
    "Threads and processes",
    "Threads may attribute on one model, on models with the same layers or parameters, and with one composite: they "
    "take turns",
)
@pytest.mark.parametrize("name", mixtures())
def test_threads_do_not_disturb_each_other(name):
    model, jobs = mixtures()[name]()
    jobs[0]()
    before = state(model)
    _, wrong = together(jobs, 40)
    assert wrong == []
    assert differences(before | {"random": None}, state(model) | {"random": None}) == []


@pytest.mark.promise("Threads and processes", "10,000 calls of several threads give what they give alone")
@pytest.mark.slow
@pytest.mark.parametrize("name", mixtures())
def test_many_threaded_calls(name):
    model, jobs = mixtures()[name]()
    jobs[0]()
    before = state(model)
    n_calls, wrong = together(jobs, 1500)
    assert wrong == [] and n_calls >= 1500
    assert differences(before | {"random": None}, state(model) | {"random": None}) == []


@pytest.mark.promise(
    "Threads and processes",
    "What is put on a model acts in the thread that has put it there; `model(x)` in another thread gives its own "
    "output",
)
def test_a_composite_acts_in_its_own_thread_only():
    model, data, found = without_norm(), images(), {}

    def plain() -> None:
        leaf = data.clone().requires_grad_()
        (found["gradient"],) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
        for composite in (None, EpsilonPlus()):
            with pytest.raises(RuntimeError, match=r"another thread has put EpsilonPlusFlat|is on the model already"):
                CondAttribution(model)(data, [{"y": 1}], composite)

    leaf = data.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    for composite in (EpsilonPlusFlat(), zennit.composites.EpsilonPlusFlat()):
        with put_on(composite, model):
            assert {one.thread for one in crp.attached(model) if one.thread is not None} == {threading.get_ident()}
            thread = threading.Thread(target=lambda: found.update(output=model(data).detach()))
            thread.start()
            thread.join()
            assert torch.equal(found["output"], model(data).detach())
    with EpsilonPlusFlat().context(model):
        thread = threading.Thread(target=plain)
        thread.start()
        thread.join()
    assert torch.equal(found["gradient"], wanted)


@pytest.mark.promise("Threads and processes", "Two threads that would wait for each other get an error")
def test_two_threads_that_wait_for_each_other_get_an_error():
    first, second = net(), net(1)
    inside = threading.Barrier(2)
    errors: list[str] = []

    def run(one: nn.Module, other: nn.Module) -> None:
        try:
            with put_on(None, one):
                inside.wait(20)
                with put_on(None, other):
                    pass
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run, args=pair) for pair in ((first, second), (second, first))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert len(errors) == 1 and "call them in the same order" in errors[0]


@pytest.mark.promise("Threads and processes", "A thread that has given back what another waited for is not in its way")
def test_a_thread_that_has_given_back_is_waited_for_no_more():
    lock, model = object(), net()
    has_lock = threading.Event()

    def waits() -> None:
        with TURNS.taken([lock]):
            has_lock.set()
            with TURNS.taken([model]):
                pass

    thread = threading.Thread(target=waits)
    with TURNS.taken([model]):
        thread.start()
        has_lock.wait(20)
        while thread.ident not in TURNS._waiting:
            time.sleep(0.001)
    with TURNS.taken([lock]):  # (the other has not looked yet)
        pass
    thread.join(20)
    assert not thread.is_alive()


# --- processes ------------------------------------------------------------------------------------------------------


def in_a_thread(model: nn.Module) -> tuple[threading.Thread, threading.Event]:
    """A thread that has a model in its hands until the event is set."""
    inside, go = threading.Event(), threading.Event()

    def hold() -> None:
        with put_on(zennit_merged(), model):
            inside.set()
            go.wait(60)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert inside.wait(20)
    return thread, go


def in_a_child(check: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether a check holds in the child of a fork, which must end in time."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.promise("Threads and processes", "A process may be forked while a thread has a model in its hands")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_has_the_model():
    model, data = net(), images()
    wanted = CondAttribution(model)(data, CONDITIONS[:2], EpsilonPlusFlat()).heatmap
    before = state(model)
    thread, go = in_a_thread(model)

    def asked() -> bool:
        found = CondAttribution(model)(data, CONDITIONS[:2], EpsilonPlusFlat()).heatmap
        return torch.allclose(found, wanted, rtol=1e-9)

    try:
        for _ in range(3):
            assert in_a_child(asked)
            assert in_a_child(lambda: bool(crp.clear(model)) and crp.attached(model) == [])
    finally:
        go.set()
        thread.join(20)
    assert differences(before, state(model)) == []
    assert asked()


class Attributed(torch.utils.data.Dataset):
    """Data set whose samples are attributed where they are read."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return CondAttribution(self.model)(images(seed=index), [{"y": 1}], EpsilonPlus()).heatmap


@pytest.mark.promise("Threads and processes", "Workers of a DataLoader may be forked or spawned meanwhile")
@pytest.mark.parametrize("start", sorted({"fork", "spawn"} & set(multiprocessing.get_all_start_methods())))
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_of_a_data_loader_while_another_thread_has_the_model(start):
    model = net()
    wanted = [Attributed(model)[i] for i in range(4)]
    held = net() if start == "spawn" else model
    thread, go = in_a_thread(held)
    try:
        loader = torch.utils.data.DataLoader(
            Attributed(model), num_workers=1, batch_size=None, multiprocessing_context=start, timeout=120
        )
        found = list(loader)
    finally:
        go.set()
        thread.join(20)
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(found, wanted, strict=True))


def test_turns_are_given_back():
    assert TURNS._held == {} and TURNS._waiting == {}


def test_hooks_on_all_modules_are_one_thread_s_at_a_time():
    """What acts in their place during a call is of its model, also where another thread explains another model."""
    hooks, entered = nn.modules.module._global_backward_hooks, threading.Event()

    def explain() -> None:
        with put_on(None, net()):
            entered.set()

    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    before, thread = dict(hooks), threading.Thread(target=explain)
    try:
        with put_on(None, net()):
            thread.start()
            assert not entered.wait(0.2)
        thread.join(10)
        assert entered.is_set()
        assert dict(hooks) == before
    finally:
        handle.remove()
