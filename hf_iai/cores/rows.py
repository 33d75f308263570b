"""Linear states: an encoder embeds the examples of a chunk, and a head computes a linear model from what it keeps."""

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..bases.encoder import Encoder
from ..config import IAIConfig
from ..state import TaskState
from .core import StateCore, full_precision


class RowsCore(StateCore):
    """Base of classifiers and regressions. A query with features x gets W x + b; the state gives W and b."""

    accumulation = "sums"

    def __init__(self, base: Encoder, config: IAIConfig) -> None:
        super().__init__(base, config, reads=False)
        self.head = self.make_head(config)

    @staticmethod
    @abstractmethod
    def make_head(config: IAIConfig) -> nn.Module:
        """Make the head that updates the sums and computes W and b from them."""

    def _initial(self, base: Encoder, batch_size: int) -> dict[str, Tensor]:
        device = base.model.get_input_embeddings().weight.device
        return self.head.initial(batch_size, 0, self.state.width, device)

    def rows(self, state: TaskState) -> tuple[Tensor, Tensor]:
        """W (B, C, d) and b (B, C) for C classes or outputs; b is -1e4 for a class without an example."""
        with full_precision(state.step):
            return self.head.rows(state.tensors)

    def check_answers_without_state(self, *, disabled: bool) -> None:
        if not disabled:
            raise ValueError(
                "a linear adapter has no classes without a task state: pass task_state=model.adapt(...), or use "
                "disable_adapter() for the base with its own head"
            )

    def answer(
        self,
        base: Encoder,
        state: TaskState,
        ids: Tensor,  # (N, T), or vectors (N, 1, d)
        mask: Tensor,  # (N, T), (N, 1)
        labels: Tensor | None = None,  # (N,), or (N, o)
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """The model output for N queries, with `logits` (N, C). Each task answers N / B consecutive queries."""
        _check_arguments(kwargs)
        features = self.features(base, ids, mask).unflatten(0, (state.batch_size, -1))  # (B, N / B, d)
        rows, bias = self.rows(state)
        with full_precision(ids):
            logits = (features @ rows.mT + bias.unsqueeze(1)).flatten(0, 1)
            loss = None if labels is None else self._loss(logits, labels, mask, state)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def features(self, base: Encoder, ids: Tensor, mask: Tensor) -> Tensor:  # (N, T) each -> (N, d)
        """The features of texts: the pooled vector."""
        trained = self.config.lora_answers
        with base.lora(trained):
            return base.features(ids, mask, self.config.pooling, frozen=not trained)

    @abstractmethod
    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor, state: TaskState) -> Tensor:
        """The mean loss of the queries."""


def _check_arguments(kwargs: dict) -> None:
    """Refuse arguments that have no use here.

    Token types are accepted if all are 0, since tokenizers return them for single texts too. Options that are None or
    False are accepted, since transformers and PEFT pass them on.
    """
    types = kwargs.pop("token_type_ids", None)
    if types is not None and types.any():
        raise ValueError("token_type_ids mark a second text, but a linear state reads single texts: leave them out")
    asked = sorted(name for name, value in kwargs.items() if value is not None and value is not False)
    if set(asked) - {"return_dict"}:
        raise ValueError(f"a linear state answers with logits and loss only, got {asked}: leave them out")
