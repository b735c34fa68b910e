"""Heatmaps and accounts of many nets and presets in float64, kept in a folder, and the differences of two folders."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn

from tests.shared.architectures import FAMILIES
from tests.shared.architectures_timm import LARGE, TIMM

#: Keywords of presets, which are named as in the registry, before a comma. The first are compared first.
PRESETS: dict[str, dict[str, Any]] = {
    "epsilon_plus_flat": {},
    "epsilon_gamma_box": {"low": -3.0, "high": 3.0},
    "epsilon_alpha2_beta1": {},
    "epsilon_plus": {},
    "epsilon_alpha2_beta1_flat": {},
    "epsilon_gamma": {},
    "lrp_cmp": {},
    "deep_taylor": {"low": -3.0, "high": 3.0},
    "excitation_backprop": {},
    "lrp_0": {},
    "epsilon": {},
    "gamma": {},
    "zplus": {},
    "alpha_beta": {},
    "gradient_x_input": {},
    "guided_backprop": {},
    "deeplift": {},
    "deeplift, reveal_cancel": {"variant": "reveal_cancel"},
}
#: Where the first presets end, and the next: all nets come before the next ones.
TIERS = (3, 9, len(PRESETS))
#: Numbers that are no further apart are the same.
SAME = 1e-12


def nets() -> dict[str, Any]:
    """What is compared, by name: each has ``build()`` and ``images(n)``."""
    libraries = {"torchvision": FAMILIES, "timm": [*TIMM, *LARGE]}
    return {f"{library}/{net}": net for library, found in libraries.items() for net in found}


def fingerprint(checkout: Path) -> str:
    """Hash of the sources of the package: numbers of other sources are kept beside each other."""
    found = hashlib.sha256()
    for file in sorted((checkout / "crp").rglob("*.py")):
        found.update(file.relative_to(checkout).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:12]


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError after so many seconds of the processor."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def explained(model: nn.Module, data: Tensor, target: int, preset: str, seconds: float) -> dict[str, Any]:
    """Heatmap, prediction and account; ``"error"`` says why one of them is not there."""
    from crp.attribution import CondAttribution
    from crp.composites import registry

    found: dict[str, Any] = {}
    attribution, data = CondAttribution(model), data.clone().requires_grad_()
    start = time.process_time()
    try:
        with limit(seconds):
            composite = registry.get(preset.partition(",")[0], **PRESETS[preset])
            found["prediction"] = attribution(data, [{"y": target}], composite).prediction
            found["heatmap"] = data.grad
            kept = attribution.absorbed(data.detach(), [{"y": target}], composite)
            found["layers"] = {layer: dict(shares) for layer, shares in kept.layers.items()}
            kinds = {kind: 0.0 for shares in kept.layers.values() for kind in shares}
            totals = {kind: sum(shares.get(kind, 0.0) for shares in kept.layers.values()) for kind in kinds}
            found["account"] = {"initial": kept.initial, "input": kept.input, **totals}
    except Exception as error:
        found["error"] = " ".join(f"{type(error).__name__}: {error}".split())
    return found | {"seconds": time.process_time() - start}


def dump(folder: str, names: Sequence[str], presets: Sequence[str], n: int, seconds: float) -> None:
    """Compute what is not in the folder yet: the first presets of all nets, then the next."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known, order = nets(), list(PRESETS)
    for first, last in zip((0, *TIERS), TIERS, strict=False):
        for name in names:
            todo = missing(Path(folder), [name], [preset for preset in order[first:last] if preset in presets])
            if not todo:
                continue
            model, data = known[name].build().requires_grad_(False), known[name].images(n)
            with torch.no_grad():
                target = int(model(data)[0].argmax())
            spent = []
            for _, preset in todo:
                found = explained(model, data, target, preset, seconds)
                file = stored(Path(folder), name, preset)
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(found, file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)
                spent.append(f"{preset} {found['seconds']:.1f} s{' (error)' if 'error' in found else ''}")
            click.echo(f"{name}: {', '.join(spent)}", err=True)


def stored(folder: Path, net: str, preset: str) -> Path:
    """File of a net and a preset."""
    return folder / net.replace("/", "-") / f"{preset}.pt"


def missing(folder: Path, names: Sequence[str], presets: Sequence[str]) -> list[tuple[str, str]]:
    """Nets and presets that are not in the folder yet."""
    return [(name, preset) for name in names for preset in presets if not stored(folder, name, preset).exists()]


class Difference(NamedTuple):
    """How far two checkouts are apart: largest differences ÷ largest value of the old one; None where one has none.

    Attributes
    ----------
    rests : tuple of two
        What is missing in the account of the old and of the new one ÷ its largest entry.
    note : str
        Why there is none.
    """

    net: str
    preset: str
    heatmap: float | None
    account: float | None
    prediction: float | None
    rests: tuple[float | None, float | None] = (None, None)
    note: str = ""
    comparable: bool = True

    @property
    def size(self) -> float:
        """The largest; what only one can do counts as different, but comes last of these."""
        found = [number for number in (self.heatmap, self.account, self.prediction) if number is not None]
        return max([*found, 0.0 if self.comparable else 2 * SAME])

    def __str__(self) -> str:
        numbers = (self.heatmap, self.account, self.prediction, *self.rests)
        cells = "".join(f"{'' if number is None else format(number, '.1e'):>10}" for number in numbers)
        return f"{self.net:40}{self.preset:28}{cells}  {self.note}".rstrip()


HEAD = "".join([" " * 68, *(f"{name:>10}" for name in ("heatmap", "account", "predict.", "rest old", "rest new"))])


def apart(old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    """Largest difference ÷ largest value of the old ones; infinite where not the same ones are finite."""
    a, b = (torch.cat([x.double().flatten() for x in side]) for side in (old, new))
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    differences = (a - b)[finite].abs()
    return float(differences.max() / a[finite].abs().max()) if differences.any() else 0.0


def rest(account: dict[str, Tensor] | None) -> float | None:
    """What is missing in an account ÷ its largest entry."""
    if account is None:
        return None
    missing = account["initial"] - sum(amount for name, amount in account.items() if name != "initial")
    return float(missing.abs().max() / max(amount.abs().max() for amount in account.values()))


def difference(net: str, preset: str, old: dict[str, Any], new: dict[str, Any]) -> Difference:
    """Of what two checkouts give for a net and a preset."""
    accounts = [side.get("account") for side in (old, new)]
    if all(accounts):  # (a kind of which one side keeps nothing may be missing)
        kinds, none = sorted(accounts[0].keys() | accounts[1].keys()), torch.zeros_like(accounts[0]["initial"])
        pairs = {"account": [[account.get(kind, none) for kind in kinds] for account in accounts]}
    else:
        pairs = {"account": None}
    for key in ("heatmap", "prediction"):
        pairs[key] = [[old[key]], [new[key]]] if key in old and key in new else None
    numbers = {key: None if pair is None else apart(*pair) for key, pair in pairs.items()}
    errors = {name: side.get("error") for name, side in (("old", old), ("new", new))}
    alike = errors["old"] == errors["new"]
    if alike:
        errors = {"both": errors["old"]}
    note = "; ".join(f"{name}: {error}" for name, error in errors.items() if error)
    return Difference(net, preset, **numbers, rests=tuple(map(rest, accounts)), note=note, comparable=alike)


def compare(folders: Sequence[Path], names: Sequence[str], presets: Sequence[str]) -> list[Difference]:
    """Differences of what both folders have, the largest first."""
    found = []
    for name in names:
        for preset in presets:
            files = [stored(folder, name, preset) for folder in folders]
            if all(file.exists() for file in files):
                old, new = (torch.load(file, weights_only=True) for file in files)
                found.append(difference(name, preset, old, new))
    return sorted(found, key=lambda row: -row.size)
