"""Ways to spell one affine operation, each beside the layers of torch that it equals."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Wiring = Callable[["Written", Tensor], Tensor]


class Written(nn.Module):
    """A dense layer's parameters under many names, and a function that calls it in one way.

    Attributes
    ----------
    V, W : Tensor of shapes (5, 6) and (6, 5)
        The weight, as torch has it and transposed.
    b : Tensor of shape (5,)
    fc, dense : nn.Linear
        With this weight; with and without the bias.
    A, B : Tensor of shapes (6, 7) and (7, 5)
        Factors of the weight of ``low``, an nn.Linear.
    """

    def __init__(self, wiring: Wiring) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.wiring = wiring
        self.W, self.b = parameter(6, 5), parameter(5)
        self.A, self.B, self.c, self.T = parameter(6, 7), parameter(7, 5), parameter(4), parameter(5, 6, 4)
        self.V = nn.Parameter(self.W.detach().T.contiguous())
        self.fc, self.dense = linear(self.V, self.b), linear(self.V)
        self.low, self.scaled = linear((self.A @ self.B).T), linear(self.V * self.b[:, None])
        self.bilinear = linear(torch.einsum("oij,j->oi", self.T, self.c), self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Dense layer with this weight and bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    layer.weight.data = weight.detach().clone(memory_format=torch.contiguous_format)
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer


def rows(function: Callable[[Tensor], Tensor]) -> Wiring:
    """Call a function for each sample."""
    return lambda s, x: torch.stack([function(s, row) for row in x])


aten = torch.ops.aten

#: x @ W in (3, 6) -> (3, 5).
WITHOUT_BIAS: dict[str, Wiring] = {
    "operator": lambda s, x: x @ s.W,
    "operator_T": lambda s, x: x @ s.V.T,
    "operator_t": lambda s, x: x @ s.V.t(),
    "operator_mT": lambda s, x: x @ s.V.mT,
    "operator_transpose": lambda s, x: x @ s.V.transpose(0, 1),
    "operator_permute": lambda s, x: x @ s.V.permute(1, 0),
    "operator_reflected": lambda s, x: s.W.__rmatmul__(x),
    "operator_in_place": lambda s, x: operator.imatmul(x, s.W),
    "operator_left": lambda s, x: (s.V @ x.T).T,
    "operator_left_vectors": lambda s, x: (s.V @ x[..., None])[..., 0],
    "operator_left_rows": rows(lambda s, row: s.V @ row),
    "operator_rows": rows(lambda s, row: row @ s.W),
    "operator_outputs": lambda s, x: torch.stack([x @ s.V[i] for i in range(5)], 1),
    "computed_weight": lambda s, x: x @ (s.W * 2 - s.W),
    "converted_weight": lambda s, x: x @ s.W.to(x),
    "weight_of_numbers": lambda s, x: x @ torch.tensor(s.W.tolist(), dtype=x.dtype),
    "matmul": lambda s, x: torch.matmul(x, s.W),
    "matmul_keywords": lambda s, x: torch.matmul(other=s.W, input=x),
    "matmul_method": lambda s, x: x.matmul(s.W),
    "matmul_method_keyword": lambda s, x: x.matmul(other=s.W),
    "matmul_of_weight": lambda s, x: s.V.matmul(x.T).T,
    "matmul_batched": lambda s, x: torch.matmul(x[:, None], s.W.expand(3, 6, 5))[:, 0],
    "linalg_matmul": lambda s, x: torch.linalg.matmul(x, s.W),
    "mm": lambda s, x: torch.mm(x, s.W),
    "mm_keywords": lambda s, x: torch.mm(input=x, mat2=s.W),
    "mm_method": lambda s, x: x.mm(s.W),
    "mm_left": lambda s, x: torch.mm(s.V, x.t()).t(),
    "bmm": lambda s, x: torch.bmm(x[:, None], s.W.expand(3, 6, 5))[:, 0],
    "bmm_keywords": lambda s, x: torch.bmm(input=x[None], mat2=s.W[None])[0],
    "bmm_method": lambda s, x: x[None].bmm(s.W[None])[0],
    "bmm_left": lambda s, x: torch.bmm(s.V.expand(3, 5, 6), x[..., None])[..., 0],
    "mv": rows(lambda s, row: torch.mv(s.V, row)),
    "mv_keywords": rows(lambda s, row: torch.mv(input=s.V, vec=row)),
    "mv_method": rows(lambda s, row: s.V.mv(row)),
    "mv_of_data": lambda s, x: torch.stack([torch.mv(x, s.V[i]) for i in range(5)], 1),
    "dot": rows(lambda s, row: torch.stack([torch.dot(row, s.V[i]) for i in range(5)])),
    "dot_method": rows(lambda s, row: torch.stack([s.V[i].dot(row) for i in range(5)])),
    "vdot": rows(lambda s, row: torch.stack([torch.vdot(row, s.V[i]) for i in range(5)])),
    "inner": lambda s, x: torch.inner(x, s.V),
    "inner_keywords": lambda s, x: torch.inner(input=x, other=s.V),
    "inner_left": lambda s, x: torch.inner(s.V, x).T,
    "tensordot": lambda s, x: torch.tensordot(x, s.W, 1),
    "tensordot_dims": lambda s, x: torch.tensordot(x, s.V, dims=([1], [1])),
    "tensordot_keywords": lambda s, x: torch.tensordot(a=x, b=s.W, dims=1),
    "tensordot_left": lambda s, x: torch.tensordot(s.V, x, dims=([1], [1])).T,
    "einsum": lambda s, x: torch.einsum("bi,io->bo", x, s.W),
    "einsum_left": lambda s, x: torch.einsum("oi,bi->bo", s.V, x),
    "einsum_implicit": lambda s, x: torch.einsum("bi,io", x, s.W),
    "einsum_ellipsis": lambda s, x: torch.einsum("...i,io->...o", x, s.W),
    "einsum_list": lambda s, x: torch.einsum("bi,io->bo", [x, s.W]),
    "einsum_sublists": lambda s, x: torch.einsum(x, [0, 1], s.W, [1, 2], [0, 2]),
    "functional_linear": lambda s, x: F.linear(x, s.V),
    "functional_linear_none": lambda s, x: F.linear(x, s.V, None),
    "conv1d": lambda s, x: F.conv1d(x[..., None], s.V[..., None])[..., 0],
    "conv1d_positions": lambda s, x: F.conv1d(x.T[None], s.V[..., None])[0].T,
    "addmm_beta_0": lambda s, x: torch.addmm(s.b, x, s.W, beta=0),
    "aten_mm": lambda s, x: aten.mm(x, s.W),
    "aten_mm_default": lambda s, x: aten.mm.default(x, s.W),
    "aten_matmul": lambda s, x: aten.matmul(x, s.W),
    "aten_bmm": lambda s, x: aten.bmm(x[None], s.W[None])[0],
    "aten_linear": lambda s, x: aten.linear(x, s.V),
    "aten_einsum": lambda s, x: aten.einsum("bi,io->bo", [x, s.W]),
    "modules_linear": lambda s, x: s.dense(x),
    "functional_call": lambda s, x: torch.func.functional_call(s.dense, {"weight": s.V * 1.0}, x),
}

#: x @ W with the bias as an operand.
WITH_BIAS: dict[str, Wiring] = {
    "addmm": lambda s, x: torch.addmm(s.b, x, s.W),
    "addmm_keywords": lambda s, x: torch.addmm(input=s.b, mat1=x, mat2=s.W),
    "addmm_factors": lambda s, x: torch.addmm(s.b * 4, x, s.W / 2, beta=0.25, alpha=2),
    "addmm_negative": lambda s, x: torch.addmm(-s.b, x, -s.W, beta=-1, alpha=-1),
    "addmm_method": lambda s, x: s.b.addmm(x, s.W),
    "addmm_in_place": lambda s, x: s.b.repeat(3, 1).addmm_(x, s.W),
    "addmm_bias_for_each": lambda s, x: torch.addmm(s.b.repeat(3, 1), x, s.W),
    "addmm_left": lambda s, x: torch.addmm(s.b[:, None], s.V, x.T).T,
    "baddbmm": lambda s, x: torch.baddbmm(s.b, x[:, None], s.W.expand(3, 6, 5))[:, 0],
    "baddbmm_keywords": lambda s, x: torch.baddbmm(input=s.b, batch1=x[None], batch2=s.W[None], beta=1, alpha=1)[0],
    "baddbmm_factors": lambda s, x: torch.baddbmm(s.b * 4, x[None], s.W[None] / 2, beta=0.25, alpha=2)[0],
    "baddbmm_in_place": lambda s, x: s.b.repeat(1, 3, 1).baddbmm_(x[None], s.W[None])[0],
    "addbmm": lambda s, x: torch.addbmm(s.b, x.view(3, 2, 3).transpose(0, 1), s.W.view(2, 3, 5)),
    "addbmm_factors": lambda s, x: torch.addbmm(
        s.b * 4, x.view(3, 2, 3).transpose(0, 1), s.W.view(2, 3, 5) / 2, beta=0.25, alpha=2
    ),
    "addmv": rows(lambda s, row: torch.addmv(s.b, s.V, row)),
    "addmv_factors": rows(lambda s, row: torch.addmv(s.b * 4, s.V / 2, row, beta=0.25, alpha=2)),
    "addmv_method": rows(lambda s, row: s.b.addmv(s.V, row)),
    "functional_linear": lambda s, x: F.linear(x, s.V, s.b),
    "functional_linear_keywords": lambda s, x: F.linear(bias=s.b, weight=s.V, input=x),
    "functional_linear_T": lambda s, x: F.linear(x, s.W.T, s.b),
    "nn_linear": lambda s, x: torch._C._nn.linear(x, s.V, s.b),
    "conv1d": lambda s, x: F.conv1d(x[..., None], s.V[..., None], s.b)[..., 0],
    "conv1d_keywords": lambda s, x: F.conv1d(bias=s.b, weight=s.V[..., None], input=x[..., None])[..., 0],
    "conv2d": lambda s, x: torch.conv2d(x[..., None, None], s.V[..., None, None], s.b)[..., 0, 0],
    "conv2d_whole": lambda s, x: F.conv2d(x.view(3, 1, 2, 3), s.V.view(5, 1, 2, 3), s.b).flatten(1),
    "conv3d": lambda s, x: F.conv3d(x[..., None, None, None], s.V[..., None, None, None], s.b).flatten(1),
    "conv_transpose1d": lambda s, x: F.conv_transpose1d(x[..., None], s.W[..., None], s.b)[..., 0],
    "convolution": lambda s, x: torch.convolution(
        x[..., None], s.V[..., None], s.b, [1], [0], [1], False, [0], 1
    )[..., 0],
    "convolution_transposed": lambda s, x: torch.convolution(
        x[..., None], s.W[..., None], s.b, [1], [0], [1], True, [0], 1
    )[..., 0],
    "aten_linear": lambda s, x: aten.linear(x, s.V, s.b),
    "aten_linear_default": lambda s, x: aten.linear.default(x, s.V, s.b),
    "aten_addmm": lambda s, x: aten.addmm(s.b, x, s.W),
    "aten_addmm_factors": lambda s, x: aten.addmm.default(s.b * 4, x, s.W / 2, beta=0.25, alpha=2),
    "aten_convolution": lambda s, x: aten.convolution(
        x[..., None], s.V[..., None], s.b, [1], [0], [1], False, [0], 1
    )[..., 0],
    "aten_conv1d": lambda s, x: aten.conv1d(x[..., None], s.V[..., None], s.b)[..., 0],
    "functional_call": lambda s, x: torch.func.functional_call(s.fc, {"weight": s.V * 1.0, "bias": s.b * 1.0}, x),
}  # fmt: skip

#: x @ W, and a bias that is added afterwards: no operand of the product.
ADDED: dict[str, Wiring] = {
    "operator": lambda s, x: x @ s.W + s.b,
    "operator_reflected": lambda s, x: s.b + x @ s.W,
    "in_place": lambda s, x: (x @ s.W).add_(s.b),
    "iadd": lambda s, x: operator.iadd(torch.matmul(x, s.W), s.b),
    "sub": lambda s, x: x @ s.W - (-s.b),
    "einsum": lambda s, x: torch.add(torch.einsum("bi,io->bo", x, s.W), s.b),
    "convolution": lambda s, x: F.conv1d(x[..., None], s.V[..., None])[..., 0] + s.b,
}


def _by_rows(weight: Tensor) -> Tensor:
    """A constant, row by row, of which torch says once that it is new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weight.detach().to_sparse_csr()


#: Several constants of which the weight is made; and the layer of `Written` with this weight.
OF_SEVERAL: dict[str, tuple[Wiring, str]] = {
    "einsum_three": (lambda s, x: torch.einsum("bi,ij,jo->bo", x, s.A, s.B), "low"),
    "einsum_three_ellipsis": (lambda s, x: torch.einsum("...i,ij,jo->...o", x, s.A, s.B), "low"),
    "einsum_three_between": (lambda s, x: torch.einsum("jo,bi,ij->bo", s.B, x, s.A), "low"),
    "einsum_scaled": (lambda s, x: torch.einsum("bi,io,o->bo", x, s.W, s.b), "scaled"),
    "einsum_three_sublists": (lambda s, x: torch.einsum(x, [0, 1], s.A, [1, 2], s.B, [2, 3], [0, 3]), "low"),
    "weight_of_two": (lambda s, x: F.linear(x, (s.A @ s.B).T), "low"),
    "low_rank": (lambda s, x: x @ (s.W + (s.A @ s.B - s.W)), "low"),
    "bilinear": (lambda s, x: F.bilinear(x, s.c.expand(3, 4), s.T, s.b), "bilinear"),
    "bilinear_left": (lambda s, x: F.bilinear(s.c.expand(3, 4), x, s.T.transpose(1, 2), s.b), "bilinear"),
    "bilinear_keywords": (
        lambda s, x: F.bilinear(bias=s.b, weight=s.T, input2=s.c.expand(3, 4), input1=x),
        "bilinear",
    ),
    "sparse_sum": (lambda s, x: torch.sparse.mm(_by_rows(s.V), x.T, "sum").T, "dense"),
    "sparse_mean": (lambda s, x: torch.sparse.mm(_by_rows(6 * s.V), x.T, reduce="mean").T, "dense"),
    "sparse_addmm": (
        lambda s, x: torch.sparse.addmm(s.b[:, None].expand(5, 3), s.V.detach().to_sparse(), x.T).T,
        "fc",
    ),
    "aten_bilinear": (lambda s, x: aten.bilinear(x, s.c.expand(3, 4), s.T, s.b), "bilinear"),
}

#: Functions that rules need not know, and must then be told by name; the layer as above.
RARE: dict[str, tuple[Wiring, str]] = {
    "vecdot": (lambda s, x: torch.linalg.vecdot(x[:, None], s.V), "dense"),
    "conv_tbc": (lambda s, x: torch.conv_tbc(x[None], s.W[None], s.b)[0], "fc"),
    "multi_dot": (lambda s, x: torch.linalg.multi_dot([x, s.A, s.B]), "low"),
    "multi_dot_pair": (lambda s, x: torch.linalg.multi_dot([x, s.W]), "dense"),
    "embedding_bag": (
        lambda s, x: F.embedding_bag(torch.arange(6).expand(3, 6), s.W, mode="sum", per_sample_weights=x),
        "dense",
    ),
    "sparse_mm": (lambda s, x: torch.sparse.mm(s.V.detach().to_sparse(), x.T).T, "dense"),
    "sparse_operator": (lambda s, x: (s.V.detach().to_sparse() @ x.T).T, "dense"),
    "sparse_right": (lambda s, x: x @ s.W.detach().to_sparse(), "dense"),
    "sparse_matmul": (lambda s, x: torch.matmul(s.V.detach().to_sparse(), x.T).T, "dense"),
    "sparse_sum": (
        lambda s, x: torch.sparse.addmm(torch.zeros(5, 3, dtype=x.dtype), s.V.detach().to_sparse(), x.T).T,
        "dense",
    ),
    "sparse_addmm": (
        lambda s, x: torch.addmm(s.b[:, None].expand(5, 3), s.V.detach().to_sparse(), x.T).T,
        "fc",
    ),
    "sparse_linear": (lambda s, x: F.linear(x, s.V.detach().to_sparse()), "dense"),
}
