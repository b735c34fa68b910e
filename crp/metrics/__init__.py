"""How good an explanation is: faithfulness, robustness, localisation, and whether it depends on the model at all.

`pointing_game`, `relevance_mass`, `relevance_rank`, `sparseness` and `complexity` are of heatmaps alone. All others
take a method as a function in the form of Quantus, as a composite, as the class of an attributor, or by name;
`quantus_explain` gives every method of this package to Quantus.
"""

from crp.metrics.explaining import quantus_explain
from crp.metrics.flipping import Flipping, Selectivity, pixel_flipping, selectivity
from crp.metrics.localising import complexity, pointing_game, relevance_mass, relevance_rank, sparseness
from crp.metrics.robustness import continuity, local_lipschitz, translations
from crp.metrics.sanity import randomization
from crp.metrics.scoring import area

__all__ = [
    "Flipping",
    "Selectivity",
    "area",
    "complexity",
    "continuity",
    "local_lipschitz",
    "pixel_flipping",
    "pointing_game",
    "quantus_explain",
    "randomization",
    "relevance_mass",
    "relevance_rank",
    "selectivity",
    "sparseness",
    "translations",
]
