"""Chunks of (x, y) and queries x, with `vector_width`. Axes: B tasks, n examples, N queries, w width, o outputs."""

import torch
from torch import Tensor

from ..label_names import Names, are_numbers, names_of_tasks
from ..predictions.likelihoods import vector_targets
from ..predictions.queries import Queries
from ..tensors import NO_LOSS
from .classification import CHUNK_SIZE
from .inputs import Chunk, Inputs
from .refined_text import ImplicitInputs, Labels


class _Vectors(Inputs):
    """What an observation is."""

    def tokens(self, ids: Tensor | None, vectors: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        width = self.config.vector_width
        if ids is not None or vectors is None:
            raise ValueError(f"vector_width={width} reads inputs_embeds (..., {width}), not input_ids")
        mask = torch.ones(vectors.shape[:-1], device=vectors.device).long() if mask is None else mask
        if mask.shape != vectors.shape[:-1]:
            raise ValueError(
                f"the attention_mask of vectors {tuple(vectors.shape)} must be {tuple(vectors.shape[:-1])}, one number "
                f"for each, got {tuple(mask.shape)}"
            )
        vectors = vectors.masked_fill((mask == 0).unsqueeze(-1), 0)
        if not vectors.is_floating_point() or vectors.shape[-1] != width or not vectors.isfinite().all():
            raise ValueError(
                f"inputs_embeds must be finite floating vectors (..., {width}), got shape {tuple(vectors.shape)} of "
                f"{vectors.dtype}: vector_width says how wide they are"
            )
        return vectors.float(), mask

    def chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (B, n, w), mask (B, n) and labels (B, n), or (B, n, o) of real targets.

        Classes of `label_names` that are whole numbers are those numbers; others are numbered as they are.
        """
        vectors, mask = self._on_device(chunk)
        if vectors.dim() != 3:
            raise ValueError(f"a chunk's inputs_embeds must be (tasks, examples, width), got {tuple(vectors.shape)}")
        self._check_chunk_length(vectors.shape[1])
        labels = chunk.get("labels")
        if labels is not None and not labels.is_floating_point() and labels.shape == mask.shape:
            if chunk.get("label_names") is not None:
                labels = _as_named(labels, names_of_tasks(chunk["label_names"], (), labels))
            mask = mask * (labels.to(mask.device) != NO_LOSS)
        return vectors, mask, self.labels(labels, vectors, mask)

    def labels(self, labels: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor:
        """Class numbers, or floating targets of `num_outputs`; 0 for padding."""
        real, most = self.config.likelihood == "gaussian", self.config.num_outputs
        if labels is None:
            raise ValueError("chunks of vectors need labels, one for each: chunk_vectors makes them")
        labels = labels.to(mask.device)
        labels = labels.unsqueeze(-1) if real and labels.dim() == mask.dim() else labels
        if labels.is_floating_point() != real or labels.shape != (*mask.shape, *([most] if real else [])):
            expected = f"floating targets (..., {most})" if real else f"whole numbers below {most}"
            raise ValueError(
                f"labels of vectors {tuple(mask.shape)} must be {expected} under likelihood="
                f"{self.config.likelihood!r}, got {tuple(labels.shape)} of {labels.dtype}"
            )
        labels = (labels.float() if real else labels.long()).masked_fill((mask == 0).view(*mask.shape, *[1] * real), 0)
        if real and not labels.isfinite().all():
            raise ValueError("labels hold values that are not finite: leave those examples out, with attention_mask 0")
        if not real and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < most:
            found = f"{int(labels.min())}..{int(labels.max())}"
            raise ValueError(f"labels must be from 0 to num_outputs - 1 = {most - 1}, got {found}")
        return labels

    def _targets(self, labels: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:  # (..., Q), (..., Q, w), (..., Q)
        """Labels of queries, -100 for none of a class, as the losses want them."""
        classes = not labels.is_floating_point() and labels.shape == mask.shape
        asked = mask * (labels != NO_LOSS) if classes else mask
        return vector_targets(self.labels(labels, vectors, asked), asked)

    def _check_ids(self, ids: Tensor) -> None:
        """Vectors are not of a vocabulary."""


class VectorInputs(_Vectors):
    """Checks what a model with a state of vectors is given."""

    @property
    def max_chunk_size(self) -> int:
        """The usual number of examples, if as many fit the window."""
        most = self.base.window - self.slots_around
        if most < 1 and self.config.signal != "gradients":
            raise ValueError(f"no example fits a window of {self.base.window} beside {self.slots_around} slots")
        return CHUNK_SIZE if self.config.signal == "gradients" else min(CHUNK_SIZE, most)

    def _check_chunk_length(self, length: int) -> None:
        if self.config.signal != "gradients":  # for which no base reads
            super()._check_chunk_length(length)

    def check_query(self, ids: Tensor, num_tasks: int) -> None:  # (N, w)
        """Each of B tasks answers N / B queries, one after the other."""
        if ids.dim() != 2 or not len(ids) or len(ids) % num_tasks:
            raise ValueError(
                f"queries must be inputs_embeds (queries, width), as many for each of the {num_tasks} tasks of the "
                f"state, got shape {tuple(ids.shape)}"
            )

    def check_episode(self, ids: Tensor, chunk_ids: Tensor) -> None:  # (B * Q, w), (B, K, n, w)
        if ids.dim() != 2 or chunk_ids.dim() != 4:
            raise ValueError(
                "an episode has chunk_inputs_embeds (batch, chunks, examples, width) and inputs_embeds (batch, "
                f"queries, width), got chunks {tuple(chunk_ids.shape)}, and queries in a row as {tuple(ids.shape)}"
            )
        self._check_chunk_length(chunk_ids.shape[2])

    def query_labels(self, labels: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor | None:  # (N,) or (N, o)
        return None if labels is None else self._targets(labels, ids, mask).unsqueeze(1)


class RefinedVectorInputs(_Vectors, ImplicitInputs):
    """Checks what a model of regime `implicit` with vectors is given."""

    @property
    def max_chunk_size(self) -> int:
        """The usual number of examples, if as many fit the window with a query."""
        return min(CHUNK_SIZE, self.base.window - 2)

    def asked(self, query: Chunk, labels: Labels | None, num_answer_tokens: int | None) -> tuple[Queries, None]:
        if labels is not None or num_answer_tokens is not None:
            raise ValueError("labels and num_answer_tokens are for texts: num_outputs says what a vector's answers are")
        vectors, mask = self._on_device(query)
        if vectors.dim() != 2:
            raise ValueError(f"query needs inputs_embeds (queries, width), got shape {tuple(vectors.shape)}")
        return Queries(vectors.unsqueeze(1), mask.unsqueeze(1).clamp_min(1)), None

    def episode(self, ids: Tensor, mask: Tensor, labels: Tensor, *label_set: Tensor | None):
        """An episode's queries, None for the answers, which are the core's, and the targets (B * Q, 1[, o])."""
        if any(given is not None for given in label_set):
            raise ValueError("label_input_ids are for texts: num_outputs says what a vector's answers are")
        if labels is None:
            raise ValueError("an episode of regime='implicit' needs labels (B, Q) of the queries")
        queries, _ = self.asked({"inputs_embeds": ids.flatten(0, 1)}, None, None)
        return queries, None, self._targets(labels, ids, mask).flatten(0, 1).unsqueeze(1)


def _as_named(labels: Tensor, names: tuple[Names, ...]) -> Tensor:  # (B, n)
    """The numbers that names are, where all of a task are whole numbers."""
    rows = []
    for row, own in zip(labels, names, strict=True):
        if own and are_numbers(own):
            row = torch.tensor([*map(int, own)], device=row.device)[row.clamp_min(0).long()].where(row >= 0, NO_LOSS)
        rows.append(row)
    return torch.stack(rows)
