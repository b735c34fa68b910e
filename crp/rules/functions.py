"""The table of torch's functions: what kind each is, and what is known of it.

Rules, presets and notes ask this table and nothing else; a function of a new torch version is one entry here. All
spellings of a function are one: `F.relu`, `torch.relu_`, `Tensor.relu`, ``torch.ops.aten.relu`` are ``"relu"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import get_overridable_functions

from crp.errors import InputError
from crp.layers import nearest
from crp.rules.notes import BORN, FIRST, NONNEGATIVE, Born
from crp.rules.operands import PARSERS, Parse
from crp.rules.spellings import _plain, name_of

#: Kinds of operations. An affine function is a "product" if both of its operands depend on the input.
KINDS = ("convolution", "dense", "activation", "normalization", "product", "pooling", "embedding")
#: Kinds of operations that sum up weighted inputs.
AFFINE = frozenset({"convolution", "dense"})

#: Properties of functions.
#:
#: - homogeneous: of degree one in what depends on the input, so that the ordinary chain rule is LRP-0
#: - linear: linear in what depends on the input
#: - constant: may add a constant, which keeps its share of the relevance
#: - step: its derivative is zero, so that it hands nothing on in any method
#: - identity: LRP hands relevance on as it is
#: - rescaled: treated by DeepLIFT's Rescale rule
#: - bilinear, quotient, selection, statistics, softmax: how DeepLIFT decomposes the difference
#: - arithmetic: sums, products and the like of entries
#: - elementwise: every entry of the result is made of the entries at the same place
#: - choosing: chooses between operands, of which some may be constant
#: - attention: of queries, keys and values, made by a softmax of products of the former two
#: - composed: calls other functions, which have rules of their own
#: - squashing: results lie between 0 and 1
#: - balanced: results lie between -1 and 1
#: - nonnegative: results are not negative
#: - gating: gates are made of it by adding numbers, which then are part of it
#: - sign: results are not negative if no operand is
#: - selects: the result holds entries of the operands, rearranged
#: - scales: with a constant operand, it changes nothing but the scale
#: - copies: as selects, perhaps beside constants; what is known of an entry of the input holds for its copies
#: - maximum: the maximum of a window
#: - between: results lie between entries of the operands, but for a scale
#: - indexes: entries are chosen, or put, by an index
PROPERTIES = frozenset(
    """arithmetic homogeneous linear constant step identity rescaled bilinear quotient selection statistics softmax
    elementwise choosing attention composed squashing balanced nonnegative gating sign selects scales copies maximum
    indexes between""".split()  # noqa: SIM905
)

#: Kind (or none), properties, and names.
_TABLE: tuple[tuple[str, str, str], ...] = (
    # --- sums of weighted inputs ---
    ("convolution", "linear constant", "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    ("convolution", "linear constant", "convolution"),
    ("dense", "linear constant", "linear addbmm addmm addmv baddbmm sparse_addmm"),
    ("dense", "homogeneous bilinear", "einsum matmul rmatmul mm mv"),
    ("dense", "bilinear", "bilinear bmm dot grouped_mm inner tensordot"),
    ("dense", "homogeneous", "sparse_mm vdot"),
    ("embedding", "homogeneous selection selects copies indexes", "embedding"),
    # --- products, quotients, attention ---
    ("product", "arithmetic bilinear elementwise sign scales", "mul"),
    ("product", "homogeneous bilinear", "kron outer"),
    ("product", "constant", "addr"),
    ("dense", "", "chain_matmul linalg_multi_dot"),
    ("", "arithmetic quotient elementwise scales", "div"),
    ("", "", "linalg_solve linalg_solve_triangular"),
    ("", "composed", "multi_head_attention_forward"),
    ("", "attention", "native_multi_head_attention scaled_dot_product_attention scaled_dot_product_attention_math"),
    ("", "attention", "scaled_dot_product_cudnn_attention scaled_dot_product_efficient_attention"),
    ("", "attention", "scaled_dot_product_flash_attention scaled_dot_product_flash_attention_for_cpu"),
    ("", "softmax nonnegative", "softmax"),
    ("", "softmax", "log_softmax softmin"),
    # --- activations ---
    ("activation", "homogeneous rescaled elementwise nonnegative", "relu"),
    ("activation", "homogeneous rescaled elementwise", "leaky_relu prelu rrelu"),
    ("activation", "squashing identity rescaled elementwise nonnegative gating", "expit hardsigmoid sigmoid"),
    ("activation", "squashing identity rescaled elementwise nonnegative gating", "special_ndtr"),
    ("activation", "identity rescaled elementwise nonnegative gating", "exp exp2 erfc"),
    ("activation", "identity rescaled elementwise nonnegative", "relu6 softplus"),
    (
        "activation",
        "identity rescaled elementwise",
        """acos acosh asin asinh atanh celu clamp clamp_max clamp_min digamma erfinv gelu hardshrink hardswish hardtanh
        i0 lgamma log10 log1p log2 logit logsigmoid mish nan_to_num selu silu sin sinh softshrink special_entr
        special_erfcx special_i0e special_i1 special_i1e special_log_ndtr special_ndtri tan tanhshrink threshold""",
    ),
    ("activation", "balanced identity rescaled elementwise gating", "atan erf softsign tanh"),
    ("activation", "identity rescaled elementwise gating", "cos cosh elu expm1 rpow"),
    ("activation", "rescaled elementwise", "fmod frac logaddexp logaddexp2 remainder sinc"),
    ("", "identity rescaled elementwise nonnegative", "sqrt square"),
    ("", "identity rescaled elementwise", "log pow rdiv reciprocal rsqrt"),
    ("", "homogeneous rescaled elementwise nonnegative", "abs"),
    ("", "step rescaled elementwise", "ceil floor round sign trunc"),
    ("", "step elementwise", "bernoulli floor_divide floordiv heaviside rfloordiv sgn"),
    ("", "step elementwise", "and bitwise_and bitwise_not bitwise_or bool byte int invert logical_and logical_not"),
    ("", "step elementwise", "logical_or long or short"),
    ("activation", "", "glu"),
    ("", "", "prod"),
    # --- normalizations and statistics ---
    ("normalization", "identity constant", "batch_norm"),
    ("normalization", "identity", "local_response_norm normalize"),
    ("normalization", "statistics", "group_norm instance_norm layer_norm rms_norm"),
    ("", "homogeneous nonnegative", "norm linalg_norm linalg_vector_norm"),
    ("", "homogeneous nonnegative", "cdist pairwise_distance"),
    ("", "", "logsumexp std var"),
    # --- pooling ---
    ("pooling", "homogeneous linear sign between", "avg_pool1d avg_pool2d avg_pool3d"),
    ("pooling", "homogeneous linear sign between", "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    ("pooling", "homogeneous maximum sign between", "max_pool1d max_pool2d max_pool3d"),
    ("pooling", "homogeneous maximum sign between", "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    *(("pooling", "homogeneous maximum between", f"max_pool{n}d_with_indices") for n in (1, 2, 3)),
    *(("pooling", "homogeneous maximum between", f"adaptive_max_pool{n}d_with_indices") for n in (1, 2, 3)),
    ("pooling", "homogeneous between", "fractional_max_pool2d fractional_max_pool3d lp_pool1d lp_pool2d lp_pool3d"),
    ("", "homogeneous", "max_unpool1d max_unpool2d max_unpool3d"),
    # --- sums ---
    ("", "arithmetic homogeneous linear constant elementwise", "add sub rsub"),
    ("", "homogeneous linear sign between", "mean sum"),
    ("", "arithmetic homogeneous linear elementwise scales", "deg2rad neg positive rad2deg"),
    ("", "homogeneous linear between", "interpolate upsample"),
    ("", "homogeneous linear", "coalesce cumsum diff fold nansum sparse_coo_tensor to_dense to_sparse"),
    ("", "homogeneous linear selection", "index_add"),
    ("", "homogeneous linear constant", "complex"),
    ("", "homogeneous linear constant selection indexes", "scatter_add"),
    ("", "homogeneous constant", "index_reduce scatter_reduce segment_reduce"),  # (but for products)
    ("", "homogeneous between", "upsample_bilinear upsample_nearest grid_sample roi_align ps_roi_align"),
    # --- choice ---
    ("", "homogeneous choosing elementwise between", "fmax fmin maximum minimum"),
    ("", "homogeneous choosing indexes between", "max min"),
    ("", "homogeneous between", "amax amin cummax cummin"),
    ("", "homogeneous", "hypot"),
    ("", "homogeneous selects indexes", "kthvalue masked_select median msort nanmedian sort take topk"),
    # --- the same entries at other places ---
    ("", "homogeneous linear selects copies sign", "chunk flatten getitem permute reshape squeeze transpose"),
    ("", "homogeneous linear selects copies sign elementwise", "bfloat16 clone contiguous double float half to"),
    ("", "homogeneous linear selects copies sign", "channel_shuffle pixel_shuffle unsqueeze view"),
    ("", "homogeneous linear selects sign elementwise", "dropout dropout2d"),
    ("", "homogeneous linear selects", "alpha_dropout dropout1d dropout3d feature_alpha_dropout"),
    (
        "",
        "homogeneous linear selects copies",
        """H T as_strided atleast_1d atleast_2d atleast_3d broadcast_to diag diag_embed diagonal dsplit expand
        expand_as flip fliplr flipud hsplit mH mT moveaxis movedim narrow native_channel_shuffle pixel_unshuffle
        ravel repeat repeat_interleave reshape_as roll rot90 select slice split split_with_sizes swapaxes swapdims t
        tensor_split tile unbind unflatten unfold unsafe_chunk unsafe_split unsafe_view view_as vsplit""",
    ),
    ("", "homogeneous linear selects copies elementwise", "alias as_tensor cpu cuda identity resolve_conj resolve_neg"),
    ("", "homogeneous linear selects copies elementwise", "to_copy type type_as"),
    ("", "homogeneous linear selects", "broadcast_tensors pack_padded_sequence pad_packed_sequence tril triu"),
    ("", "homogeneous selection selects copies indexes", "gather index_select take_along_dim"),
    ("", "homogeneous linear constant selects copies sign", "cat"),
    ("", "homogeneous linear constant selects copies", "dstack hstack pad stack vstack"),
    ("", "homogeneous linear constant selects", "copy pad_sequence setitem"),
    ("", "homogeneous constant selects copies", "column_stack index_fill row_stack select_scatter slice_scatter"),
    ("", "homogeneous constant selects copies indexes", "index_copy masked_scatter"),
    ("", "homogeneous constant selects indexes", "index_put scatter"),
    ("", "homogeneous constant selection selects elementwise", "masked_fill where"),
    ("", "homogeneous constant", "fill put"),
    ("", "homogeneous linear", "conj fft_fftshift fft_ifftshift imag istft real stft view_as_complex view_as_real"),
    *(("", "homogeneous linear", f"fft_{kind}fft fft_{kind}fft2 fft_{kind}fftn") for kind in ("", "i", "r", "ir")),
)

#: Other names of the same functions.
_ALIASES = dict(
    pair.split(":")
    for pair in """absolute:abs arccos:acos arccosh:acosh arcsin:asin arcsinh:asinh arctan:atan arctanh:atanh clip:clamp
    concat:cat concatenate:cat divide:div fix:trunc float_power:pow ger:outer iadd:add idiv:div imatmul:matmul
    imod:remainder imul:mul isub:sub itruediv:div linalg_matmul:matmul log_sigmoid:logsigmoid mod:remainder multiply:mul
    negative:neg radd:add rmul:mul rtruediv:rdiv special_digamma:digamma special_erf:erf special_erfc:erfc
    special_erfinv:erfinv special_exp2:exp2 special_expit:expit special_expm1:expm1 special_gammaln:lgamma special_i0:i0
    special_log1p:log1p special_log_softmax:log_softmax special_logit:logit special_logsumexp:logsumexp
    special_psi:digamma special_round:round special_sinc:sinc special_softmax:softmax subtract:sub true_divide:div
    truediv:div""".split()  # noqa: SIM905
)

#: What made values that are still such, in a wide sense, between them.
_KEPT_BETWEEN = Born.SQUASHED | Born.BALANCED | Born.SOFTMAX | Born.ROUTED
#: What functions of these properties give.
_GIVEN = {"nonnegative": NONNEGATIVE, "squashing": Born.SQUASHED, "balanced": Born.BALANCED, "gating": Born.GATING}
#: Functions that look at a tensor without reading its values, or hand on none that depends on it.
_METADATA = frozenset(
    """backward_hooks data_ptr detach dim element_size get_device has_names is_complex is_contiguous is_conj is_cuda
    is_floating_point is_inference is_leaf is_neg is_nonzero is_pinned is_same_size is_shared is_signed is_view len
    names ndimension nelement numel output_nr register_hook register_post_accumulate_grad_hook requires_grad result_type
    retain_grad set size storage storage_offset stride untyped_storage""".split()  # noqa: SIM905
)
#: Attributes that are tensors made of the tensor.
_VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag"})

#: Modules of torch that call a function of this kind only; a type in a map that one of these is matches the function.
_MODULES: dict[str, type[nn.Module]] = {
    **{f"conv{n}d": getattr(nn, f"Conv{n}d") for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": getattr(nn, f"ConvTranspose{n}d") for n in (1, 2, 3)},
    "convolution": nn.Conv2d,
}

#: Names of positional arguments, where rules ask for them.
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "instance_norm": (
        "input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps",
    ),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "glu": ("input", "dim"),
    "pad": ("input", "pad", "mode", "value"),
    "hardtanh": ("input", "min_val", "max_val", "inplace"),
    "clamp": ("input", "min", "max"),
    "clamp_min": ("input", "min"),
    "clamp_max": ("input", "max"),
    "logsumexp": ("input", "dim", "keepdim"),
    **dict.fromkeys(("prod", "softmax", "log_softmax", "softmin"), ("input", "dim")),
    **dict.fromkeys(("add", "div", "mul", "rsub", "sub"), ("input", "other")),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    **{
        f"{kind}max_pool{n}d{ending}": names
        for kind, names in (
            ("", ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
            ("adaptive_", ("input", "output_size", "return_indices")),
        )
        for n in (1, 2, 3)
        for ending in ("", "_with_indices")
    },
}  # fmt: skip
#: The same for functions that torch has in C++, too, with another order.
_BUILT_IN: dict[str, tuple[str, ...]] = {
    "batch_norm": ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    "instance_norm": ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps"),
}


@dataclass(frozen=True, eq=False)
class Function:
    """What is known of a function of torch.

    Attributes
    ----------
    name : str
        Plain name, as it was called.
    canonical : str
        Name in the table.
    kind : str
        One of `KINDS`, or ``""``.
    properties : frozenset of str
        Of `PROPERTIES`.
    known : bool
        Whether it is in the table.
    metadata : bool
        Whether it reads no values.
    parse : callable or None
        Takes a call of a sum of weighted inputs apart; see `crp.rules.operands`.
    reads_first : bool
        Whether it reads the values of its first operand only; others give type or shape.
    example : type or None
        Module type of torch that calls this function and nothing else.
    keeps, gives : int
        What is known of its result: notes of all operands that it keeps, and notes that it gives (`crp.rules.notes`).
    arguments, operands : tuple of str
        Names of positional arguments, where they are not those of the table; of a kernel that is registered as
        attention, those of queries, keys, values and mask.
    """

    name: str
    canonical: str
    kind: str = ""
    properties: frozenset[str] = frozenset()
    known: bool = False
    metadata: bool = False
    parse: Parse | None = None
    reads_first: bool = False
    example: type[nn.Module] | None = None
    keeps: int = 0
    gives: int = 0
    arguments: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()

    def has(self, *properties: str) -> bool:
        """Whether it has any of these properties."""
        return not self.properties.isdisjoint(properties)

    def __repr__(self) -> str:
        return f"{self.name}()"


_ENTRIES = {name: (kind, frozenset(has.split())) for kind, has, names in _TABLE for name in names.split()}
_functions: dict[Any, Function] = {}


def look_up(function: Callable[..., Any]) -> Function:
    """What is known of a function, however it is spelled."""
    entry = _functions.get(function)
    if entry is None:
        entry = _functions[function] = _described(*_named(function))
    return entry


def _enter(function: Callable[..., Any], known: Function) -> None:
    """Make a function known that torch does not have."""
    _functions[function] = known


def _named(function: Callable[..., Any]) -> tuple[str, bool]:
    """Plain name, and whether it is the getter of an attribute."""
    name = name_of(function)
    if getattr(function, "__name__", "") != "__get__":
        return name, False
    return name_of(getattr(function, "__self__", function)), True


@lru_cache(maxsize=4096)
def _described(name: str, is_attribute: bool = False) -> Function:
    """What is known of a function of this plain name."""
    if name in _METADATA or (is_attribute and name not in _VIEWS):
        return Function(name, name, metadata=True)
    canonical = _ALIASES.get(name, name)
    kind, properties = _ENTRIES.get(canonical, ("", frozenset()))
    keeps, gives = 0 if canonical in PARSERS or canonical == "native_multi_head_attention" else FIRST, 0
    if properties & {"selects", "scales"}:
        keeps |= BORN
    keeps |= NONNEGATIVE if "sign" in properties else 0
    keeps |= Born.ACTIVATION if properties >= {"rescaled", "elementwise"} else 0  # (the square of one is one)
    keeps |= Born.SOFTMAX if "elementwise" in properties else 0
    keeps |= _KEPT_BETWEEN if "between" in properties else 0  # (a gate may be resized, attention averaged)
    keeps |= Born.SQUASHED if canonical in ("cumprod", "prod") else 0
    gives |= sum(flag for name, flag in _GIVEN.items() if name in properties)
    gives |= Born.SOFTMAX if canonical in ("softmax", "softmin") else 0
    gives |= Born.EXPONENTIAL if canonical in ("exp", "exp2", "rpow") else 0
    gives |= Born.LOGARITHM if canonical in ("log_softmax", "logsumexp") else 0
    gives |= Born.DIVISOR if canonical in ("rdiv", "reciprocal", "rsqrt") else 0
    gives |= Born.ACTIVATION if kind == "activation" and "elementwise" in properties else 0  # (a GLU is a product)
    example = _MODULES.get(canonical, nn.Linear if kind == "dense" else None)
    known, parse = canonical in _ENTRIES, PARSERS.get(canonical)
    reads_first = canonical in ("expand_as", "reshape_as", "to", "type_as", "view_as")
    return Function(name, canonical, kind, properties, known, False, parse, reads_first, example, keeps, gives)


def canonical(name: str) -> str:
    """Name in the table of a function that may be called otherwise."""
    return _ALIASES.get(name, name)


@lru_cache(maxsize=4096)
def activation(name: str, gives: int = 0) -> Function:
    """A module that is one activation, made of elementwise functions, of which the last one gives these notes."""
    properties = frozenset({"identity", "rescaled", "elementwise"})
    return Function(name, name, "activation", properties, True, keeps=FIRST, gives=gives | Born.ACTIVATION)


def names_with(*properties: str) -> tuple[str, ...]:
    """Names in the table of functions that are of one of these kinds, or have one of these properties, sorted."""
    unknown = set(properties) - PROPERTIES - set(KINDS)
    if unknown:
        raise InputError(f"no kind or property of functions: {sorted(unknown)}")
    chosen = (name for name, (kind, has) in _ENTRIES.items() if kind in properties or has & set(properties))
    return tuple(sorted(chosen))


def check_names(names: Sequence[str]) -> None:
    """Raise an `InputError` if a name is neither of a function of torch, nor of an operator registered with it."""
    unknown = [name for name in names if not _described(name).known]
    if not unknown:
        return
    functions = chain.from_iterable(get_overridable_functions().values())
    operators = (name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names())
    known = {*_ENTRIES, *_ALIASES, *map(name_of, functions), *map(_plain, operators)}
    for name in unknown:
        if name not in known:
            raise InputError(f"there is no function {name!r} of torch{nearest(name, known)}")


def _arguments_of(
    known: Function, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by name, where the names of positional ones are known."""
    named = {"input" if key == "self" else key: value for key, value in kwargs.items()}
    return {**dict(zip(_parameters_of(known, function), args, strict=False)), **named}


def _parameters_of(known: Function, function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a function's positional arguments; empty where rules need none."""
    if known.arguments:
        return known.arguments
    if known.canonical in _BUILT_IN and not isinstance(function, FunctionType):
        return _BUILT_IN[known.canonical]
    return _PARAMETERS.get(known.canonical, ())


assert all(set(properties.split()) <= PROPERTIES for _, properties, _ in _TABLE)
