"""Relevance propagation for PyTorch: rules in composites, concept-conditional attribution, reference mining.

Nothing is imported here, so that ``import crp`` is instant; import from the rooms instead, for example
``from crp.attribution import CondAttribution`` and ``from crp.composites import EpsilonPlusFlat``.
"""

__version__ = "0.1.0"
