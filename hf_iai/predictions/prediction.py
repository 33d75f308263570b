"""The state of regime `implicit`: what is predicted of a query so far, and how it takes in what one chunk says.

Axes: N queries, S slots of their answers, V answers to choose among (the vocabulary, or labels), d hidden width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases.base import Base
from .answers import Answers
from .queries import Queries

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Prediction:
    """yhat(i) of N queries."""

    tensors: Tensors  # (N, S, ...) each
    queries: Queries
    answers: Answers
    prior: Tensor | None  # (N, S, V) what is said without a chunk; None where that depends on the current prediction


@dataclass(frozen=True)
class Outlook:
    """What one pass over [chunk][query][slots] says, in float32."""

    hidden: Tensor  # (N, S, d) where the base predicts the slots
    log_probs: Tensor  # (N, S, V) of the answers there
    slots: Tensor  # (N, S, d) of the slots themselves, which saw the current prediction


class PredictionKind(ABC):
    """What a prediction is kept as."""

    latent = False  # whether a correction is a hidden state, or scores of the answers

    @abstractmethod
    def start(self, outlook: Outlook) -> Tensors:
        """yhat(0): what the predictor says without a chunk."""

    @abstractmethod
    def include(
        self, kept: Tensors, answers: Answers, outlook: Outlook, prior: Tensor, weight: Tensor, correction: Tensor
    ) -> Tensors:
        """yhat(i+1), of what is said behind the chunk.

        Args:
            answers: among which is chosen.
            prior: log probabilities (N, S, V) without a chunk, of the slots as they are now.
            weight: of the chunk, (N, S, 1); 1 before anything is learned.
            correction: (N, S, V), or (N, S, d) of a latent; 0 before anything is learned.
        """

    @abstractmethod
    def logits(self, base: Base, prediction: Prediction) -> Tensor:  # (N, S, V)
        """Of the answers."""


class Logits(PredictionKind):
    """A product of experts: `logits` (N, S, V) = prior + sum_i weight_i (log p(. | chunk i) - prior)."""

    def start(self, outlook: Outlook) -> Tensors:
        return {"logits": outlook.log_probs}

    def include(
        self, kept: Tensors, answers: Answers, outlook: Outlook, prior: Tensor, weight: Tensor, correction: Tensor
    ) -> Tensors:
        return {"logits": answers.refined(kept["logits"], outlook.log_probs, prior, weight, correction)}

    def logits(self, base: Base, prediction: Prediction) -> Tensor:
        return prediction.tensors["logits"]


class Probabilities(PredictionKind):
    """A mixture of experts: `probabilities` (N, S, V), the weighted mean of the p(. | chunk i).

    The prior is one of them, of weight 1. `weight` (N, S, 1) is the sum of the weights so far.
    """

    def start(self, outlook: Outlook) -> Tensors:
        return {"probabilities": outlook.log_probs.softmax(-1), "weight": torch.ones_like(outlook.hidden[..., :1])}

    def include(
        self, kept: Tensors, answers: Answers, outlook: Outlook, prior: Tensor, weight: Tensor, correction: Tensor
    ) -> Tensors:
        total = kept["weight"] + weight
        mean = kept["probabilities"].lerp(outlook.log_probs.softmax(-1), (weight / total).expand_as(outlook.log_probs))
        return {"probabilities": (_log(mean) + correction).softmax(-1), "weight": total}

    def logits(self, base: Base, prediction: Prediction) -> Tensor:
        return _log(prediction.tensors["probabilities"])


class Latent(PredictionKind):
    """A mean of hidden states: `latent` (N, S, d), those that predict the slots, that without a chunk among them.

    `weight` (N, S, 1) is the sum of the weights so far. Where logits are linear in hidden states they are the mean of
    the experts' logits: a product of experts whose evidence does not add up.
    """

    latent = True

    def start(self, outlook: Outlook) -> Tensors:
        return {"latent": outlook.hidden, "weight": torch.ones_like(outlook.hidden[..., :1])}

    def include(
        self, kept: Tensors, answers: Answers, outlook: Outlook, prior: Tensor, weight: Tensor, correction: Tensor
    ) -> Tensors:
        total = kept["weight"] + weight
        mean = kept["latent"].lerp(outlook.hidden, (weight / total).expand_as(outlook.hidden))
        return {"latent": mean + correction, "weight": total}

    def logits(self, base: Base, prediction: Prediction) -> Tensor:
        hidden = prediction.tensors["latent"].to(base.model.dtype)
        return prediction.answers.log_probs(base, prediction.queries, None, hidden)


PREDICTIONS = {"logits": Logits, "probabilities": Probabilities, "latent": Latent}


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
