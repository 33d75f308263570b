"""Inputs: the chunks and queries that fit a base and its states. Axes: B tasks, C tokens of a chunk, T of a query."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases.base import Base
from ..config import IAIConfig
from ..data.examples import Chunk
from ..state import TaskState
from ..tensors import NO_LOSS, pad_to


@dataclass(frozen=True)
class Inputs:
    """Checks what a model is given.

    Args:
        base: decides the window and the vocabulary.
        config: of the adapter.
        slots_in_front: of a text: m, or none of a lora state.
    """

    base: Base
    config: IAIConfig
    slots_in_front: int

    @property
    def slots_around(self) -> int:
        """Of a chunk: theta(0), and at most m read-out slots."""
        if self.slots_in_front:
            return 2 * self.config.num_state_tokens
        return 0 if self.config.signal == "gradients" else self.config.num_state_tokens

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
        ids, mask = self._on_device(chunk)
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

    def _on_device(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        given = (chunk.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        ids, mask = self.tokens(*(None if t is None else t.to(self.base.model.device) for t in given))
        return ids, mask.long()

    def matched(self, group: list[tuple[Tensor, ...]], state: TaskState) -> tuple[list[tuple[Tensor, ...]], list]:
        """The chunks as the state numbers their classes, and the classes met after each: here there are none."""
        return group, [None] * len(group)

    def labels(self, labels: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor:  # of ids' shape
        """Of a chunk; all its tokens by default. Observations have no use for them."""
        if labels is None or self.config.signal == "observations":
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
    """ids, mask and labels of chunks of B rows each as one batch, chunk after chunk, padded to the longest."""
    return tuple(torch.cat(_padded(tensors)) for tensors in zip(*group, strict=True))


def _padded(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Pad all axes but the first to the longest; the mask of padding is 0, so what it holds does not matter."""
    size = [max(lengths) for lengths in zip(*(t.shape[1:] for t in tensors), strict=True)]
    return [pad_to(t, size, 0) for t in tensors]
