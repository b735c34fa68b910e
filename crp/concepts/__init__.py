"""What a concept is: a part of a layer's output that can be masked, scored and ranked.

A concept type answers three questions about one layer: how the backward flow is restricted to some of its concepts
(`mask`, `mask_rf`), how relevant or active each concept was (`attribute`, `scores`), and where (`get_rf_indices`).
Channels are the concepts of "From attribution maps to human-understandable explanations through Concept Relevance
Propagation" (Achtibat et al., Nature Machine Intelligence 2023); `AxisConcept` is for heads, neurons and tokens of
transformers, `DirectionConcept` and `SubspaceConcept` for what a layer holds along directions. Subclass `Concept` for
anything else.
"""

from crp.concepts.axes import AxisConcept
from crp.concepts.base import Concept, mask_of
from crp.concepts.channels import ChannelConcept
from crp.concepts.directions import Directions
from crp.concepts.ids import as_ids
from crp.concepts.linear import DirectionConcept, SubspaceConcept
from crp.concepts.reading import check_concept, relevance_in
from crp.concepts.scores import ConceptScores, normalize, scores_of
from crp.concepts.spliced import Spliced, splice

__all__ = [
    "AxisConcept",
    "ChannelConcept",
    "Concept",
    "ConceptScores",
    "DirectionConcept",
    "Directions",
    "Spliced",
    "SubspaceConcept",
    "as_ids",
    "check_concept",
    "mask_of",
    "normalize",
    "relevance_in",
    "scores_of",
    "splice",
]
