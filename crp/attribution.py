"""Conditional attribution: relevance that flows through chosen concepts only.

The engine knows nothing about rules. It runs the model inside a composite's context, sends initial relevance back,
and masks it at the conditioned layers. A composite whose ``encoding`` is ``"multiplier"`` propagates relevance
divided by activation (``R = a * m``); any other propagates relevance itself, as zennit does. In both, the gradient of
the data is its relevance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from zennit.core import Composite

from crp.checks import check_number
from crp.concept_graph import AttributionGraph as AttributionGraph
from crp.concepts import ChannelConcept
from crp.engine.backward import fill_grad, send_back
from crp.engine.call import Call
from crp.engine.checking import Checked, check_explanation
from crp.engine.conditions import MaskMap, Rows
from crp.engine.copies import with_copies
from crp.engine.door import check_device
from crp.engine.forward import tensor_in
from crp.engine.inputs import Data, Explain, Inputs
from crp.engine.replayed import Replayed
from crp.engine.results import one_ahead, sum_of_channels
from crp.engine.settings import Overrides, Settings
from crp.engine.targets import initial_relevance
from crp.errors import InputTypeError
from crp.flags import check_flags, check_function
from crp.layers import differentiable
from crp.layers.devices import device_of
from crp.notices import kind_of, warn
from crp.types import AbsorbedRelevance, AttributionGraphResults, AttributionResults, Condition

#: Masks of channels, which are axis 1 to them.
_OF_CHANNELS = (ChannelConcept.mask, ChannelConcept.mask_rf)
#: What zennit-crp calls in an attribution, or did before version 0.6.
_NEVER_CALLED = {
    *("_attribute", "_conditions_wrapper", "_separate_conditions", "_check_arguments", "_register_mask_fn"),
    *("_append_recording_layer_hooks", "_generate_hook", "_collect_hook_activation_relevance", "_reset_gradients"),
    *("attribution_modifier", "backward_initialization"),
}
attrResult = AttributionResults
attrGraphResult = AttributionGraphResults


class CondAttribution:
    """Conditional attribution of a model's predictions.

    Parameters
    ----------
    model : nn.Module
        Wrappers of `torch.compile` and `DataParallel` are taken off, so that layers keep their names.
    device : torch.device or str, optional
        Where the data is moved; the device of the model's parameters by default.
    overwrite_data_grad : bool
        Whether each call replaces ``data.grad`` of data that requires a gradient, or adds to it.
    no_param_grad : bool
        Kept for compatibility and without effect: parameters never take part in autograd during a call.
    output : callable, optional
        Tensor to explain as a function of what the model returns, such as ``lambda out: out["out"].mean((2, 3))``, or a
        list with a tensor for each sample; by default the model's output itself, or its ``logits``. An attribute
        ``exclusive`` of it says whether classes exclude each other.

    Attributes
    ----------
    MODEL_OUTPUT_NAME : str
        Key of the targets in a condition, ``"y"``; may be changed.
    replay : bool
        Whether attributions that differ in data, targets and concepts only are replayed after a few times, without the
        Python around torch's kernels; on a GPU as a CUDA graph. Models that decide by values, hooks of others and any
        change of the model or of what its code names are noticed; not of files or the environment.
    channels_last : bool
        Whether data may have the channels last in memory where that is faster; results are equal to rounding.

    Notes
    -----
    Concept Relevance Propagation, Achtibat et al., "From attribution maps to human-understandable explanations
    through Concept Relevance Propagation", Nature Machine Intelligence 5 (2023), section "Methods".

    Subclasses may override `relevance_init`, `heatmap_modifier`, `backward`, `broadcast` and `select_output`.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).eval()
    >>> attribution = CondAttribution(net)
    >>> result = attribution(torch.ones(1, 4), [{"y": 1}, {"y": 1, "0": [2]}], record_layer=["0"])
    >>> result.relevances["0"].shape
    torch.Size([2, 3])
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if uncalled := sorted(_NEVER_CALLED & vars(cls).keys()):
            warn(
                f"{cls.__name__} overrides {', '.join(uncalled)} of zennit-crp, which nothing calls here. Override "
                "relevance_init, heatmap_modifier, backward or broadcast, or change what super().__call__ returns"
            )

    def __init__(
        self, model: nn.Module, device: torch.device | str | None = None, overwrite_data_grad: bool = True,
        no_param_grad: bool = True, *, output: Callable[[Any], Tensor] | None = None,
    ) -> None:  # fmt: skip
        check_flags(overwrite_data_grad=overwrite_data_grad, no_param_grad=no_param_grad)
        check_function("output", output, "what the model returns")
        self.MODEL_OUTPUT_NAME = "y"
        self.model = differentiable(model)
        self.device = check_device(device, "device") or device_of(self.model)
        self.overwrite_data_grad, self.no_param_grad, self.output = overwrite_data_grad, no_param_grad, output
        self.replay = self.channels_last = True
        self._replayed = Replayed()

    @property
    def exclusive(self) -> bool:
        """Whether a softmax of scores is a probability of classes: not where ``output`` has ``exclusive = False``."""
        return bool(getattr(self.output, "exclusive", True))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, device={str(self.device)!r})"

    def __call__(
        self,
        data: Data,
        conditions: Sequence[Condition],
        composite: Composite | None = None,
        record_layer: Sequence[str] = (),
        mask_map: MaskMap = ChannelConcept.mask,
        start_layer: str | None = None,
        init_rel: Any = None,
        on_device: torch.device | str | None = None,
        exclude_parallel: bool = True,
        *,
        explain: Explain = None,
    ) -> AttributionResults:
        """Relevance of the data, and of recorded layers, for every (sample, condition).

        Parameters
        ----------
        data : Tensor of shape (samples, *input shape), list of samples, or tuple or dict of inputs
            It need not require a gradient. Samples in a list, of (*input shape) each, may differ in shape: the model
            gets those one at a time. A tuple holds the positional arguments of a model with several inputs, a dict its
            keyword arguments; numbers, strings and None among them are passed on as they are.
        conditions : list of dict
            ``{layer name: concept ids, "y": targets}``. Relevance flows through these concepts of these layers only;
            it starts at the targets (several are summed). As many conditions as samples are paired with them;
            otherwise every sample meets every condition, and rows come sample by sample. An empty list of ids lets
            nothing through. ``"name#1"`` is the second call of a layer, ``"name.input"`` what it is called with.
        composite : zennit.core.Composite, optional
            Rules and canonizers: one of ours or of zennit's. None is the plain gradient or, within its context, the
            composite that is on the model.
        record_layer : sequence of str
            Layers whose activations and relevances are returned, beside those that are conditioned or started from. A
            layer that is called several times is recorded at its last call; ``"name#0"`` names the first.
        mask_map : callable or dict of str to callable
            ``(row, concept ids, layer name) -> function of the gradient``, for all layers or for each.
        start_layer : str, optional
            Where relevance starts, in place of the output; targets are then ignored.
        init_rel : Tensor, number or callable, optional
            Initial relevance in place of the output's own value: a tensor that broadcasts to (rows, *output shape), a
            constant, or a function of the output of shape (rows, *output shape).
        on_device : torch.device or str, optional
            Where the results are moved.
        exclude_parallel : bool
            Whether relevance flows through the conditioned layers only, and not past them through parallel branches.
            Layers of a condition are then named from the output to the input.
        explain : int, str, or sequence of these, optional
            Positions (in a tuple) or names (in a dict) of the inputs that are explained: all floating-point tensors by
            default. Others, such as ids or masks, are passed on.

        Returns
        -------
        AttributionResults
            ``heatmap, activations, relevances, prediction``, one row per (sample, condition) in the caller's order. The
            heatmap is a tensor where one input is explained. For several it has the form of the data, a tuple or dict,
            with None for inputs that are passed on. Where rows differ in shape, as heatmaps of a list's samples and
            scores of boxes may, there is a list with a tensor for each row.

        Raises
        ------
        KeyError
            If a layer is not in the model, or an input to explain not in the data.
        ValueError, TypeError, IndexError
            If conditions, data, targets or initial relevance do not fit; the message names which, and what would be
            right.
        RuntimeError
            If the layers of a condition are not in order (with ``exclude_parallel``), or a composite is given while
            another one is on the model.
        """
        settings = Settings(record_layer, mask_map, start_layer, init_rel, on_device, exclude_parallel, explain)
        call = self.plan(data, conditions, composite, settings)
        part = next(call.parts())
        result, relevances = call.checked(part, _OF_CHANNELS), part[1]
        if call.overrides.broadcast is None:
            for tensor, relevance in zip(call.inputs.given(data), relevances, strict=True):
                if tensor is not None:
                    fill_grad(tensor, call.rows.samples, relevance, self.overwrite_data_grad)
        return result

    def generate(
        self,
        data: Data,
        conditions: Sequence[Condition],
        composite: Composite | None = None,
        record_layer: Sequence[str] = (),
        mask_map: MaskMap = ChannelConcept.mask,
        start_layer: str | None = None,
        init_rel: Any = None,
        batch_size: int = 10,
        on_device: torch.device | str | None = None,
        exclude_parallel: bool = True,
        verbose: bool = True,
        *,
        explain: Explain = None,
    ) -> Iterator[AttributionResults]:
        """Attribute many conditions in parts of ``batch_size`` rows, so that memory does not grow with their number.

        Takes the parameters of `__call__`, and gives the same rows in the same order. While the generator waits, the
        model is untouched. Composites in multiplier encoding, and the plain gradient, need one forward pass for all
        parts. On a GPU, the next part is computed while you have one, unless ``replay`` is off.

        Parameters
        ----------
        batch_size : int
            Rows per part; the last one may have fewer.
        verbose : bool
            Whether to show a progress bar.

        Yields
        ------
        AttributionResults
        """
        check_number("batch_size", batch_size, 1, whole=True)
        check_flags(verbose=verbose)
        settings = Settings(record_layer, mask_map, start_layer, init_rel, on_device, exclude_parallel, explain)
        call = with_copies(replace(self.plan(data, conditions, composite, settings), batch_size=batch_size))
        parts = call.parts()
        if self.replay and self._replayed.replays.runs_ahead(self.device):
            parts = one_ahead(parts)
        checked = map(partial(call.checked, of_channels=_OF_CHANNELS), parts)
        return self._show(checked, -(-len(call.rows) // batch_size), verbose)

    def absorbed(
        self, data: Data, conditions: Sequence[Condition], composite: Composite | None,
        mask_map: MaskMap = ChannelConcept.mask, start_layer: str | None = None, init_rel: Any = None,
        exclude_parallel: bool = True, *, explain: Explain = None,
    ) -> AbsorbedRelevance:  # fmt: skip
        """Relevance that layers keep, and do not hand on to the data: with biases, or where nothing contributed.

        Takes the parameters of `__call__`. For each row, ``initial = input + sum of what layers kept + rest``. The
        input's is the sum over all inputs that are explained; the rest is 0 but for what conditions mask. What inputs
        that are passed on add counts as a bias where it is added.

        Parameters
        ----------
        composite : crp.composites.Composite or None
            None for the one that is on the model.

        Returns
        -------
        AbsorbedRelevance

        Raises
        ------
        TypeError
            If the composite is one of zennit, which keeps no account.
        """
        settings = Settings((), mask_map, start_layer, init_rel, None, exclude_parallel, explain)
        return self.plan(data, conditions, composite, settings).absorbed()

    def check(self, data: Data, conditions: Sequence[Condition], composite: Composite | None = None) -> Checked:
        """Check what a careful user would: `print` it, or take its ``to_dict()``; its ``holds`` is the verdict.

        The prediction is unchanged; relevance of the data, and what layers keep, is what started; all is finite, and
        the same again; shuffled weights give another heatmap; which rule reached how many operations. Takes the first
        three parameters of `__call__`, and returns a `Checked`.
        """
        return check_explanation(self, data, conditions, composite)

    def plan(
        self, data: Data, conditions: Sequence[Condition], composite: Composite | None, settings: Settings
    ) -> Call:
        """Call of the engine with the methods that a subclass overrides, checked before the model runs."""
        settings = settings.naming(self.MODEL_OUTPUT_NAME)
        means = settings, self._overrides(), self.channels_last, self._replayed if self.replay else None
        return Call.plan(self.model, self.device, data, conditions, composite, *means)

    def _overrides(self) -> Overrides:
        methods = {name: getattr(self, name) for name in Overrides.__dataclass_fields__}
        own = {n: m for n, m in methods.items() if getattr(m, "__func__", None) is not vars(CondAttribution)[n]}
        if self.output is not None:
            own["select_output"] = self.select_output
        return Overrides(**own)

    def relevance_init(self, prediction: Tensor, target_list: Sequence[Any] | None, init_rel: Any) -> Tensor:
        """Initial relevance; override it to start from anything else.

        Parameters
        ----------
        prediction : Tensor of shape (rows, *output shape)
            Model output, or activation of the start layer.
        target_list : sequence, or None
            Targets of each row; None for a row, or for all, is the whole output.
        init_rel : Tensor, number, callable or None
            As in `__call__`.

        Returns
        -------
        Tensor of shape (rows, *output shape)
        """
        return initial_relevance(prediction, target_list, init_rel)

    def heatmap_modifier(self, data: Tensor, on_device: torch.device | str | None = None) -> Tensor:
        """Heatmap from ``data.grad``, the relevance of one input; override it for inputs without a channel axis.

        Parameters
        ----------
        data : Tensor of shape (rows, channels, *space)
        on_device : torch.device or str, optional

        Returns
        -------
        Tensor of shape (rows, *space)
            Sum over the channels; the relevance itself of an input of one number for each row, (rows,).
        """
        return sum_of_channels(data, on_device)

    def backward(
        self, pred: Tensor, grad_mask: Tensor, partial_backward: bool, layer_names: Sequence[str],
        layer_out: Mapping[str, Tensor], generate: bool = False,
    ) -> None:  # fmt: skip
        """Send ``grad_mask`` from ``pred`` back into the data, for one condition per sample.

        Parameters
        ----------
        pred : Tensor of shape (samples, *output shape)
        grad_mask : Tensor of the same shape
            What starts at ``pred``.
        partial_backward : bool
            Whether to go from conditioned layer to conditioned layer only.
        layer_names : sequence of str
            Conditioned layers, from the output to the input.
        layer_out : mapping of str to Tensor
            Outputs of the conditioned layers.
        generate : bool
            Whether the graph is needed again.
        """
        send_back(pred, grad_mask, partial_backward, layer_names, layer_out, generate)

    def broadcast(self, data: Any, conditions: Sequence[Condition]) -> tuple[Any, Sequence[Condition]]:
        """Pair data with conditions, one row each; override it for another pairing.

        Parameters
        ----------
        data : Tensor of shape (samples, *input shape), or tuple or dict of them
        conditions : sequence of dict

        Returns
        -------
        data : Tensor of shape (rows, *input shape), or tuple or dict of them
        conditions : sequence of dict, one per row
        """
        inputs = Inputs.of(data, None, self.model)
        rows = Rows.broadcast(len(inputs), conditions)
        return inputs.select(list(rows.samples)).data, list(rows.conditions)

    def select_output(self, output: Any) -> Tensor:
        """Tensor to explain in what the model returns: what ``output`` says, or else itself or its ``logits``."""
        if self.output is None:
            return tensor_in(output)
        chosen: Any = self.output(output)
        listed = chosen if isinstance(chosen, list) else [chosen]
        if not listed or not all(isinstance(tensor, Tensor) for tensor in listed):
            raise InputTypeError(f"output must return the tensor to explain; it returned {kind_of(chosen)}")
        return cast(Tensor, chosen)

    @staticmethod
    def _show(parts: Iterator[AttributionResults], n_parts: int, verbose: bool) -> Iterator[AttributionResults]:
        for _ in tqdm(range(n_parts), disable=not verbose, dynamic_ncols=True):
            yield next(parts)
