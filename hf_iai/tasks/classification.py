"""LabelledInputs: chunks of labelled examples and queries that fit an encoder.

Axes: B tasks, n examples, T tokens, d width of a vector. A given vector is a text of one token whose embedding it is:
where ids are (..., T), floating vectors (..., 1, d) may stand, with a mask (..., 1).
"""

import torch
from torch import Tensor

from ..label_names import Names, matched, names_of_tasks
from ..state import TaskState
from ..tensors import NO_LOSS
from .inputs import Chunk, Inputs

CHUNK_SIZE = 20  # examples

# ids and mask (B, n, T), or vectors (B, n, 1, d) and mask (B, n, 1); labels (B, n), names as they were given
LabelledChunk = tuple[Tensor, Tensor, Tensor, object]


class LabelledInputs(Inputs):
    """Checks what a model with a linear state is given."""

    @property
    def max_chunk_size(self) -> int:
        """The usual number of examples: they are embedded one by one, so that any number fits."""
        return CHUNK_SIZE

    def tokens(self, ids: Tensor | None, vectors: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if (ids is None) == (vectors is None):
            raise ValueError(
                "examples and queries are input_ids or inputs_embeds, got "
                f"{'neither' if ids is None else 'both'}: pass one of the two"
            )
        if vectors is None:
            if ids.is_floating_point():
                raise ValueError(f"input_ids must be integers, got {ids.dtype}: pass vectors as inputs_embeds")
            return super().tokens(ids, None, mask)
        width = self.base.input_width
        if not vectors.is_floating_point() or vectors.dim() < 2 or vectors.shape[-1] != width:
            raise ValueError(
                f"inputs_embeds must be floating vectors (..., {width}), as wide as the base's embeddings, got shape "
                f"{tuple(vectors.shape)} of {vectors.dtype}: use .float(), or a base whose config has that width"
            )
        mask = torch.ones(vectors.shape[:-1], dtype=torch.long, device=vectors.device) if mask is None else mask
        if mask.shape != vectors.shape[:-1]:
            raise ValueError(
                f"the attention_mask of vectors {tuple(vectors.shape)} must be {tuple(vectors.shape[:-1])}, one number "
                f"for each, got {tuple(mask.shape)}"
            )
        vectors = vectors.masked_fill((mask == 0).unsqueeze(-1), 0.0)
        if not vectors.isfinite().all():
            raise ValueError(
                f"inputs_embeds hold {int((~vectors.isfinite()).sum())} values that are not finite: fill them in, or "
                "leave those examples out"
            )
        return vectors.unsqueeze(-2), mask.unsqueeze(-1)

    def chunk(self, chunk: Chunk) -> LabelledChunk:
        ids, mask = self._on_device(chunk)
        if mask.dim() != 3 or chunk.get("labels") is None:
            raise ValueError(
                "a chunk of a linear state has input_ids (batch, examples, tokens), or inputs_embeds (batch, examples, "
                f"width), and labels (batch, examples), got {_given(ids)} and "
                f"{'no' if chunk.get('labels') is None else 'its'} labels; chunk_examples makes them from rows "
                '{"text", "label"}, chunk_vectors from arrays'
            )
        self._check_ids(ids)
        self._check_chunk_length(ids.shape[2])
        return ids, mask, self.labels(chunk["labels"], ids, mask), chunk.get("label_names")

    def labels(self, labels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:  # (B, n), (B, n, T) -> (B, n)
        """Class numbers; -100 for an example without a token."""
        examples = mask.shape[:-1]
        if labels is None or labels.shape[: len(examples)] != examples or labels.dim() > mask.dim():
            found = None if labels is None else tuple(labels.shape)
            raise ValueError(f"labels of texts {tuple(mask.shape)} must have shape {tuple(examples)}, got {found}")
        if labels.is_floating_point() or labels.shape != examples:
            raise ValueError(
                f"labels of classes must be integers {tuple(examples)}, got {tuple(labels.shape)} of {labels.dtype}: "
                "real targets need IAIConfig(likelihood='gaussian')"
            )
        return labels.to(ids.device).masked_fill(~mask.any(-1), NO_LOSS)

    def matched(
        self, group: list[LabelledChunk], state: TaskState
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[Names, ...]]]:
        """Chunks with the state's own numbers of classes, and what each task has met after each of them."""
        check_one_kind(group)
        known, numbered, met = state.class_names, [], []
        for ids, mask, labels, given in group:
            labels, known = matched(labels, names_of_tasks(given, known, labels), known)
            numbered.append((ids, mask, labels))
            met.append(known)
        return numbered, met

    def check_query(self, ids: Tensor, num_tasks: int) -> None:  # (N, T), or (N, 1, d)
        """Each of B tasks answers N / B queries, one after the other."""
        self._check_ids(ids)
        if ids.dim() != 2 + ids.is_floating_point() or not len(ids) or len(ids) % num_tasks:
            raise ValueError(
                "queries must be input_ids (number, tokens) or inputs_embeds (number, width), as many for each of the "
                f"{num_tasks} tasks of the state: got {_given(ids)}"
            )
        self._check_query_length(ids.shape[1])

    def check_episode(self, ids: Tensor, chunk_ids: Tensor) -> None:  # (B * Q, T), (B, K, n, T)
        self._check_ids(ids)
        self._check_ids(chunk_ids)
        if ids.dim() != 2 + ids.is_floating_point() or chunk_ids.dim() != 4 + chunk_ids.is_floating_point():
            raise ValueError(
                "an episode has chunks (batch, chunks, examples, tokens or width) and queries (batch, queries, tokens "
                f"or width), got chunk_{_given(chunk_ids)}, and queries in a row as {_given(ids)}"
            )
        self._check_query_length(ids.shape[1])
        self._check_chunk_length(chunk_ids.shape[3])

    def _check_ids(self, ids: Tensor) -> None:
        if not ids.is_floating_point():  # `tokens` has looked at vectors
            super()._check_ids(ids)

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


def check_one_kind(group: list[LabelledChunk]) -> None:
    """Of chunks that are to be read as one batch."""
    if len({ids.is_floating_point() for ids, *_ in group}) > 1:
        raise ValueError("input_ids and inputs_embeds cannot be read in one batch: use parallel=1, or separate calls")


def _given(ids: Tensor) -> str:
    if ids.is_floating_point():
        return f"inputs_embeds of shape {tuple(ids.squeeze(-2).shape)}"
    return f"input_ids of shape {tuple(ids.shape)}"
