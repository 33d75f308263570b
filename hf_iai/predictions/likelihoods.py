"""Likelihoods p(y | scores) of vectors' targets: one of C classes, or o real numbers.

Axes: N queries or rows, n targets of a row, C classes, o outputs, V numbers that parametrise the distribution of one y:
C log probabilities, 2 o natural parameters, or o means. "..." stands for any leading axes.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..tensors import NO_LOSS

MAX_LOG_PRECISION = 8.0


class Likelihood(ABC):
    """A distribution p(y | scores).

    Args:
        num_outputs: C for classes, o for real numbers.
    """

    def __init__(self, num_outputs: int) -> None:
        self.num_outputs = num_outputs

    @property
    @abstractmethod
    def num_scores(self) -> int:
        """V, the number of scores for one target."""

    @abstractmethod
    def natural(self, scores: Tensor) -> Tensor:  # (..., V) -> (..., V)
        """Turn any numbers into parameters of the distribution. Scores of 0 give equal classes, or mean 0."""

    @abstractmethod
    def output(self, natural: Tensor) -> Tensor:  # (..., V) -> (..., C) or (..., o)
        """The values that a caller gets: logits, or means."""

    @abstractmethod
    def losses(self, natural: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (N, n, V), (N, n) or (N, n, o)
        """-log p of each target in nats, 0 for padding; and whether each target is real, that is, not padding."""

    def loss(self, natural: Tensor, targets: Tensor) -> Tensor:  # (N, n, V), (N, n) or (N, n, o)
        """The mean of -log p over all real targets, in nats; 0 if there are none."""
        losses, real = self.losses(natural, targets)
        return losses.sum() / real.sum().clamp_min(1)

    def loss_of_each(self, natural: Tensor, targets: Tensor) -> Tensor:  # -> (N,)
        """The mean of -log p over the real targets of each row, in nats."""
        losses, real = self.losses(natural, targets)
        return losses.flatten(1).sum(1) / real.flatten(1).sum(1).clamp_min(1)


class Softmax(Likelihood):
    """One of C classes, parametrised by log probabilities. A target of -100 is padding."""

    @property
    def num_scores(self) -> int:
        return self.num_outputs

    def natural(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1)

    def output(self, natural: Tensor) -> Tensor:
        return natural

    def losses(self, natural: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(natural.mT, targets, reduction="none"), targets != NO_LOSS


class Gaussian(Likelihood):
    """o real numbers, each parametrised by mean times precision, and precision. A target of NaN is padding.

    Scores are the mean and the log precision. The log precision is bounded to -8..8.
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
        """Mean and precision from the natural parameters."""
        shift, precision = natural.chunk(2, -1)
        return shift / precision, precision

    def output(self, natural: Tensor) -> Tensor:
        return self.moments(natural)[0]

    def losses(self, natural: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        mean, precision = self.moments(natural)
        real = ~targets.isnan()
        error = (targets.where(real, 0) - mean).square()
        nats = 0.5 * (precision * error - precision.log() + math.log(2 * math.pi))
        return nats.where(real, 0), real


class UnitGaussian(Likelihood):
    """o real numbers, each parametrised by its mean. The variance is 1. A target of NaN is padding.

    -log p is half the squared error, plus a constant that is left out.
    """

    @property
    def num_scores(self) -> int:
        return self.num_outputs

    def natural(self, scores: Tensor) -> Tensor:
        return scores

    def output(self, natural: Tensor) -> Tensor:
        return natural

    def losses(self, natural: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        real = ~targets.isnan()
        return 0.5 * (natural - targets.where(real, natural)).square(), real


LIKELIHOODS = {"softmax": Softmax, "gaussian": Gaussian}  # values of `IAIConfig.likelihood`


def vector_targets(labels: Tensor, mask: Tensor) -> Tensor:  # (N, n) or (N, n, o), (N, n)
    """Mark padding in labels as the losses expect it: with NaN in real targets, with -100 in class numbers."""
    hidden = (mask == 0).view(*mask.shape, *[1] * (labels.dim() - mask.dim()))
    return labels.masked_fill(hidden, math.nan if labels.is_floating_point() else NO_LOSS)
