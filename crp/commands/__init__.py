"""Commands of ``crp``, apart from the demo's. What they need is imported when they run."""
