"""Inputs: checks chunks and queries, and brings them into the shape that a core reads.

Axes: B tasks, C tokens of a chunk, T tokens of a query.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases.base import Base
from ..bases.compat import most_on_all_ranks
from ..config import IAIConfig
from ..cores import Core, EpisodeBatch, State
from ..data.examples import Chunk
from ..registry import kind_of
from ..tensors import NO_LOSS, pad_to


@dataclass(frozen=True)
class Inputs:
    """Checks chunks and queries of text, and brings them into the shape that the core reads.

    Args:
        base: the pretrained model; it sets the window and the vocabulary.
        core: the adapter's core; its state sets the number of slots before a text.
    """

    base: Base
    core: Core

    @property
    def config(self) -> IAIConfig:
        return self.core.config

    @property
    def slots_in_front(self) -> int:
        """Number of positions that the state takes before a text: m, or 0."""
        return self.core.state.num_slots_in_front

    @property
    def reads_out(self) -> bool:
        """Whether the base reads chunks out into slots."""
        return kind_of(self.config).reads_out(self.config)

    @property
    def slots_around(self) -> int:
        """Number of positions besides the chunk when it is read: those of theta(0), and at most m read-out slots."""
        if self.slots_in_front:
            return self.slots_in_front + self.config.num_state_tokens
        return self.config.num_state_tokens if self.reads_out else 0

    @property
    def max_chunk_size(self) -> int:
        if self.base.window == sys.maxsize:
            kind = self.base.config.model_type
            raise ValueError(f"{kind!r} has no window that a chunk could fill: pass chunk_size")
        return self.base.window - self.slots_around

    @property
    def usual_chunk_size(self) -> int:
        """The size of chunks if none is given."""
        return self.core.usual_chunk_size(self.max_chunk_size)

    def tokens(self, ids: Tensor | None, vectors: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The input, `input_ids` or `inputs_embeds`, and its mask, which is 1 by default."""
        if ids is None or vectors is not None:
            raise ValueError(
                f"state_type={self.config.state_type!r} needs input_ids (B, T) of chunks and queries; inputs_embeds "
                "cannot be used with it"
            )
        return ids, torch.ones_like(ids) if mask is None else mask.long()

    def chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """ids, mask and labels (B, C) of a chunk, on the base's device, without columns that hold only padding.

        Raises:
            ValueError: if the chunk has a wrong shape, does not fit the window, or has ids beyond the vocabulary.
        """
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
        """The input of a chunk or query and its mask, on the base's device."""
        given = (chunk.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        ids, mask = self.tokens(*(None if t is None else t.to(self.base.model.device) for t in given))
        return ids, mask.long()

    def align_labels(self, group: list[tuple[Tensor, ...]], state: State) -> tuple[list[tuple[Tensor, ...]], list]:
        """Translate the class numbers of several chunks to those of the state. Text has no classes, so nothing changes.

        Returns:
            The chunks, and for each of them the classes that the state has after it (None here).

        Raises:
            ValueError: if a chunk has another number of tasks than the state.
        """
        for rows in (len(chunk[0]) for chunk in group):
            if rows != state.batch_size:
                raise ValueError(f"a state of {state.batch_size} tasks cannot read a chunk of {rows} rows")
        return group, [None] * len(group)

    def labels(self, labels: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor:  # of ids' shape
        """The labels of a chunk. By default, and for observations, which do not use them, all its tokens."""
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
        """The labels of queries in the form that the core's `answer` takes."""
        return labels

    def check_query(self, ids: Tensor, num_tasks: int) -> None:  # (B, T)
        """Check queries for a state of `num_tasks` tasks."""
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
        """Check a batch of episodes and bring it into shape. A label set is only for regime implicit."""
        (ids, mask, labels), (chunk_ids, chunk_mask, chunk_labels) = queries, chunks
        num_queries = ids.shape[1]
        ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)  # (B * Q, T)
        self.check_episode(ids, chunk_ids)
        labels = None if labels is None else self.query_labels(labels.flatten(0, 1), ids, mask)
        chunks = (chunk_ids, chunk_mask, self.labels(chunk_labels, chunk_ids, chunk_mask))
        most = most_on_all_ranks(self.base.model, chunk_ids.shape[1])
        return EpisodeBatch(with_empty_chunks(chunks, most), ids, mask, labels, num_queries)

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
            twice = self.slots_in_front == self.config.num_state_tokens
            slots = f"2 x {self.config.num_state_tokens}" if twice else self.slots_around
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


def with_empty_chunks(chunks: tuple[Tensor, ...], num_chunks: int) -> tuple[Tensor, ...]:
    """Chunks (B, K, ...) after as many empty ones as are missing to `num_chunks`; their masks are 0, labels -100."""
    missing = num_chunks - chunks[0].shape[1]
    if missing == 0:
        return chunks
    fills = (0, 0, NO_LOSS)
    return tuple(
        torch.cat([t[:, :1].new_full((len(t), missing, *t.shape[2:]), fill), t], 1)
        for t, fill in zip(chunks, fills, strict=True)
    )


def batched(group: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Batch several chunks of B rows each: chunk after chunk, padded to the longest."""
    batch = []
    for tensors in zip(*group, strict=True):
        size = [max(lengths) for lengths in zip(*(t.shape[1:] for t in tensors), strict=True)]
        batch.append(torch.cat([pad_to(t, size, 0) for t in tensors]))  # values under the mask do not matter
    return tuple(batch)
