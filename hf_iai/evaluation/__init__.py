"""Does the model get better with every chunk it reads, and better than what needs no adapter?"""

from .bootstrap import bootstrap_mean
from .curve import Curve
from .evaluate import BASELINES, evaluate_curve
from .losses import bare_base_losses, state_losses, token_losses

__all__ = [
    "BASELINES",
    "Curve",
    "bare_base_losses",
    "bootstrap_mean",
    "evaluate_curve",
    "state_losses",
    "token_losses",
]
