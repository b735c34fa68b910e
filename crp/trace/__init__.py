"""Where every tensor of one forward pass came from.

`trace` runs a model once and follows every tensor: module calls are seen by hooks, everything between them (``+``,
`torch.cat`, slices, in-place operations, functional layers) by a `torch.overrides.TorchFunctionMode`. `recorded` keeps
the record for the model. `crp.trace.graph` asks questions of it.

What runs inside one function of torch (all of `multi_head_attention_forward`) is one operation. Operations that torch
does not show to Python (the C++ part of a custom `autograd.Function`, a round trip through numpy) lose the trail; the
output of the module around them then counts as made from all of that module's inputs.
"""

from crp.trace.cache import Passive, Structure, known, recorded, structure
from crp.trace.record import FunctionCall, ModuleCall, Node, Operand, Reader, TensorKind, Trace
from crp.trace.recorder import trace

__all__ = [
    "FunctionCall",
    "ModuleCall",
    "Node",
    "Operand",
    "Passive",
    "Reader",
    "Structure",
    "TensorKind",
    "Trace",
    "known",
    "recorded",
    "structure",
    "trace",
]
