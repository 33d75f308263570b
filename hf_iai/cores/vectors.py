"""Task states of vectors (`vector_width`): a chunk holds examples (x, y), a query is an x.

Axes: B tasks, n examples, N queries, w width of a vector, e width of embeddings, V scores of an answer.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..bases.base import Base
from ..config import IAIConfig
from ..predictions.likelihoods import vector_targets
from ..signals import gradients_of
from ..state import TaskState
from ..tensors import zero_linear
from .average import AverageCore
from .core import StateCore, full_precision
from .gradient import GradientCore


class VectorCore(StateCore):
    """Mixin that answers queries that are vectors. Combine it with a core that updates the state."""

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(base, config)
        self.likelihood = self.state.likelihood(config)

    def check_answers_without_state(self, *, disabled: bool) -> None:
        raise ValueError(
            "a base says nothing of vectors by itself: pass task_state=model.adapt(...), or model.initial_state()"
        )

    def answer(
        self,
        base: Base,
        state: TaskState,
        ids: Tensor,  # (N, w)
        mask: Tensor,  # (N,)
        labels: Tensor | None = None,  # (N, 1) or (N, 1, o), padding marked
        **kwargs,
    ) -> SequenceClassifierOutput:
        """The model output for N queries, N / B consecutive ones of each task.

        `logits` are (N, C), or means (N, o); `loss` is the mean of -log p(label).
        """
        asked = sorted(n for n, v in kwargs.items() if v is not None and v is not False and n != "return_dict")
        if asked:
            raise ValueError(f"answers about vectors have logits and a loss only, got {asked}: leave them out")
        scores = self._scores(base, state, ids.unflatten(0, (state.batch_size, -1)))
        with full_precision(ids):
            natural = self.likelihood.natural(scores.float()).flatten(0, 1)  # (N, V)
            loss = None if labels is None else self.likelihood.loss(natural.unsqueeze(1), labels)
            return SequenceClassifierOutput(loss=loss, logits=self.likelihood.output(natural))

    @abstractmethod
    def _scores(self, base: Base, state: TaskState, vectors: Tensor) -> Tensor:  # (B, N / B, w) -> (B, N / B, V)
        """The scores of the queries."""


class ReadVectorCore(VectorCore, AverageCore):
    """An average of read-outs. Learned maps turn x and y of each example into one token for the base."""

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(base, config)
        width = base.model.get_input_embeddings().weight.shape[1]
        self.vector = nn.Linear(config.vector_width, width)
        real = config.likelihood == "gaussian"
        self.target = (nn.Linear if real else nn.Embedding)(config.num_outputs, width)

    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The read-out of vectors (B, n, w) with mask (B, n) and labels (B, n) or (B, n, o)."""
        with full_precision(mask):
            examples = (self.vector(ids) + self.target(labels)).masked_fill((mask == 0).unsqueeze(-1), 0.0)
        return self._read_out(base, examples, mask)


class ExplicitVectorCore(ReadVectorCore):
    """`regime="explicit"`: base and LoRA read a query as one token under the state; a learned map gives the scores."""

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(base, config)
        self.readout = zero_linear(base.config.hidden_size, self.likelihood.num_scores)

    def _scores(self, base: Base, state: TaskState, vectors: Tensor) -> Tensor:
        with full_precision(vectors):
            asked = self.vector(vectors).flatten(0, 1).unsqueeze(1)  # (N, 1, e)
        mask = torch.ones(asked.shape[:2], dtype=torch.long, device=asked.device)
        with self.under(base, state) as prefix:
            hidden, _ = base.read(prefix, asked, mask, base.num_slots(prefix) + mask - 1, 1)
        with full_precision(vectors):
            return self.readout(hidden.squeeze(1).float()).unflatten(0, vectors.shape[:2])


class MLPCore(ReadVectorCore):
    """`state_type="mlp"`: the state is the weights of a small network. The base computes them and does not answer."""

    def _scores(self, base: Base, state: TaskState, vectors: Tensor) -> Tensor:
        with full_precision(vectors):
            return self.state.scores(self.corrected(base, state), vectors)


class MLPGradientCore(VectorCore, GradientCore):
    """`state_type="mlp"`, `signal="gradients"`: each chunk's loss moves the network's weights; the base is not used."""

    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"ids": ids, "mask": mask, "labels": vector_targets(labels, mask)}

    def _gradient(self, base: Base, theta: dict[str, Tensor], evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradient of each task's mean of -log p(label) over its examples."""

        def losses(theta: dict[str, Tensor], vectors: Tensor, targets: Tensor) -> Tensor:  # -> (B,)
            return self.likelihood.loss_of_each(self.likelihood.natural(self.state.scores(theta, vectors)), targets)

        chunk = evidence["ids"], evidence["labels"]
        with full_precision(evidence["ids"]):
            return gradients_of(losses, theta, chunk, second_order=self.config.second_order)

    def _scores(self, base: Base, state: TaskState, vectors: Tensor) -> Tensor:
        with full_precision(vectors):
            return self.state.scores(state.tensors, vectors)
