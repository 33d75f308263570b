"""Heads: they turn the evidence of a chunk (read-outs, gradients, labelled features) into the next state."""

from .average import RunningAverage
from .class_rows import ClassRows, united
from .classical import SGD, MetaSGD, PathAware
from .correction import Correction
from .delta import WRITES, DeltaRule
from .gaussian_rows import GaussianRows, same_outputs, with_outputs
from .guards import bounded
from .kept import KEPT, NEVER, followed_by, keep_tokens, trace
from .learned_step import LearnedStep
from .normalized import NormalizedStep
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
    "NormalizedStep",
    "PathAware",
    "RunningAverage",
    "bounded",
    "followed_by",
    "keep_tokens",
    "same_outputs",
    "trace",
    "united",
    "with_outputs",
]
