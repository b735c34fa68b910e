"""Merging batch norm into the linear layer next to it.

In evaluation mode batch norm is affine, so that a linear layer just before or after it can take it in. Rules then see
the weights that data really meet. The merge is exact (the batch norm is not executed while merged), follows the order
of execution, and is undone by putting the very same parameters back.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from zennit.canonizers import Canonizer
from zennit.core import RemovableHandleList

from crp.canonizers.folding import fold
from crp.canonizers.norms import _has_batch_norm, _rest_of, is_batch_norm, obstacle
from crp.canonizers.places import Place, Plan, Side, _Candidate, _Linear, _merge_obstacle, _plan_of
from crp.layers import OfThread, tracing
from crp.layers.interrupts import undivided
from crp.notices import warn
from crp.trace import Passive, Structure, known, recorded, structure
from crp.wording import first_few


class MergeBatchNorm(Canonizer):  # type: ignore[misc]
    """Merge every batch norm into the linear or convolutional layer next to it.

    The layer before the norm is preferred; nothing but the norm may read its output. Otherwise it is the layer after
    the norm, if that is exact: zero padding must not meet a shift. If norm and layer are called several times, this
    must hold in every call. A function counts as a layer if its weight and bias are parameters of the model:
    ``F.conv2d(x, self.kernel, self.offset)``.

    One traced forward pass, at the first call of the model, finds which layers are next to each other. The result and
    the merged parameters are kept for the model until one of them changes.

    What cannot be merged is left alone; it is affine, unless in training mode, so that a rule can treat it. A warning
    names what could be, if a weight were stored that is computed at each call: of a pruned or parametrized layer; or if
    batch norm were a module, and not the function, as in models that `torch.export` made; or if nothing like `flatten`
    came in between.

    Attributes
    ----------
    merged : dict of str to str
        Batch norms that were merged, and into which layer, or function and weight; known after the first call.
    left : dict of str to str
        Batch norms that were left alone, and why; known after the first call.

    Notes
    -----
    Batch norm of torch, synchronized and frozen ones, and timm's batch norms with an activation, which stays. A model
    that takes another way through its layers at a later call, with all modules as before, is not noticed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.merged: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self._undo: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        self._bypassed: list[nn.Module] = []
        self._handles = RemovableHandleList()

    def apply(self, root_module: nn.Module) -> list[MergeBatchNorm]:
        """Merge now where the plan is known, otherwise at the model's first call.

        Parameters
        ----------
        root_module : nn.Module

        Returns
        -------
        list of one MergeBatchNorm
        """
        instance = self.copy()
        try:
            if _has_batch_norm(root_module):
                instance.register(root_module)
        except BaseException:
            instance.remove()
            raise
        return [instance]

    def register(self, root_module: nn.Module) -> None:
        """Merge, or arrange for it."""
        key = structure(root_module)
        record = known(root_module, key)
        if record is not None:
            self._merge(_plan_of(root_module, record))
        else:
            hook = Passive(OfThread(partial(self._at_first_call, key)))
            self._handles.append(root_module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def remove(self) -> None:
        """Put the parameters back that were there."""
        self._handles.remove()
        for module, name, parameter in self._undo:
            module._parameters[name] = parameter
        for module in self._bypassed:
            vars(module).pop("forward", None)
        self._undo.clear()
        self._bypassed.clear()

    def copy(self) -> MergeBatchNorm:
        """Return a new instance."""
        return type(self)()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _at_first_call(self, key: Structure, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if tracing():
            return
        self._handles.remove()
        norms = [name for name, module in root.named_modules() if is_batch_norm(module)]
        if any(map(is_lazy, (*root.parameters(), *root.buffers()))):
            self.left = dict.fromkeys(norms, "the model had parameters that no call had initialized")
            return
        try:
            record = recorded(root, args, kwargs, key)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            reason = "the model differentiates inside its forward pass, which the pass that looks for places cannot do"
            self.left = dict.fromkeys(norms, reason)
            warn(f"batch norm is not merged: {reason}")
            return
        self._merge(_plan_of(root, record))

    @undivided
    def _merge(self, plan: Plan) -> None:
        self.merged, self.left = {}, {}
        folds: dict[_Linear, dict[Side, nn.Module]] = {}
        computed, moved = list[str](), dict.fromkeys(plan.moved)
        for candidate in plan.candidates:
            place = self._choose(candidate)
            if place is not None:
                folds.setdefault(place.linear, {})[place.side] = candidate.norm()
            if place is not None or obstacle(candidate.norm()) is not None:
                moved.pop(candidate.name, None)
            else:
                computed += [place.linear.name for place in candidate.places if not place.linear.is_stored]
        if computed:
            warn(
                f"batch norm is not merged into {first_few([*map(repr, computed)], 3, 'layers')}, whose weight or bias "
                "is computed at each call. Store it first, such as by torch.nn.utils.prune.remove, "
                "torch.nn.utils.remove_weight_norm or torch.nn.utils.parametrize.remove_parametrizations"
            )
        if moved:
            warn(
                "batch norm is not merged into the layer before it where entries are moved in between, as by flatten: "
                f"{first_few([*map(repr, moved)], 3)}. But for LRP-0 and ε, relevance differs from that of one that is"
            )
        if plan.functions:
            self.left |= dict.fromkeys(plan.functions, "it is a function, and no module")
            warn(
                "batch norm is not merged into the layer next to it where it is a function, and no module: "
                f"{first_few(plan.functions, 3)}. But for LRP-0 and ε, relevance differs from that of nn.BatchNorm2d, "
                "say, which is merged: use the module; of an exported model, explain the one that it was made from"
            )
        for linear, sides in folds.items():
            weight, bias = linear.weight.get(), None if linear.bias is None else linear.bias.get()
            assert weight is not None  # as `_merge_obstacle` has seen
            merged = fold(linear.form, weight, bias, sides.get("before"), sides.get("after"))
            for slot, parameter in zip((linear.weight, linear.bias), merged, strict=True):
                if slot is not None:
                    self._undo.append((slot.module(), slot.name, slot.get()))
                    slot.module()._parameters[slot.name] = parameter
            for norm in sides.values():
                self._bypassed.append(norm)
                norm.forward = Passive(_rest_of(norm))

    def _choose(self, candidate: _Candidate) -> Place | None:
        """Place to merge at; notes it, or why there is none."""
        if (reason := obstacle(candidate.norm())) is not None:
            self.left[candidate.name] = reason
            return None
        reasons = list(candidate.reasons)
        for place in candidate.places:
            reason = _merge_obstacle(candidate.norm(), place.linear, place.side)
            if reason is None:
                self.merged[candidate.name] = place.linear.name
                return place
            reasons.append(reason)
        self.left[candidate.name] = "; ".join(reasons)
        return None
