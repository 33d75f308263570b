"""How evidence becomes the next state."""

from .average import RunningAverage
from .bound import bounded
from .class_rows import ClassRows
from .classical import SGD, MetaSGD, PathAware
from .correction import Correction
from .delta import WRITES, DeltaRule
from .gaussian_rows import GaussianRows, same_outputs, with_outputs
from .kept import KEPT, NEVER, followed_by, keep_tokens, trace
from .learned_optimizer import LearnedStep
from .recent import push_tokens
from .step_settings import LearnedStepSettings

__all__ = [
    "KEPT",
    "NEVER",
    "WRITES",
    "ClassRows",
    "Correction",
    "SGD",
    "DeltaRule",
    "GaussianRows",
    "LearnedStep",
    "LearnedStepSettings",
    "MetaSGD",
    "PathAware",
    "RunningAverage",
    "bounded",
    "followed_by",
    "keep_tokens",
    "push_tokens",
    "same_outputs",
    "trace",
    "with_outputs",
]
