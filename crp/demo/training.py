"""Training of the demo's network: the same weights for the same seed, and resumable after every epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from crp.checks import check_number
from crp.demo.data import Digits
from crp.demo.net import DigitNet
from crp.errors import InputError
from crp.flags import check_flags
from crp.visualization.table.files import write_atomic

_LEARNING_RATE = 3e-3


class CheckpointError(InputError):
    """A checkpoint is damaged, or of other settings or data; the message says which."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread, inside of the context.

    More would not be faster for a network this small, far slower where cores are busy, and round differently.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train(
    data: Digits,
    *,
    epochs: int = 15,
    seed: int = 0,
    batch_size: int = 64,
    checkpoint: str | Path | None = None,
    verbose: bool = True,
) -> DigitNet:
    """Train a `DigitNet`; about 5 seconds, and to the same weights however many cores there are.

    Parameters
    ----------
    data : Digits
        Training images.
    epochs, seed, batch_size : int
        The seed decides the initial weights and the order of the images; torch's global generator is left alone.
    checkpoint : path, optional
        Safetensors file, written after every epoch. Where it exists, training continues from it, to the same weights
        as without interruption; a complete one is only loaded.
    verbose : bool
        Show the progress.

    Returns
    -------
    DigitNet
        In evaluation mode.

    Raises
    ------
    ValueError
        If epochs or batch_size are not positive.
    CheckpointError
        If the checkpoint is damaged or of other settings or data; a `ValueError`, too.
    """
    check_flags(verbose=verbose)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        check_number(name, value, 1, whole=True)
    settings = {"data": _digest([data.images, data.labels]), "epochs": epochs, "seed": seed, "batch_size": batch_size}
    path = None if checkpoint is None else Path(checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    done = 0 if path is None else _load(path, net, optimizer, settings)
    with tqdm(total=epochs, initial=done, desc="training", unit="epoch", disable=not verbose) as progress:
        for epoch in range(done, epochs):
            loss = _train_epoch(net, optimizer, data, _batches(len(data), batch_size, seed, epoch), 1 - epoch / epochs)
            if path is not None:
                _save(path, net, optimizer, settings, epoch + 1)
            progress.set_postfix(loss=f"{loss:.4f}")
            progress.update()
    return net.eval()


@torch.no_grad()
def predict(net: DigitNet, images: Tensor) -> Tensor:
    """Most likely class of each image; (n, 1, 32, 32) to (n,)."""
    return torch.cat([net(batch).argmax(1) for batch in torch.split(images, 256)])


def accuracy(net: DigitNet, data: Digits) -> float:
    """Share of the images that are classified rightly."""
    return (predict(net, data.images) == data.labels).float().mean().item()


def _batches(total: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Draw the indices of one epoch's batches, by a generator of its own, so that any epoch can be resumed."""
    generator = torch.Generator().manual_seed(1_000_003 * (epoch + 1) + seed)
    return iter(torch.split(torch.randperm(total, generator=generator), batch_size))


def _train_epoch(
    net: DigitNet, optimizer: torch.optim.Optimizer, data: Digits, batches: Iterator[Tensor], rate: float
) -> float:
    """One pass over the data at a share of the learning rate; returns the mean loss."""
    net.train()
    for group in optimizer.param_groups:
        group["lr"] = _LEARNING_RATE * rate
    total = 0.0
    for batch in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(data.images[batch]), data.labels[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(data)


def _save(path: Path, net: DigitNet, optimizer: torch.optim.Optimizer, settings: dict[str, object], done: int) -> None:
    """Write the checkpoint so that the file is either the old or the new one, whole."""
    tensors = dict(net.state_dict())
    state = optimizer.state_dict()["state"]
    for (name, _), slots in zip(net.named_parameters(), state.values(), strict=True):
        tensors |= {f"optimizer.{slot}.{name}": value for slot, value in slots.items()}
    content = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        {"settings": json.dumps(settings), "epochs_done": str(done), "digest": _digest(_ordered(tensors))},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


def _load(path: Path, net: DigitNet, optimizer: torch.optim.Optimizer, settings: dict[str, object]) -> int:
    """Fill the network and the optimizer from the checkpoint, if there is one; returns how many epochs are done."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error}); delete it to train anew") from error
    if "settings" not in header:
        raise CheckpointError(f"{path} is not a checkpoint of the demo; give another file")
    if (found := json.loads(header["settings"])) != settings:
        other = {name: value for name, value in found.items() if settings.get(name) != value}
        asked = {name: settings.get(name) for name in other}
        raise CheckpointError(
            f"checkpoint {path} was trained with {other}, not {asked}; delete it or give another file"
        )
    if header.get("digest") != _digest(_ordered(tensors)):
        raise CheckpointError(f"checkpoint {path} is damaged (its digest does not fit); delete it to train anew")
    net.load_state_dict({name: tensors[name] for name in net.state_dict()})
    slots: dict[int, dict[str, Tensor]] = {}
    for index, (name, _) in enumerate(net.named_parameters()):
        suffix = f".{name}"
        keys = [key for key in tensors if key.startswith("optimizer.") and key.endswith(suffix)]
        slots[index] = {key.removeprefix("optimizer.").removesuffix(suffix): tensors[key] for key in keys}
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(header["epochs_done"])


def _ordered(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in sorted(tensors)]


def _digest(tensors: list[Tensor]) -> str:
    """SHA-256 of the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
