"""How good an explanation is: faithfulness, robustness, and whether it depends on the model at all.

Every metric takes a method as a function in the form of Quantus, as a composite, as the class of an attributor, or by
name; `quantus_explain` gives every method of this package to Quantus.
"""

from crp.metrics.explaining import quantus_explain
from crp.metrics.flipping import Flipping, Selectivity, pixel_flipping, selectivity
from crp.metrics.robustness import continuity, local_lipschitz, translations
from crp.metrics.sanity import randomization
from crp.metrics.scoring import area

__all__ = [
    "Flipping",
    "Selectivity",
    "area",
    "continuity",
    "local_lipschitz",
    "pixel_flipping",
    "quantus_explain",
    "randomization",
    "selectivity",
    "translations",
]
