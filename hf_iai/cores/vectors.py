"""States of vectors, with `vector_width`: an observation is a pair (x, y), a query an x.

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
    """Mixin that answers queries that are vectors; combine it with a core that updates the state."""

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
        """`logits` (N, C), or means (N, o), of N / B queries of each task; `loss` is the mean of -log p(label)."""
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
        """Of the queries."""


class ReadVectorCore(VectorCore, AverageCore):
    """Examples are tokens, x and y by learned maps, which the base reads out: the state is the average of read-outs."""

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(base, config)
        width = base.model.get_input_embeddings().weight.shape[1]
        self.vector = nn.Linear(config.vector_width, width)
        real = config.likelihood == "gaussian"
        self.target = (nn.Linear if real else nn.Embedding)(config.num_outputs, width)

    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of vectors (B, n, w) and mask (B, n), labels (B, n) or (B, n, o)."""
        with full_precision(mask):
            examples = (self.vector(ids) + self.target(labels)).masked_fill((mask == 0).unsqueeze(-1), 0.0)
        return self._read_out(base, examples, mask)


class ExplicitVectorCore(ReadVectorCore):
    """`regime="explicit"`: a query is one token, which base and LoRA read under the state; a learned map decodes."""

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
    """`state_type="mlp"`: the state is the predictor's weights, which the base writes; it has no part in answers."""

    def _scores(self, base: Base, state: TaskState, vectors: Tensor) -> Tensor:
        with full_precision(vectors):
            return self.state.scores(self.corrected(base, state), vectors)


class MLPGradientCore(VectorCore, GradientCore):
    """`state_type="mlp"`, `signal="gradients"`: each chunk's loss moves the predictor's weights; no base reads."""

    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"ids": ids, "mask": mask, "labels": vector_targets(labels, mask)}

    def _gradient(self, base: Base, theta: dict[str, Tensor], evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the mean of -log p(label) over each task's examples."""

        def losses(theta: dict[str, Tensor], vectors: Tensor, targets: Tensor) -> Tensor:  # -> (B,)
            return self.likelihood.loss_of_each(self.likelihood.natural(self.state.scores(theta, vectors)), targets)

        chunk = evidence["ids"], evidence["labels"]
        with full_precision(evidence["ids"]):
            return gradients_of(losses, theta, chunk, second_order=self.config.second_order)

    def _scores(self, base: Base, state: TaskState, vectors: Tensor) -> Tensor:
        with full_precision(vectors):
            return self.state.scores(state.tensors, vectors)
