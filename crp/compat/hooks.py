"""Hooks under zennit's protocol, as zennit-crp has them: for code that puts them on layers itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import RemovableHandleList

from crp.engine.masks import apply_masks
from crp.types import MaskFn


class MaskHook:
    """Hook, in zennit's protocol, that applies mask functions to the gradient of a layer's output.

    Parameters
    ----------
    fn_list : list of callable
        Functions of the gradient; applied in order to a copy, so that a parallel branch sharing the gradient is not
        touched.
    """

    def __init__(self, fn_list: list[MaskFn]) -> None:
        self.fn_list = fn_list

    def post_forward(self, module: nn.Module, input: Any, output: Any) -> None:
        """Forward hook: listen to the gradient of the (first) output."""
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(lambda grad: self.backward(module, grad))

    def backward(self, module: nn.Module, grad: Tensor | None) -> Tensor | None:
        """Mask a copy of the gradient; none comes to what a rule holds constant."""
        return None if grad is None else apply_masks(self.fn_list, grad)

    def copy(self) -> MaskHook:
        """Return a hook that shares the list of functions."""
        return type(self)(self.fn_list)

    def remove(self) -> None:
        """Forget the functions."""
        self.fn_list.clear()

    def register(self, module: nn.Module) -> RemovableHandleList:
        """Put the hook on a module."""
        return RemovableHandleList([self, module.register_forward_hook(self.post_forward)])


class FeatVisHook:
    """Hook, in zennit's protocol, that hands a layer's activation and relevance to a feature visualization.

    Parameters
    ----------
    FV : FeatureVisualization
        Its ``analyze_activation`` and ``analyze_relevance`` are called.
    concept : Concept
    layer_name : str
    dict_inputs : dict
        ``"sample_indices"`` and ``"targets"`` of the current batch.
    on_device : str or torch.device, optional
        Where the tensors are moved first.
    """

    def __init__(
        self, FV: Any, concept: Any, layer_name: str, dict_inputs: dict[str, Any], on_device: Any = None
    ) -> None:
        self.FV, self.concept, self.layer_name = FV, concept, layer_name
        self.dict_inputs, self.on_device = dict_inputs, on_device

    def post_forward(self, module: nn.Module, input: Any, output: Tensor) -> None:
        """Forward hook: analyze the activation, and the relevance once it comes."""
        self._analyze(self.FV.analyze_activation, output)
        if output.requires_grad:
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda grad: self._analyze(
                    self.FV.analyze_relevance, torch.zeros_like(output) if grad is None else grad
                )
            )

    def _analyze(self, analyze: Callable[..., object], tensor: Tensor) -> None:
        tensor = tensor.detach().to(self.on_device) if self.on_device else tensor.detach()
        indices, targets = self.dict_inputs["sample_indices"], self.dict_inputs["targets"]
        analyze(tensor, self.layer_name, self.concept, indices, targets)

    def copy(self) -> FeatVisHook:
        """Return a hook for the same feature visualization."""
        return type(self)(self.FV, self.concept, self.layer_name, self.dict_inputs, self.on_device)

    def remove(self) -> None:
        """Do nothing: there is no state."""

    def register(self, module: nn.Module) -> RemovableHandleList:
        """Put the hook on a module."""
        return RemovableHandleList([module.register_forward_hook(self.post_forward)])
