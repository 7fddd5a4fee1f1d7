"""The reference: the plain model, run eagerly, with the values of reused sites replaced. No graph, no plan.

In: a model, a schedule, the calls of a run. Out: what the schedule means. It is the truth that compiled programs are
compared with, and it runs where a model cannot be captured. So it favours being obviously right over being fast.

Hazard: a fault here and in the plans alike would go unnoticed, so it shares with them only the rules by which residuals
are followed (`graph/residual_origin.py`), the copying to given strides, the weights as the schedule states them, and
the checks of sites.

Reading order: `engine` (streams and their histories), `site_calls` (what stands in for the calls of sites), `spans`.
"""

from harmonica_rt.reference_engine.engine import ReferenceEngine, ReferenceStream

__all__ = ["ReferenceEngine", "ReferenceStream"]
