"""Pictures: surfaces and descents, curves of a history, the flow of gradients, regions of decision, the launches of a
step (extra `plot`).

Each draws on the Axes it is given, or on those of a new figure, and returns them. What colour tells, a line's dashes, a
marker or text tell too.
"""

from gpubackprop.plot.figures import save
from gpubackprop.plot.landscapes import path, progress, race, surface
from gpubackprop.plot.plans import plan, roofline
from gpubackprop.plot.training import curves, decision_regions, gradient_flow

__all__ = [
    "curves", "decision_regions", "gradient_flow", "path", "plan", "progress", "race", "roofline", "save", "surface",
]  # fmt: skip
