"""Given vectors as chunks and episodes. Axes: B tasks, K chunks of n examples, Q queries, d width, o outputs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..label_names import are_numbers
from .examples import NO_LOSS
from .labelled import PARTS

Row = Mapping[str, Any]
KEYS = ("vector", "label")


def chunk_vectors(
    vectors: Tensor | Sequence,  # (S, d)
    labels: Tensor | Sequence,  # (S,) or (S, o)
    chunk_size: int = 20,
) -> Iterator[Mapping[str, Any]]:
    """Read S given vectors (features, pixels) as chunks of `chunk_size` labelled examples.

    Args:
        vectors: an array or a tensor, as wide as the base's embeddings, or of `vector_width`.
        labels: names or whole numbers of classes, or floating targets of a regression, one or o for each vector.
        chunk_size: n, examples per chunk; the last chunk may be smaller.

    Returns:
        A generator of `inputs_embeds` (1, n, d), `attention_mask` (1, n) and `labels`: numbers of classes (1, n), with
        `label_names`, all names met so far in the order in which they were met; or floating targets (1, n, o).

    Raises:
        ValueError: for `chunk_size` below 1, vectors that are not (S, d), another number of labels, or labels of which
            some are classes and some are not.

    Example:
        >>> from hf_iai import chunk_vectors
        >>> first, second = chunk_vectors([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], ["no", "yes", "yes"], chunk_size=2)
        >>> first["inputs_embeds"].shape, first["labels"].tolist(), second["label_names"]
        (torch.Size([1, 2, 2]), [[0, 1]], ('no', 'yes'))
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    vectors = torch.as_tensor(vectors).float()
    labels = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    if vectors.dim() != 2 or len(vectors) != len(labels):
        raise ValueError(
            f"vectors must be (S, d) with S labels, got shape {tuple(vectors.shape)} and {len(labels)} labels"
        )
    return _chunks(vectors, *_targets(labels), chunk_size)


def _chunks(vectors: Tensor, targets: Tensor, names: tuple[str, ...], chunk_size: int) -> Iterator[Mapping[str, Any]]:
    for start in range(0, len(vectors), chunk_size):
        x, y = vectors[None, start : start + chunk_size], targets[None, start : start + chunk_size]
        chunk = {"inputs_embeds": x, "attention_mask": torch.ones(x.shape[:2], dtype=torch.long), "labels": y}
        met = {} if y.is_floating_point() else {"label_names": names[: int(targets[: start + chunk_size].max()) + 1]}
        yield chunk | met


@dataclass
class VectorEpisodeCollator:
    """Turn episodes of given vectors into what the `forward` of a model with a linear state or `vector_width` takes.

    As `LabelledEpisodeCollator`, with vectors in place of texts. Vectors may occur more than once, so that it is up to
    the episodes not to ask in the query for an example of the support.

    Args:
        chunk_size: n, examples per chunk.
        num_classes: C, with which whole numbers below it are classes as they are, as `num_outputs` counts them. None:
            the classes of an episode are numbered as they come, as names always are.

    Returns:
        When called with episodes `{"support": [{"vector", "label"}...], "query": [...]}`: `chunk_inputs_embeds`
        (B, K, n, d), `chunk_attention_mask`, `chunk_labels` (B, K, n), `inputs_embeds` (B, Q, d), `attention_mask`,
        `labels` (B, Q). Labels are numbers within their episode; of floating ones targets (..., o). The mask of padding
        is 0.

    Raises:
        ValueError: for `chunk_size` below 1, no episode, an episode without a query, an example without vector or
            label, or examples that do not go together.

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

    def __post_init__(self):
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")

    def __call__(self, episodes: Sequence[Mapping[str, list[Row]]]) -> dict[str, Tensor]:
        if not episodes:
            raise ValueError("a batch needs at least one episode, got none")
        support, queries = zip(*(_parts(e, self.num_classes) for e in episodes), strict=True)
        kinds = {(x.shape[1:], y.shape[1:], y.dtype) for x, y in queries}
        if len(kinds) > 1:
            raise ValueError(f"episodes of one batch must have the same vectors and kind of labels, got {kinds}")
        slots = -(-max(len(y) for _, y in support) // self.chunk_size) * self.chunk_size  # K n
        shape = (slots // self.chunk_size, self.chunk_size)
        read = {f"chunk_{key}": t.unflatten(1, shape) for key, t in _padded(support, slots, self.chunk_size).items()}
        return read | _padded(queries, max(len(y) for _, y in queries))


def _parts(episode: Mapping[str, list[Row]], num_classes: int | None) -> list[tuple[Tensor, Tensor]]:
    """Vectors (S, d) and labels (S,) or (S, o) of the support, and of the query."""
    rows = [row for part in PARTS for row in episode[part]]
    for row in rows:
        if not isinstance(row, Mapping) or any(row.get(key) is None for key in KEYS):
            raise ValueError(f"an example needs a vector and a label, got {row!r:.120}; of texts pass the tokenizer")
    if not episode["query"]:
        raise ValueError("an episode needs at least one query, got none")
    if len(widths := {len(row["vector"]) for row in rows}) > 1:
        raise ValueError(f"vectors of one episode must be of one width, got {sorted(widths)}")
    vectors = torch.tensor(np.asarray([row["vector"] for row in rows]), dtype=torch.float32)
    labels, first = _targets([row["label"] for row in rows], num_classes)[0], len(episode["support"])
    return [(vectors[:first], labels[:first]), (vectors[first:], labels[first:])]


def _targets(labels: Sequence, num_classes: int | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Numbers (S,) of classes and their names, or floating targets (S, o) and no names."""
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


def _padded(parts: Sequence[tuple[Tensor, Tensor]], slots: int, chunk_size: int | None = None) -> dict[str, Tensor]:
    """All of `slots` examples; whole chunks that are missing stand in front, single examples behind."""
    (x, y), batch = parts[0], len(parts)
    padded = {"inputs_embeds": x.new_zeros(batch, slots, x.shape[1]), "labels": y.new_zeros(batch, slots, *y.shape[1:])}
    padded["labels"].fill_(NO_LOSS)
    padded["attention_mask"] = torch.zeros(batch, slots, dtype=torch.long)
    for row, (x, y) in enumerate(parts):
        first = (slots - len(y)) // chunk_size * chunk_size if chunk_size else 0
        for key, values in (("inputs_embeds", x), ("labels", y), ("attention_mask", torch.ones(len(y)))):
            padded[key][row, first : first + len(y)] = values
    return padded
