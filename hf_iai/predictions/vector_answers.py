"""What may be answered about a vector: one of C classes, or o real numbers; learned, since no base knows them.

Axes: N queries, S = 1 slot, B tasks of n examples, d hidden width, C classes, o outputs.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..bases.base import Base
from .answers import Answers
from .likelihoods import Gaussian, zero_linear
from .queries import Queries

SHARPNESS = 16.0
FARTHEST = 4.0  # how far beyond the chunk's mean what it adds may lie, in distances from the prior's mean to it


class ClassAnswers(nn.Module, Answers):
    """One of C classes. A label is a learned row; at first nothing is known of any query.

    Args:
        width: d.
        num_outputs: C.
    """

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(num_outputs, width))
        self.readout = zero_linear(width, num_outputs)

    def of_targets(self, labels: Tensor) -> Tensor:  # (B, n) -> (B, n, d)
        return self.rows[labels.clamp_min(0)]

    def embedded(self, base: Base, logits: Tensor) -> Tensor:  # (N, 1, C) -> (N, 1, d)
        return logits.softmax(-1) @ self.rows

    def scores(self, base: Base, hidden: Tensor) -> Tensor:  # (N, 1, d) -> (N, 1, C)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.readout(hidden.float())

    def log_probs(self, base: Base, queries: Queries, chunk: dict | None, hidden: Tensor) -> Tensor:
        return self.scores(base, hidden).log_softmax(-1)


class RealAnswers(nn.Module, Answers):
    """o real numbers, each a Gaussian kept by its natural parameters, mean times precision and precision, V = 2 o.

        g        = p(0) softplus(16 (p_i / p(0) - 1)) / 16             p_i - p(0) where that is positive, else about 0
        p       += w g            m p += w (g m_i + min(p(0), 4 g) (m_i - m(0)))

    for a chunk of weight w that says N(m_i, 1 / p_i), where N(m(0), 1 / p(0)) is said without one. Added up these are a
    product of Gaussians, as log probabilities are of classes, but for two bounds, without which the mean, a quotient,
    would be thrown far out where chunks say little: no chunk takes away precision, and none adds a Gaussian whose mean
    is farther beyond m_i than four times the way from m(0), which all of many chunks would approach. At first all are
    N(0, 1), but for 0.04 in a chunk's g.

    Args:
        width: d.
        num_outputs: o.
    """

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.likelihood = Gaussian(num_outputs)
        self.value = nn.Linear(num_outputs, width)
        self.certainty = nn.Linear(num_outputs, width, bias=False)
        self.readout = zero_linear(width, 2 * num_outputs)

    def of_targets(self, targets: Tensor) -> Tensor:  # (B, n, o) -> (B, n, d)
        return self.value(targets)

    def embedded(self, base: Base, natural: Tensor) -> Tensor:  # (N, 1, 2 o) -> (N, 1, d)
        mean, precision = self.likelihood.moments(natural)
        return self.value(mean) + self.certainty(precision.log())

    def scores(self, base: Base, hidden: Tensor) -> Tensor:  # (N, 1, d) -> (N, 1, 2 o)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.readout(hidden.float())

    def log_probs(self, base: Base, queries: Queries, chunk: dict | None, hidden: Tensor) -> Tensor:
        """The natural parameters (N, 1, 2 o), which take their place."""
        return self.likelihood.natural(self.scores(base, hidden))

    def refined(self, natural: Tensor, said: Tensor, prior: Tensor, weight: Tensor, correction: Tensor) -> Tensor:
        """All (N, 1, 2 o), the weight (N, 1, 1); the correction moves the mean that the chunk says."""
        shift, precision = said.chunk(2, -1)
        shift_before, precision_before = prior.chunk(2, -1)
        move, _ = correction.chunk(2, -1)
        more = precision_before * softplus(precision / precision_before - 1, beta=SHARPNESS)
        mean = shift / precision + move
        beyond = torch.minimum(precision_before, FARTHEST * more)
        shift = more * mean + beyond * (mean - shift_before / precision_before)
        return natural + weight * torch.cat([shift, more], -1)

    def output(self, natural: Tensor) -> Tensor:  # (N, 1, 2 o) -> (N, o)
        return self.likelihood.output(natural).squeeze(1)

    def loss(self, natural: Tensor, targets: Tensor) -> Tensor:  # (N, 1, 2 o), (N, 1, o)
        return self.likelihood.loss(natural, targets)
