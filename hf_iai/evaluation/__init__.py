"""Evaluation: quality against the number of chunks read, beside baselines that need no adapter."""

from .bootstrap import bootstrap_mean
from .calibration import expected_calibration_error
from .curve import Curve
from .evaluate import EVALUATORS, evaluate_curve
from .loss_curve import BASELINES
from .losses import bare_base_losses, state_losses, token_losses

__all__ = [
    "BASELINES",
    "EVALUATORS",
    "Curve",
    "bare_base_losses",
    "bootstrap_mean",
    "evaluate_curve",
    "expected_calibration_error",
    "state_losses",
    "token_losses",
]
