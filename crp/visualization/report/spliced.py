"""What an autoencoder that is spliced into the model leaves unexplained, for the pages of its latents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from zennit.core import Composite

from crp.concepts.spliced import spliced_parts
from crp.visualization.feature import FeatureVisualization
from crp.visualization.table.store import Table
from crp.visualization.text_references import read_text
from crp.wording import counted, percent

#: Rows of the table that the error is measured on, evenly chosen.
_ROWS = 32


class Unexplained(NamedTuple):
    """Error of an autoencoder.

    Attributes
    ----------
    activation : float
        Squared length of the error, as a share of that of the layer's output.
    relevance : float
        Absolute relevance of the error, as a share of that of error and autoencoder together.
    n : int
        Samples.
    """

    activation: float
    relevance: float
    n: int

    @property
    def sentence(self) -> str:
        """Both in words."""
        return (
            f"The dictionary does not explain {percent(self.activation)} of the activation (squared) and "
            f"{percent(self.relevance)} of the absolute relevance of its layer, on {counted(self.n, 'sample')}."
        )


def unexplained_of(
    fv: FeatureVisualization, composite: Composite | None, table: Table, layers: Iterable[str]
) -> dict[str, Unexplained]:
    """Error of each of the layers that are latents of an autoencoder."""
    rows = table.rows()
    known = np.flatnonzero(rows.target >= 0)
    chosen = known[np.linspace(0, len(known) - 1, min(_ROWS, len(known))).round().astype(int)]
    pairs = list(zip(rows.sample[chosen].tolist(), rows.target[chosen].tolist(), strict=True))
    found = {}
    for layer in layers:
        parts = spliced_parts(fv.attribution.model, layer)
        if parts is None or not pairs:
            continue
        error, whole, of_error, of_code = 0.0, 0.0, 0.0, 0.0
        for sample, target in pairs:  # (one at a time: samples may differ in shape)
            name, asked = fv.attribution.MODEL_OUTPUT_NAME, None
            if fv.texts is not None:
                asked = read_text(fv.dataset, sample, fv.device)
            data = fv.get_data_sample(sample)[0] if asked is None else asked.data
            condition = {name: target} if asked is None else asked.condition(name, 0, [target])
            result = fv.attribution(data, [condition], composite, [parts.error, parts.decoder])
            missed, explained = (result.activations[name].detach().double() for name in (parts.error, parts.decoder))
            error += float(missed.square().sum())
            whole += float((missed + explained).square().sum())
            of_error += float(result.relevances[parts.error].detach().double().abs().sum())
            of_code += float(result.relevances[parts.decoder].detach().double().abs().sum())
        found[layer] = Unexplained(error / (whole or 1.0), of_error / (of_error + of_code or 1.0), len(pairs))
    return found
