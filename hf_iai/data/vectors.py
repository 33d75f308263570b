"""Given vectors as chunks and episodes. Axes: B tasks, K chunks of n examples, Q queries, d width, o outputs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from ..label_names import are_numbers
from .checks import PARTS, check_at_least
from .collator_base import Batch, CollatorBase, stack, stack_chunks
from .examples import Chunk, Episode
from .labelled import FILL

KEYS = ("vector", "label")


def chunk_vectors(
    vectors: Tensor | Sequence,  # (S, d)
    labels: Tensor | Sequence,  # (S,) or (S, o)
    chunk_size: int = 20,
) -> Iterator[Chunk]:
    """Divide S given vectors (features, pixels) into chunks of `chunk_size` labelled examples.

    Args:
        vectors: an array or a tensor. Its width is that of the base's embeddings, or the configuration's
            `vector_width`.
        labels: for classification the class names or class numbers; for regression one or o floating targets per
            vector.
        chunk_size: n, examples per chunk; the last chunk may be smaller.

    Returns:
        A generator of `inputs_embeds` (1, n, d), `attention_mask` (1, n) and `labels`. For classes, labels are class
        numbers (1, n), and `label_names` holds the names of all classes met so far, in the order of their numbers. For
        a regression, labels are floating targets (1, n, o).

    Raises:
        ValueError: if `chunk_size` is below 1, vectors are not (S, d), there is another number of labels, or only some
            labels are classes.

    Example:
        >>> from hf_iai import chunk_vectors
        >>> first, second = chunk_vectors([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], ["no", "yes", "yes"], chunk_size=2)
        >>> first["inputs_embeds"].shape, first["labels"].tolist(), second["label_names"]
        (torch.Size([1, 2, 2]), [[0, 1]], ('no', 'yes'))
    """
    check_at_least(1, chunk_size=chunk_size)
    vectors = torch.as_tensor(vectors).float()
    labels = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    if vectors.dim() != 2 or len(vectors) != len(labels):
        raise ValueError(
            f"vectors must be (S, d) with S labels, got shape {tuple(vectors.shape)} and {len(labels)} labels"
        )
    return _chunks(vectors, *_targets(labels), chunk_size)


def _chunks(vectors: Tensor, targets: Tensor, names: tuple[str, ...], chunk_size: int) -> Iterator[Chunk]:
    for start in range(0, len(vectors), chunk_size):
        x, y = vectors[None, start : start + chunk_size], targets[None, start : start + chunk_size]
        chunk = {"inputs_embeds": x, "attention_mask": torch.ones(x.shape[:2], dtype=torch.long), "labels": y}
        met = {} if y.is_floating_point() else {"label_names": names[: int(targets[: start + chunk_size].max()) + 1]}
        yield chunk | met


@dataclass
class VectorEpisodeCollator(CollatorBase):
    """Turns episodes of given vectors into what the `forward` of a model with a linear state or `vector_width` takes.

    It works as `LabelledEpisodeCollator`, with vectors in place of texts. Equal vectors may be different examples, so
    it does not check whether a query is also in the support.

    Args:
        chunk_size: n, examples per chunk.
        num_classes: C. Labels that are whole numbers below C then keep their numbers; set it to the configuration's
            `num_outputs`. None: every episode numbers its classes in the order in which it meets them. Class names are
            always numbered that way.

    Returns:
        When called with episodes `{"support": [{"vector", "label"}...], "query": [...]}`: `chunk_inputs_embeds`
        (B, K, n, d), `chunk_attention_mask`, `chunk_labels` (B, K, n), `inputs_embeds` (B, Q, d), `attention_mask`,
        `labels` (B, Q). Labels are class numbers, or floating targets with one more axis (..., o). The mask is 0 for
        padding.

    Raises:
        ValueError: if `chunk_size` is below 1, there is no episode, a row is no episode, an episode has no query, an
            example has no vector or no label, or examples differ in width or kind of label.

    Example:
        >>> from hf_iai import VectorEpisodeCollator
        >>> support = [{"vector": [0.0, 1.0], "label": 0.5}, {"vector": [1.0, 0.0], "label": 1.5}]
        >>> collate = VectorEpisodeCollator(chunk_size=1)
        >>> batch = collate([{"support": support, "query": [{"vector": [1.0, 1.0], "label": 2.0}]}])
        >>> batch["chunk_inputs_embeds"].shape, batch["chunk_labels"].tolist(), batch["labels"].tolist()
        (torch.Size([1, 2, 1, 2]), [[[[0.5]], [[1.5]]]], [[[2.0]]])
    """

    chunk_size: int
    num_classes: int | None = None

    def _batch(self, episodes: Sequence[Episode]) -> Batch:
        support, queries = zip(*(_parts(e, self.num_classes) for e in episodes), strict=True)
        kinds = {(q["inputs_embeds"].shape[1:], q["labels"].shape[1:], q["labels"].dtype) for q in queries}
        if len(kinds) > 1:
            raise ValueError(f"episodes of one batch must have the same vectors and kind of labels, got {kinds}")
        return stack_chunks(support, FILL, self.chunk_size) | stack(queries, FILL)


def _parts(episode: Episode, num_classes: int | None) -> list[Batch]:
    """The support and the query as vectors (S, d), labels (S,) or (S, o), and mask (S,)."""
    rows = [row for part in PARTS for row in episode[part]]
    for row in rows:
        if not isinstance(row, Mapping) or any(row.get(key) is None for key in KEYS):
            raise ValueError(f"an example needs a vector and a label, got {row!r:.120}; of texts pass the tokenizer")
    if len(widths := {len(row["vector"]) for row in rows}) > 1:
        raise ValueError(f"vectors of one episode must be of one width, got {sorted(widths)}")
    vectors = torch.tensor(np.asarray([row["vector"] for row in rows]), dtype=torch.float32)
    labels, first = _targets([row["label"] for row in rows], num_classes)[0], len(episode["support"])
    whole = {"inputs_embeds": vectors, "labels": labels, "attention_mask": torch.ones(len(rows), dtype=torch.long)}
    return [{name: t[part] for name, t in whole.items()} for part in (slice(first), slice(first, None))]


def _targets(labels: Sequence, num_classes: int | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Class numbers (S,) and the classes' names, or floating targets (S, o) and no names."""
    classes = [isinstance(label, str | Integral) for label in labels]
    if any(classes) and not all(classes):
        raise ValueError(
            "labels must be classes (strings, whole numbers) or floating targets, got both: "
            f"{labels[classes.index(True)]!r} and {labels[classes.index(False)]!r}"
        )
    if not any(classes):
        targets = torch.tensor(np.asarray(labels), dtype=torch.float32)
        return targets.unsqueeze(-1) if targets.dim() == 1 else targets, ()
    if num_classes is not None and are_numbers(map(str, labels)):
        numbered = torch.tensor([*map(int, labels)])
        if (most := int(numbered.max())) >= num_classes:
            raise ValueError(f"labels must be below num_classes={num_classes}, got {most}")
        return numbered, tuple(map(str, range(num_classes)))
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(str(label), len(numbers)) for label in labels]), tuple(numbers)
