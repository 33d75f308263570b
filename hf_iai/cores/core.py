"""Core: everything that an adapter learns besides LoRA, and one update h_phi of a state.

Axes: B tasks, K chunks of C tokens, Q queries of T tokens for each task, N = B * Q.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.base import Base
from ..bases.prefixes import Prefix
from ..config import IAIConfig
from ..predictions.answers import Answers
from ..predictions.prediction import Prediction
from ..registry import STATES
from ..state import Identity, TaskState
from ..states import SlotState
from ..tensors import NO_LOSS, along, as_precise

State = TaskState | Prediction
Evidence = dict[str, Tensor]
# ids, mask and labels of all chunks:
#   text               (B, K, C)       (B, K, C)       (B, K, C)
#   labelled texts     (B, K, n, T)    (B, K, n, T)    (B, K, n), or (B, K, n, o) for real targets
#   vectors            (B, K, n, w)    (B, K, n)       the same
Chunks = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class EpisodeBatch:
    """B episodes: the chunks to read, then the queries to answer. Queries of all tasks follow each other.

    Args:
        chunks: ids, mask and labels of K chunks for each task.
        ids: queries (N, T), or vectors (N, d).
        mask: the mask of the queries.
        labels: labels of the queries, in the form that the core scores. None: nothing is scored.
        num_queries: Q.
        answers: the possible answers, in regime `implicit`.
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


class Core(nn.Module, ABC):
    """What an adapter learns, and how a chunk updates a state.

    `read` reads a chunk without the state, so many chunks can be read in one batch. Its result is the evidence. `step`
    computes the next state from the evidence.

    Args:
        config: the adapter's configuration.

    Attributes:
        uses_labels: whether the labels of a chunk of text are used. Observations do not use them.
        scores_reading: whether a chunk is read under the state, so that its loss is one of a query.
    """

    uses_labels = scores_reading = False

    def __init__(self, config: IAIConfig) -> None:
        super().__init__()
        self.config = config

    def _apply(self, fn: Callable[[Tensor], Tensor], *args, **kwargs) -> nn.Module:
        """As in PyTorch, for `.half()`, `.to(...)` and such, without loss of precision: states are made in float32."""
        return super()._apply(lambda tensor: as_precise(fn(tensor), tensor), *args, **kwargs)

    @abstractmethod
    def begin(self, base: Base, episode: EpisodeBatch) -> State:
        """The state before the first chunk of an episode."""

    @abstractmethod
    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> Evidence:  # (B, C) each
        """The evidence of a chunk: what it says without the state. It includes the `mask`."""

    @abstractmethod
    def step(self, base: Base, state: State, evidence: Evidence) -> State:
        """The state after one more chunk. A row without tokens keeps its state bitwise."""

    @abstractmethod
    def score(self, base: Base, states: list[State], episode: EpisodeBatch) -> Any:
        """The model output: `loss` over the queries under all states, `logits` under the last one."""

    def with_classes(self, state: State, classes: Any) -> State:
        """Make room in the state for new classes. Only linear states have any."""
        return state

    def usual_chunk_size(self, longest: int) -> int:
        """The size of chunks if none is given.

        Args:
            longest: the longest chunk that fits.
        """
        return longest

    def check_answers_without_state(self, *, disabled: bool) -> None:
        """Refuse a query without a state, if the base has no answer.

        Args:
            disabled: whether the adapter is switched off.

        Raises:
            ValueError: if the base cannot answer.
        """


class StateCore(Core):
    """A core with a task state: theta(0), how a chunk updates the state, and how a query is answered under it.

    Args:
        base: the pretrained model. theta(0) and the slots start from its embeddings.
        config: the adapter's configuration.
        reads: whether the base reads chunks out into slots.
    """

    def __init__(self, base: Base, config: IAIConfig, *, reads: bool) -> None:
        super().__init__(config)
        self.state: SlotState = STATES[config.state_type].make(base, config, reads=reads)

    @property
    def accumulation(self) -> str:
        """How states were accumulated, `TaskState.accumulation`. Only averages and sums can be merged."""
        return self.config.accumulation

    def initial_state(self, base: Base, batch_size: int, identity: Identity) -> TaskState:
        """theta(0) for `batch_size` tasks."""
        tensors = self._initial(base, batch_size)
        zero = torch.zeros(batch_size, dtype=torch.long, device=next(iter(tensors.values())).device)
        return TaskState(tensors, zero, zero.clone(), identity, self.accumulation)

    def begin(self, base: Base, episode: EpisodeBatch) -> TaskState:
        return self.initial_state(base, episode.num_tasks, Identity("", "in training"))

    @abstractmethod
    def _initial(self, base: Base, batch_size: int) -> dict[str, Tensor]:
        """The tensors of theta(0)."""

    def read(self, base: Base, ids: Tensor, mask: Tensor, labels: Tensor) -> Evidence:  # (B, C) each
        return tokens_of(ids, mask, labels)

    def step(self, base: Base, state: TaskState, evidence: Evidence) -> TaskState:
        """theta(i+1) = h(theta(i), evidence). A row without tokens keeps its state bitwise."""
        num_tokens = evidence["mask"].sum(1)  # (B,)
        read = num_tokens > 0
        tensors = {
            name: torch.where(along(read, t), t, state.tensors[name])
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
        """A context in which the base answers under the state. Queries must be read after the prefix that it yields."""
        with self.state.under(base, self.corrected(base, state)) as prefix:
            yield prefix

    def answer(self, base: Base, state: TaskState, ids: Tensor, mask: Tensor, labels: Tensor | None = None, **kwargs):
        """The model output for queries (N, T) under the state."""
        with self.under(base, state) as prefix:
            return base.answer(prefix, ids, mask, labels, **kwargs)

    def corrected(self, base: Base, state: TaskState) -> dict[str, Tensor]:
        """The state as a query sees it: all m slots in the layout of the state type, after any learned correction."""
        return self.state.visible(base, state.tensors)


def _queries(episode: EpisodeBatch) -> tuple[Tensor, Tensor, Tensor | None]:
    return episode.ids, episode.mask, episode.labels


def tokens_of(ids: Tensor, mask: Tensor, labels: Tensor) -> Evidence:  # (B, C) each
    """The tokens of a chunk as evidence, with ids and labels under padding removed."""
    # Padding gets id 0: a mixture of experts routes padding too, and its ids would change the batch of each expert.
    return {"ids": ids.masked_fill(mask == 0, 0), "mask": mask, "labels": labels.masked_fill(mask == 0, NO_LOSS)}


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which state and head compute in float32, even if autocast runs the base in a lower precision."""
    return torch.autocast(tensor.device.type, enabled=False)
