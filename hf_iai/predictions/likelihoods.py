"""What is predicted of a vector: one of C classes, or o real numbers.

Axes: ... of queries, C classes, o outputs; V numbers say it: C log probabilities, 2 o natural parameters, or o means.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .queries import NO_TARGET

MAX_LOG_PRECISION = 8.0


class Likelihood(ABC):
    """p(y | scores).

    Args:
        num_outputs: C or o.
    """

    def __init__(self, num_outputs: int) -> None:
        self.num_outputs = num_outputs

    @property
    @abstractmethod
    def num_scores(self) -> int:
        """V."""

    @abstractmethod
    def natural(self, scores: Tensor) -> Tensor:  # (..., V) -> (..., V)
        """What any numbers say: nothing where all are 0."""

    @abstractmethod
    def output(self, natural: Tensor) -> Tensor:  # (..., V) -> (..., C) or (..., o)
        """As a caller sees it: logits, or means."""

    @abstractmethod
    def losses(self, natural: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (N, n, V), (N, n) or (N, n, o)
        """-log p of each target in nats, 0 for padding, and which are not padding."""

    def loss(self, natural: Tensor, targets: Tensor) -> Tensor:  # (N, n, V), (N, n) or (N, n, o)
        """Mean of -log p over the targets that are not padding, in nats; 0 without any."""
        losses, real = self.losses(natural, targets)
        return losses.sum() / real.sum().clamp_min(1)

    def loss_of_each(self, natural: Tensor, targets: Tensor) -> Tensor:  # -> (N,)
        """The mean of every row by itself."""
        losses, real = self.losses(natural, targets)
        return losses.flatten(1).sum(1) / real.flatten(1).sum(1).clamp_min(1)


class Softmax(Likelihood):
    """One of C classes, by its log probabilities. -100 marks padding."""

    @property
    def num_scores(self) -> int:
        return self.num_outputs

    def natural(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1)

    def output(self, natural: Tensor) -> Tensor:
        return natural

    def losses(self, natural: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(natural.mT, targets, reduction="none"), targets != NO_TARGET


class Gaussian(Likelihood):
    """o real numbers, each by its natural parameters: mean times precision, and precision. NaN marks padding.

    Scores are mean and log precision, of which the latter is kept between -8 and 8.
    """

    @property
    def num_scores(self) -> int:
        return 2 * self.num_outputs

    def natural(self, scores: Tensor) -> Tensor:
        mean, log_precision = scores.chunk(2, -1)
        precision = (MAX_LOG_PRECISION * torch.tanh(log_precision / MAX_LOG_PRECISION)).exp()
        return torch.cat([mean * precision, precision], -1)

    @staticmethod
    def moments(natural: Tensor) -> tuple[Tensor, Tensor]:  # (..., 2 o) -> (..., o) twice
        """Mean and precision."""
        shift, precision = natural.chunk(2, -1)
        return shift / precision, precision

    def output(self, natural: Tensor) -> Tensor:
        return self.moments(natural)[0]

    def losses(self, natural: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of each number."""
        mean, precision = self.moments(natural)
        real = ~targets.isnan()
        error = (targets.where(real, 0) - mean).square()
        nats = 0.5 * (precision * error - precision.log() + math.log(2 * math.pi))
        return nats.where(real, 0), real


class UnitGaussian(Likelihood):
    """o real numbers, each by its mean: half the squared error is -log p but for a constant. NaN marks padding."""

    @property
    def num_scores(self) -> int:
        return self.num_outputs

    def natural(self, scores: Tensor) -> Tensor:
        return scores

    def output(self, natural: Tensor) -> Tensor:
        return natural

    def losses(self, natural: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of each number."""
        real = ~targets.isnan()
        return 0.5 * (natural - targets.where(real, natural)).square(), real


LIKELIHOODS = {"softmax": Softmax, "gaussian": Gaussian}  # values of `IAIConfig.likelihood`


def vector_targets(labels: Tensor, mask: Tensor) -> Tensor:  # (N, n) or (N, n, o), (N, n)
    """Labels, with padding marked as the losses want it."""
    hidden = (mask == 0).view(*mask.shape, *[1] * (labels.dim() - mask.dim()))
    return labels.masked_fill(hidden, math.nan if labels.is_floating_point() else NO_TARGET)


def zero_linear(width: int, num_scores: int) -> nn.Linear:
    """A map to scores that say nothing at first."""
    layer = nn.Linear(width, num_scores)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
