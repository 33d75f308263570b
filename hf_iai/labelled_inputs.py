"""LabelledInputs: chunks of labelled texts and queries that fit an encoder. Axes: B tasks, n examples, T tokens."""

import torch
from torch import Tensor

from .inputs import Chunk, Inputs
from .label_names import Names, matched, names_of_tasks
from .state import TaskState

CHUNK_SIZE = 20  # examples

LabelledChunk = tuple[Tensor, Tensor, Tensor, object]  # ids and mask (B, n, T), labels (B, n), names as they were given


class LabelledInputs(Inputs):
    """Checks what a model with a linear state is given."""

    @property
    def max_chunk_size(self) -> int:
        """The usual number of examples: they are embedded one by one, so that any number fits."""
        return CHUNK_SIZE

    def chunk(self, chunk: Chunk) -> LabelledChunk:
        ids = chunk["input_ids"].to(self.base.model.device)
        if ids.dim() != 3 or chunk.get("labels") is None:
            raise ValueError(
                "a chunk of a linear state has input_ids (batch, examples, tokens) and labels (batch, examples), got "
                f"input_ids of shape {tuple(ids.shape)} and {'no' if chunk.get('labels') is None else 'its'} labels; "
                'chunk_examples makes them from rows {"text", "label"}'
            )
        mask = chunk.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.to(ids.device, torch.long)
        self._check_ids(ids)
        self._check_chunk_length(ids.shape[2])
        return ids, mask, self.labels(chunk["labels"], ids, mask), chunk.get("label_names")

    def labels(self, labels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:  # (B, n), (B, n, T) -> (B, n)
        """Class numbers; -100 for an example without a token."""
        if labels is None or labels.shape != ids.shape[:-1]:
            found = None if labels is None else tuple(labels.shape)
            raise ValueError(f"labels of texts {tuple(ids.shape)} must have shape {tuple(ids.shape[:-1])}, got {found}")
        return labels.to(ids.device).masked_fill(~mask.any(-1), -100)

    def matched(
        self, group: list[LabelledChunk], state: TaskState
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[Names, ...]]]:
        """Chunks with the state's own numbers of classes, and what each task has met after each of them."""
        known, numbered, met = state.class_names, [], []
        for ids, mask, labels, given in group:
            labels, known = matched(labels, names_of_tasks(given, known, labels), known)
            numbered.append((ids, mask, labels))
            met.append(known)
        return numbered, met

    def check_query(self, ids: Tensor, num_tasks: int) -> None:  # (N, T)
        """Each of B tasks answers N / B queries, one after the other."""
        self._check_ids(ids)
        if ids.dim() != 2 or not len(ids) or len(ids) % num_tasks:
            raise ValueError(
                f"queries must be (number, tokens), as many for each of the {num_tasks} tasks of the state: "
                f"got shape {tuple(ids.shape)}"
            )
        self._check_query_length(ids.shape[1])

    def check_episode(self, ids: Tensor, chunk_ids: Tensor) -> None:  # (B * Q, T), (B, K, n, T)
        self._check_ids(ids)
        self._check_ids(chunk_ids)
        self._check_query_length(ids.shape[1])
        self._check_chunk_length(chunk_ids.shape[3])

    def _check_chunk_length(self, length: int) -> None:
        self._check_text(length, "an example")

    def _check_query_length(self, length: int) -> None:
        self._check_text(length, "a query")

    def _check_text(self, length: int, what: str) -> None:
        if length > self.base.window:
            raise ValueError(
                f"{what} of {length} tokens does not fit the window of {self.base.window}: truncate it, such as by "
                f"tokenizer.model_max_length = {self.base.window}"
            )
