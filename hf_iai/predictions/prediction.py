"""The state of regime `implicit`: the current prediction for a query, and how a chunk updates it.

Axes: N queries, S slots of an answer, V choices for a slot (the vocabulary or the labels), d hidden width.
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
    """The current prediction yhat(i) for N queries."""

    tensors: Tensors  # the prediction in the form of its `PredictionKind`, (N, S, ...) each
    queries: Queries
    answers: Answers
    prior: Tensor | None  # (N, S, V) log probabilities without a chunk; None if they depend on the current prediction


@dataclass(frozen=True)
class PassOutput:
    """The results of one pass over [chunk][query][slots], in float32."""

    hidden: Tensor  # (N, S, d) last hidden states at the places that predict the slots
    log_probs: Tensor  # (N, S, V) log probabilities of the answers at those places
    slots: Tensor  # (N, S, d) last hidden states of the slots themselves, which contain the current prediction


class PredictionKind(ABC):
    """The form in which a prediction is stored, and with it the rule by which a chunk updates it.

    There are three, which `IAIConfig.prediction` names: logits (a product of experts), probabilities (a mixture of
    experts), and latents (a mean of hidden states).
    """

    latent = False  # True: a correction is a hidden state. False: it is a score for each answer

    @abstractmethod
    def start(self, output: PassOutput) -> Tensors:
        """The tensors of yhat(0), the prediction without a chunk."""

    @abstractmethod
    def include(
        self, kept: Tensors, answers: Answers, output: PassOutput, prior: Tensor, weight: Tensor, correction: Tensor
    ) -> Tensors:
        """The tensors of yhat(i+1), after one more chunk.

        Args:
            kept: the tensors of yhat(i).
            answers: the possible answers.
            output: the results of the pass over the chunk.
            prior: log probabilities without a chunk, with the same slots, (N, S, V).
            weight: weight of the chunk, (N, S, 1); 1 before training.
            correction: learned correction, (N, S, V), or (N, S, d) for latents; 0 before training.
        """

    @abstractmethod
    def logits(self, base: Base, prediction: Prediction) -> Tensor:  # (N, S, V)
        """The logits of the answers."""


class Logits(PredictionKind):
    """A product of experts: `logits` (N, S, V) = prior + sum_i weight_i (log p(. | chunk i) - prior)."""

    def start(self, output: PassOutput) -> Tensors:
        return {"logits": output.log_probs}

    def include(
        self, kept: Tensors, answers: Answers, output: PassOutput, prior: Tensor, weight: Tensor, correction: Tensor
    ) -> Tensors:
        return {"logits": answers.refined(kept["logits"], output.log_probs, prior, weight, correction)}

    def logits(self, base: Base, prediction: Prediction) -> Tensor:
        return prediction.tensors["logits"]


class Probabilities(PredictionKind):
    """A mixture of experts: `probabilities` (N, S, V) is the weighted mean of p(. | chunk i) over the chunks.

    The prediction without a chunk takes part in the mean with weight 1. `weight` (N, S, 1) is the sum of all weights so
    far.
    """

    def start(self, output: PassOutput) -> Tensors:
        return {"probabilities": output.log_probs.softmax(-1), "weight": torch.ones_like(output.hidden[..., :1])}

    def include(
        self, kept: Tensors, answers: Answers, output: PassOutput, prior: Tensor, weight: Tensor, correction: Tensor
    ) -> Tensors:
        total = kept["weight"] + weight
        mean = kept["probabilities"].lerp(output.log_probs.softmax(-1), (weight / total).expand_as(output.log_probs))
        return {"probabilities": (_log(mean) + correction).softmax(-1), "weight": total}

    def logits(self, base: Base, prediction: Prediction) -> Tensor:
        return _log(prediction.tensors["probabilities"])


class Latent(PredictionKind):
    """A mean of hidden states: `latent` (N, S, d) is the weighted mean of the states that predict the slots.

    The hidden state without a chunk takes part in the mean with weight 1. `weight` (N, S, 1) is the sum of all weights
    so far. If logits are linear in the hidden states, the result is the mean of the experts' logits. That is a product
    of experts in which evidence does not accumulate.
    """

    latent = True

    def start(self, output: PassOutput) -> Tensors:
        return {"latent": output.hidden, "weight": torch.ones_like(output.hidden[..., :1])}

    def include(
        self, kept: Tensors, answers: Answers, output: PassOutput, prior: Tensor, weight: Tensor, correction: Tensor
    ) -> Tensors:
        total = kept["weight"] + weight
        mean = kept["latent"].lerp(output.hidden, (weight / total).expand_as(output.hidden))
        return {"latent": mean + correction, "weight": total}

    def logits(self, base: Base, prediction: Prediction) -> Tensor:
        hidden = prediction.tensors["latent"].to(base.model.dtype)
        return prediction.answers.log_probs(base, prediction.queries, None, hidden)


PREDICTIONS = {"logits": Logits, "probabilities": Probabilities, "latent": Latent}


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
