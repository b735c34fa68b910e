"""The kernels of a GPU, run by Triton's interpreter, against torch's operations; see test_fused.py."""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor

from crp.concepts import triton_scores
from crp.rules import triton_kernels
from crp.rules.gamma import gamma_scales
from crp.rules.stabilizer import Absolute, quotient

CASES = {
    "image": ((2, 3, 5, 7), torch.contiguous_format, 1),
    "channels last": ((2, 3, 5, 7), torch.channels_last, 1),
    "row": ((4, 6), torch.contiguous_format, 1),
    "words": ((2, 5, 6), torch.contiguous_format, 2),
    "large": ((3, 4, 31, 29), torch.contiguous_format, 1),
}


def values(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    found.view(-1)[::5] = 0
    return found.to(memory_format=layout) if len(shape) == 4 else found


def check(found: Tensor, exact: Tensor, about: object) -> None:
    assert found.stride() == exact.stride() and found.dtype == exact.dtype, about
    bound = 0 if found.dtype in (torch.float32, torch.float64) else 2 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, exact, rtol=bound + 4 * torch.finfo(exact.dtype).eps, atol=0, msg=str(about))


def check_scores() -> int:
    """Sum, maximum and its first position, of ties and of what is no number, too; returns how many cases there are."""
    n = 0
    for shape, dtype in itertools.product(
        ((2, 3, 1), (3, 5, 49), (2, 40, 300), (1, 33, 2100)),
        (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    ):
        exact = values(shape, dtype, torch.contiguous_format, n)
        exact[0, 0], exact[0, 1] = -1, -torch.inf
        if shape[2] > 5:
            exact[-1, 2, 4], exact[0, 2, 3] = torch.nan, torch.inf
        for tensor in (exact, exact.transpose(1, 2).contiguous().transpose(1, 2)):
            total, largest, position = triton_scores.launch_scores(tensor)
            wide = exact.to(torch.promote_types(dtype, torch.float32))
            first = torch.from_numpy(wide.numpy().argmax(-1))
            top = wide.gather(-1, first[..., None])[..., 0]
            torch.testing.assert_close(position, first, rtol=0, atol=0)
            torch.testing.assert_close(largest, top, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(total, wide.sum(-1), rtol=1e-5, atol=1e-3, equal_nan=True)
            n += 1
    return n


def main() -> None:
    n = check_scores()
    for name, dtype in itertools.product(CASES, (torch.float32, torch.float64, torch.float16, torch.bfloat16)):
        shape, layout, axis = CASES[name]
        above, below = (values(shape, dtype, layout, seed) for seed in (0, 1))
        bias = values(shape[axis : axis + 1], dtype, torch.contiguous_format, 2).reshape(
            -1, *(1,) * (len(shape) - axis - 1)
        )
        epsilon = 1e-6 if dtype in (torch.float32, torch.float64) else 0.25
        for added, sign, weight in itertools.product((None, bias), (1, -1, 0), (1.0, -2.0)):
            found = triton_kernels.launch_quotient(above, below, added, epsilon, sign, weight)
            wide = [None if tensor is None else tensor.double() for tensor in (above, below, added)]
            if dtype in (torch.float32, torch.float64):
                wide = [above, below, added]
            exact = quotient(wide[0], wide[1], Absolute(epsilon), sign, wide[2], weight).to(dtype)
            check(found, exact, (name, dtype, added is not None, sign, weight))
            n += 1
        y, p = above, below.abs() + above.clamp(min=0)
        if dtype in (torch.float32, torch.float64):
            for added in (None, bias.abs()):
                found = triton_kernels.launch_gamma_scales(y, p, added, 0.25, epsilon)
                exact = gamma_scales(y, p, added, 0.25, Absolute(epsilon))
                for one, other in zip(found, exact, strict=True):
                    check(one, other, (name, dtype, added is not None, "gamma"))
                n += 1
    unclear = torch.tensor([torch.inf, torch.nan, 1.0])
    found = triton_kernels.launch_quotient(unclear, torch.tensor([0.0, 0.0, torch.nan]), None, 1e-6, 1, 1.0)
    assert found.isnan().all(), found
    sys.stdout.write(f"{n} cases")


if __name__ == "__main__":
    main()
