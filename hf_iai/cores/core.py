"""Core: all that an adapter learns besides LoRA, and one refinement step h_phi.

Axes: B tasks, K chunks of C tokens, Q queries of T tokens for each task, N = B * Q.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.base import Base, Prefix
from ..config import IAIConfig
from ..predictions.answers import Answers
from ..predictions.prediction import Prediction
from ..registry import STATES, Part
from ..state import Identity, TaskState
from ..states import SlotState
from ..tensors import NO_LOSS

State = TaskState | Prediction
Evidence = dict[str, Tensor]
# ids, mask and labels, (B, K, C) each; of labelled examples (B, K, n, T) twice and (B, K, n); of vectors
# (B, K, n, w) for ids, and of real targets labels (B, K, n, o)
Chunks = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class EpisodeBatch:
    """B episodes: chunks to read, then queries in a row to answer.

    Args:
        chunks: ids, mask and labels of K chunks for each task.
        ids: of N queries (N, T), or vectors (N, d).
        mask: of the queries.
        labels: of the queries, as the core scores them; None: nothing is scored.
        num_queries: Q.
        answers: what may be answered, where a query keeps its own prediction.
    """

    chunks: Chunks
    ids: Tensor
    mask: Tensor
    labels: Tensor | None
    num_queries: int
    answers: Answers | None = None

    @property
    def num_tasks(self) -> int:
        """B."""
        return len(self.chunks[0])


class Core(nn.Module, Part, ABC):
    """What is learned, and how a chunk refines a state.

    `read` finds what a chunk says without the state, so that many chunks can be read in one batch. `step` makes the
    next state of it.

    Args:
        config: the adapter's configuration.

    Attributes:
        uses_labels: whether the labels of a chunk of text matter; observations have no use for them.
    """

    uses_labels = False

    def __init__(self, config: IAIConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def begin(self, base: Base, episode: EpisodeBatch) -> State:
        """The state before the first chunk of an episode."""

    @abstractmethod
    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> Evidence:  # (B, C) each
        """Evidence: what a chunk says without the state. `mask` is part of it."""

    @abstractmethod
    def step(self, base: Base, state: State, evidence: Evidence) -> State:
        """The state after the chunk. Rows without a token keep their state bitwise."""

    @abstractmethod
    def score(self, base: Base, states: list[State], episode: EpisodeBatch) -> Any:
        """transformers' output: `loss` over the queries under all states, `logits` under the last one."""

    def with_classes(self, state: State, classes: Any) -> State:
        """The state with room for classes that were met; only linear states have any."""
        return state

    def check_answers_without_state(self, *, disabled: bool) -> None:
        """Refuse a query without a state where the base has no answer; `disabled`: the adapter is switched off."""


class StateCore(Core):
    """theta(0), how a chunk refines a task state, and how a query is answered under it.

    Args:
        base: the pretrained model; its embeddings give theta(0) and the slots their first values.
        config: the adapter's configuration.
        reads: whether the base reads chunks out, into slots.
    """

    def __init__(self, base: Base, config: IAIConfig, *, reads: bool) -> None:
        super().__init__(config)
        self.state: SlotState = STATES[config.state_type].make(base, config, reads=reads)

    @property
    def kind(self) -> str:
        """How states were accumulated; only averages and sums merge."""
        return self.config.accumulation

    def initial_state(self, base: Base, batch_size: int, identity: Identity) -> TaskState:
        """theta(0) for `batch_size` tasks."""
        tensors = self._initial(base, batch_size)
        zero = torch.zeros(batch_size, dtype=torch.long, device=next(iter(tensors.values())).device)
        return TaskState(tensors, zero, zero.clone(), identity, self.kind)

    def begin(self, base: Base, episode: EpisodeBatch) -> TaskState:
        return self.initial_state(base, episode.num_tasks, Identity("", "in training"))

    @abstractmethod
    def _initial(self, base: Base, batch_size: int) -> dict[str, Tensor]:
        """The tensors of theta(0)."""

    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> Evidence:  # (B, C) each
        return tokens_of(ids, mask, labels)

    def step(self, base: Base, state: TaskState, evidence: Evidence) -> TaskState:
        """theta(i+1) = h(theta(i), evidence). Rows that read no token keep their state bitwise."""
        num_tokens = evidence["mask"].sum(1)  # (B,)
        read = num_tokens > 0
        tensors = {
            name: torch.where(read.view(-1, *[1] * (t.dim() - 1)), t, state.tensors[name])
            for name, t in self._next(base, state, evidence).items()
        }
        return replace(state, tensors=tensors, step=state.step + read, num_tokens=state.num_tokens + num_tokens)

    @abstractmethod
    def _next(self, base: Base, state: TaskState, evidence: Evidence) -> dict[str, Tensor]:
        """The tensors of theta(i+1)."""

    def score(self, base: Base, states: list[TaskState], episode: EpisodeBatch) -> Any:
        ids, mask, labels = (None if t is None else torch.cat([t] * len(states)) for t in _queries(episode))
        outputs = self.answer(base, TaskState.stack(states), ids, mask, labels)
        outputs.logits = outputs.logits[-len(episode.ids) :]
        return outputs

    @contextmanager
    def under(self, base: Base, state: TaskState) -> Iterator[Prefix]:
        """Passes inside answer under the state when they read behind the prefix that it yields."""
        with self.state.under(base, self.corrected(base, state)) as prefix:
            yield prefix

    def answer(self, base: Base, state: TaskState, ids: Tensor, mask: Tensor, labels: Tensor | None = None, **kwargs):
        """transformers' own output for queries (N, T) under the state."""
        with self.under(base, state) as prefix:
            return base.answer(prefix, ids, mask, labels, **kwargs)

    def corrected(self, base: Base, state: TaskState) -> dict[str, Tensor]:
        """The state as a query sees it: all m slots, in the layout of the state type, after any learned correction."""
        return self.state.visible(base, state.tensors)


def _queries(episode: EpisodeBatch) -> tuple[Tensor, Tensor, Tensor | None]:
    return episode.ids, episode.mask, episode.labels


def tokens_of(ids: Tensor, mask: Tensor, labels: Tensor) -> Evidence:  # (B, C) each
    """A chunk's tokens, with nothing left under the mask."""
    # What stands under the mask must not even route: experts compute all tokens that chose them in one batch.
    return {"ids": ids.masked_fill(mask == 0, 0), "mask": mask, "labels": labels.masked_fill(mask == 0, NO_LOSS)}


def full_precision(tensor: Tensor) -> torch.autocast:
    """State and head compute in float32, also where autocast runs the base in less."""
    return torch.autocast(tensor.device.type, enabled=False)
