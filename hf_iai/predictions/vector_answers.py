"""The possible answers about a vector: one of C classes, or o real numbers.

Their embeddings and scores are learned, since no pretrained model knows them. Axes: N queries, S = 1 slot, B tasks of n
examples, d hidden width, C classes, o outputs.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..bases.base import Base
from ..tensors import zero_linear
from .answers import Answers
from .likelihoods import Gaussian
from .queries import Queries

SHARPNESS = 16.0  # beta of the softplus that keeps the precision g of a chunk above 0
FARTHEST = 4.0  # bound of the step past a chunk's mean m_i, in units of the distance from the prior's mean m(0) to m_i


class ClassAnswers(nn.Module, Answers):
    """One of C classes. A label's embedding is a learned row. Before training all classes are equally likely.

    Args:
        width: d, width of the embeddings.
        num_outputs: C.
    """

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(num_outputs, width))
        self.readout = zero_linear(width, num_outputs)

    def of_targets(self, labels: Tensor) -> Tensor:  # (B, n) -> (B, n, d)
        """Embeddings of the labels in a chunk."""
        return self.rows[labels.clamp_min(0)]

    def embedded(self, base: Base, logits: Tensor) -> Tensor:  # (N, 1, C) -> (N, 1, d)
        return logits.softmax(-1) @ self.rows

    def scores(self, base: Base, hidden: Tensor) -> Tensor:  # (N, 1, d) -> (N, 1, C)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.readout(hidden.float())

    def log_probs(self, base: Base, queries: Queries, chunk: dict | None, hidden: Tensor) -> Tensor:
        return self.scores(base, hidden).log_softmax(-1)


class RealAnswers(nn.Module, Answers):
    """o real numbers, each a Gaussian. It is stored as mean times precision m p, and precision p, so V = 2 o.

    A chunk of weight w that predicts N(m_i, 1 / p_i), where the prediction without a chunk is N(m(0), 1 / p(0)), adds

        g        = p(0) softplus(16 (p_i / p(0) - 1)) / 16             p_i - p(0) where that is positive, else about 0
        p       += w g            m p += w (g m_i + min(p(0), 4 g) (m_i - m(0)))

    Without bounds this would be a product of Gaussians, as adding log probabilities is a product of experts for
    classes. The mean is a quotient, though, and could become very large when chunks carry little information. So there
    are two bounds. No chunk reduces the precision. And the Gaussian that a chunk adds has its mean at most
    4 (m_i - m(0)) beyond m_i; the mean after many equal chunks would approach it. Before training every prediction is
    N(0, 1), and softplus makes a chunk's g 0.04 instead of 0.

    Args:
        width: d, width of the embeddings.
        num_outputs: o.
    """

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.likelihood = Gaussian(num_outputs)
        self.value = nn.Linear(num_outputs, width)
        self.certainty = nn.Linear(num_outputs, width, bias=False)
        self.readout = zero_linear(width, 2 * num_outputs)

    def of_targets(self, targets: Tensor) -> Tensor:  # (B, n, o) -> (B, n, d)
        """Embeddings of the targets in a chunk."""
        return self.value(targets)

    def embedded(self, base: Base, natural: Tensor) -> Tensor:  # (N, 1, 2 o) -> (N, 1, d)
        mean, precision = self.likelihood.moments(natural)
        return self.value(mean) + self.certainty(precision.log())

    def scores(self, base: Base, hidden: Tensor) -> Tensor:  # (N, 1, d) -> (N, 1, 2 o)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.readout(hidden.float())

    def log_probs(self, base: Base, queries: Queries, chunk: dict | None, hidden: Tensor) -> Tensor:
        """The natural parameters (N, 1, 2 o), used in place of log probabilities."""
        return self.likelihood.natural(self.scores(base, hidden))

    def refined(self, natural: Tensor, said: Tensor, prior: Tensor, weight: Tensor, correction: Tensor) -> Tensor:
        """The natural parameters after one more chunk; see the formula above.

        Args:
            natural: before the chunk, (N, 1, 2 o).
            said: after reading the chunk alone, (N, 1, 2 o).
            prior: without a chunk, (N, 1, 2 o).
            weight: weight of the chunk, (N, 1, 1).
            correction: its first o numbers are added to the chunk's mean, (N, 1, 2 o).
        """
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
