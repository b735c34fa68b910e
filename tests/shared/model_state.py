"""All that may change on a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _bytes(tensor: Tensor | None) -> object:
    if tensor is None:
        return None
    flat = tensor.detach().cpu().contiguous().view(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that may change on a model, as plain data that compares with ``==``."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[name, "type"] = type(module)
        state[name, "training"] = module.training
        state[name, "attributes"] = sorted(vars(module))
        state[name, "children"] = [(key, id(child)) for key, child in module._modules.items()]
        for key, value in vars(module).items():
            if "hook" in key and hasattr(value, "keys"):
                state[name, key] = list(value.keys())
        for key, parameter in module._parameters.items():
            known = None if parameter is None else (id(parameter), parameter.requires_grad, _bytes(parameter.grad))
            state[name, "parameter", key] = known, _bytes(parameter)
        for key, buffer in module._buffers.items():
            state[name, "buffer", key] = None if buffer is None else id(buffer), _bytes(buffer)
    return state
