"""Inputs: the chunks and queries that fit a base and its states. Axes: B tasks, C tokens of a chunk, T of a query."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases.base import Base
from ..config import IAIConfig
from ..cores import Core, EpisodeBatch, State
from ..data.examples import Chunk
from ..registry import kind_of
from ..tensors import NO_LOSS, pad_to


@dataclass(frozen=True)
class Inputs:
    """Checks chunks and queries of texts, and lays them out for the core.

    Args:
        base: decides the window and the vocabulary.
        core: of the adapter; its state says how many slots stand in front of a text.
    """

    base: Base
    core: Core

    @property
    def config(self) -> IAIConfig:
        return self.core.config

    @property
    def slots_in_front(self) -> int:
        """Positions that the state takes in front of a text: m, or none."""
        return self.core.state.num_slots_in_front

    @property
    def reads_out(self) -> bool:
        """Whether the base reads chunks out into slots."""
        return kind_of(self.config).reads_out(self.config)

    @property
    def slots_around(self) -> int:
        """Positions beside a chunk: theta(0), and at most m read-out slots."""
        if self.slots_in_front:
            return 2 * self.config.num_state_tokens
        return self.config.num_state_tokens if self.reads_out else 0

    @property
    def max_chunk_size(self) -> int:
        if self.base.window == sys.maxsize:
            kind = self.base.config.model_type
            raise ValueError(f"{kind!r} has no window that a chunk could fill: pass chunk_size")
        return self.base.window - self.slots_around

    def tokens(self, ids: Tensor | None, vectors: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is read, `input_ids` or `inputs_embeds`, and its mask, which is 1 by default."""
        if ids is None or vectors is not None:
            raise ValueError(
                f"state_type={self.config.state_type!r} needs input_ids (B, T) of chunks and queries; inputs_embeds "
                "cannot be used with it"
            )
        return ids, torch.ones_like(ids) if mask is None else mask

    def chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """ids, mask and labels (B, C) of a chunk that fits, on the base's device, without columns that are padding."""
        ids, mask = self.on_device(chunk)
        if ids.dim() != 2:
            labelled = "; labelled examples are for a linear state" if ids.dim() == 3 else ""
            raise ValueError(f"a chunk's input_ids must be (batch, chunk), got shape {tuple(ids.shape)}{labelled}")
        labels = self.labels(chunk.get("labels"), ids, mask)
        columns = mask.any(0).nonzero().flatten()
        if len(columns):
            ids, mask, labels = (t[:, columns[0] : columns[-1] + 1] for t in (ids, mask, labels))
        self._check_ids(ids)
        self._check_chunk_length(ids.shape[1])
        return ids, mask, labels

    def on_device(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        given = (chunk.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        ids, mask = self.tokens(*(None if t is None else t.to(self.base.model.device) for t in given))
        return ids, mask.long()

    def align_labels(self, group: list[tuple[Tensor, ...]], state: State) -> tuple[list[tuple[Tensor, ...]], list]:
        """The chunks with the state's own numbers of classes, and the classes met after each; here there are none.

        Raises:
            ValueError: for a chunk of another number of tasks.
        """
        for rows in (len(chunk[0]) for chunk in group):
            if rows != state.batch_size:
                raise ValueError(f"a state of {state.batch_size} tasks cannot read a chunk of {rows} rows")
        return group, [None] * len(group)

    def labels(self, labels: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor:  # of ids' shape
        """Of a chunk; all its tokens by default. Observations have no use for them."""
        if labels is None or not self.core.uses_labels:
            return ids.masked_fill(mask == 0, NO_LOSS)
        if labels.shape != ids.shape:
            raise ValueError(
                f"a chunk's labels must have the shape of its ids {tuple(ids.shape)}, got {tuple(labels.shape)}"
            )
        labels = labels.to(ids.device)
        self._check_ids(labels.masked_fill((labels == NO_LOSS) | (mask == 0), 0))
        return labels

    def query_labels(self, labels: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor | None:
        """Of queries in a row, as the core's answer takes them."""
        return labels

    def check_query(self, ids: Tensor, num_tasks: int) -> None:  # (B, T)
        """Of a state of `num_tasks`."""
        self._check_ids(ids)
        if num_tasks not in (1, len(ids)):
            raise ValueError(f"a state of {num_tasks} tasks with {len(ids)} queries: pass 1 or {len(ids)} tasks")
        self._check_query_length(ids.shape[1])

    def episode(
        self,
        queries: tuple[Tensor, Tensor, Tensor | None],  # ids, mask and labels (B, Q, T)
        chunks: tuple[Tensor, Tensor, Tensor | None],  # (B, K, C)
        label_set: tuple[Tensor | None, Tensor | None],
    ) -> EpisodeBatch:
        """A batch of episodes, checked; a label set is for regime implicit."""
        (ids, mask, labels), (chunk_ids, chunk_mask, chunk_labels) = queries, chunks
        num_queries = ids.shape[1]
        ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)  # (B * Q, T)
        self.check_episode(ids, chunk_ids)
        labels = None if labels is None else self.query_labels(labels.flatten(0, 1), ids, mask)
        chunks = (chunk_ids, chunk_mask, self.labels(chunk_labels, chunk_ids, chunk_mask))
        return EpisodeBatch(chunks, ids, mask, labels, num_queries)

    def check_episode(self, ids: Tensor, chunk_ids: Tensor) -> None:  # (B * Q, T), (B, K, C)
        self._check_ids(ids)
        self._check_ids(chunk_ids)
        self._check_query_length(ids.shape[1])
        self._check_chunk_length(chunk_ids.shape[2])

    def _check_query_length(self, length: int) -> None:
        window, slots = self.base.window, self.slots_in_front
        if length > window - slots:
            raise ValueError(
                f"a query of {length} tokens does not fit: window {window} - {slots} slots = {window - slots}"
            )

    def _check_chunk_length(self, length: int) -> None:
        window = self.base.window
        most = window - self.slots_around
        if length > most:
            slots = f"2 x {self.config.num_state_tokens}" if self.slots_in_front else self.slots_around
            raise ValueError(
                f"a chunk of {length} tokens does not fit: window {window} - {slots} slots "
                f"= {most}; pass chunk_size <= {most}"
            )

    def _check_ids(self, ids: Tensor) -> None:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.base.vocab_size:
            raise ValueError(
                f"token ids {int(ids.min())}..{int(ids.max())} do not fit a vocabulary of {self.base.vocab_size}: "
                "use the base model's own tokenizer"
            )


def batched(group: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """ids, mask and labels of several chunks of B rows each as one batch, chunk after chunk, padded to the longest."""
    batch = []
    for tensors in zip(*group, strict=True):
        size = [max(lengths) for lengths in zip(*(t.shape[1:] for t in tensors), strict=True)]
        batch.append(torch.cat([pad_to(t, size, 0) for t in tensors]))  # what the mask leaves out may be anything
    return tuple(batch)
