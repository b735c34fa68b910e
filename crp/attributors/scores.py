"""The one number that is followed while an image is changed: the score of a target, often a probability."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import Tensor, nn
from zennit.core import Composite

from crp.attributors.selected import Selected
from crp.attributors.target import Classes, Mask, Target
from crp.engine.attached import check_composite, put_on
from crp.engine.forward import check_columns, tensor_in
from crp.engine.independence import check_independent
from crp.engine.inputs import Data, Inputs
from crp.engine.probabilities import log_probabilities, probabilities
from crp.engine.taps import check_layers, outputs_meant, tapped
from crp.engine.targets import ONE_SCORE
from crp.errors import InputError, InputTypeError
from crp.layers import unwrap
from crp.layers.autograd import lay_out_alike
from crp.layers.devices import device_of
from crp.layers.interrupts import atomic

ScoreName = Literal["softmax", "log_softmax", "output"]
_GIVE_TARGET = (
    "give a target, such as crp.outputs.Position(-1, token) for a language model, or choose by output= what is "
    "explained, as crp.outputs.segmentation() does"
)


def target_of(target: Any, n_samples: int) -> Target | None:
    """Target from a user's argument, checked before the model runs; None stands for what the model predicts.

    Raises
    ------
    TypeError
        If it is no target, or one inside of the model.
    ValueError
        If it is for another number of samples.
    """
    if target is None:
        return None
    chosen = Target.of(target)
    if chosen.layer is not None:
        raise InputTypeError(f"target must be one of the model's output; it is in layer {chosen.layer!r}")
    chosen.check(n_samples)
    return chosen


def known_target(target: Target | None, output: Tensor) -> Target:
    """Target of every sample: for None, the class with the greatest output.

    Parameters
    ----------
    target : Target or None
    output : Tensor of shape (samples, classes)
        Or of any shape, where there is a target.
    """
    if target is not None:
        return target
    if output.dim() != 2:
        raise InputError(
            f"the model's output has shape {tuple(output.shape)}, of which no class is the predicted one; "
            + (ONE_SCORE if output.dim() == 1 else _GIVE_TARGET)
        )
    return Classes(output.detach().argmax(1))


def score_of(output: Tensor, target: Target, score: ScoreName = "softmax", shares: bool | None = None) -> Tensor:
    """Score of each row.

    Parameters
    ----------
    output : Tensor of shape (rows, classes, ...)
    target : Target
        A target that is a function gets the output itself; ``score`` counts for classes and masks only.
    score : "softmax", "log_softmax" or "output"
        Probability of the class, its logarithm, or the output itself. Probabilities are taken as they are, and a single
        output gets a sigmoid.
    shares : bool, optional
        Whether outputs are probabilities, as those of the data have told; by default, these rows do.

    Returns
    -------
    Tensor of shape (rows,)
    """
    scored = target.target if isinstance(target, Selected) else target
    if isinstance(scored, Classes | Mask) and score != "output" and output.dim() > 1:
        if isinstance(target, Selected):
            check_exclusive(score, target.output)
        output = (probabilities if score == "softmax" else log_probabilities)(output, shares)
    return target.score(output)


def check_exclusive(score: ScoreName, output: object) -> None:
    """Raise a `ValueError` if a probability is asked for of scores that ``output`` says have none."""
    if score != "output" and not getattr(output, "exclusive", True):
        raise InputError(
            f"score={score!r} is of classes that exclude each other, and those of output= do not; give 'output'"
        )


@atomic
def explaining(
    model: nn.Module,
    composite: Composite | None = None,
    select: Callable[[Any], Tensor] = tensor_in,
    layer: str | None = None,
) -> Iterator[Callable[[Data], Tensor]]:
    """Context with a function from inputs to the output of a model in evaluation mode. On leaving, all is as before.

    Parameters
    ----------
    model : nn.Module
    composite : zennit.core.Composite, optional
        Put on the model meanwhile. Whether the model predicts each sample by itself is looked at without one only.
    select : callable
        Takes the output from what the model returns.
    layer : str, optional
        Whose output is given, in place of the model's.
    """
    model = unwrap(model)
    check_composite(composite)
    check_layers(model, [] if layer is None else [layer], "layer")
    device, roles = device_of(model), {} if layer is None else {layer: "layer"}
    with put_on(composite, model) as modified:

        def run(data: Data) -> Tensor:
            inputs = Inputs.of(data).to(device)
            if composite is None:
                check_independent(modified, inputs, [range(len(inputs))], select)
            with tapped(modified, roles) as taps:
                returned = inputs.run(modified)
            output = select(returned) if layer is None else outputs_meant(taps, roles)[0][layer]
            what = "the model's output" if layer is None else f"the output of layer {layer!r}"
            check_columns(what, output, len(inputs))
            lay_out_alike([output])
            return output

        yield run
