"""CollatorBase: what the collators of texts, of labelled texts and of vectors have in common.

Axes: B episodes, K chunks, n examples of a chunk, S places.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from .checks import check_at_least, check_episode
from .examples import Episode

Batch = dict[str, Tensor]


class CollatorBase(ABC):
    """Checks a list of episodes and turns it into a batch of tensors.

    Subclasses are dataclasses with the field `chunk_size`, and implement `_batch`.
    """

    chunk_size: int

    def __post_init__(self) -> None:
        check_at_least(1, chunk_size=self.chunk_size)

    def __call__(self, episodes: Sequence[Episode]) -> Batch:
        if not episodes:
            raise ValueError("a batch needs at least one episode, got none")
        for episode in episodes:
            check_episode(episode)
            if not len(episode["query"]):
                raise ValueError("an episode needs at least one query, got none")
        return self._batch(episodes)

    @abstractmethod
    def _batch(self, episodes: Sequence[Episode]) -> Batch:
        """The tensors that a model's `forward` takes."""


def stack(parts: Sequence[Batch], fill: Mapping[str, float], chunk_size: int | None = None) -> Batch:
    """Stack the tensors of B episodes and pad them to the same number of places.

    Padding stands at the end. With `chunk_size`, only a partly filled chunk is padded at its end. Whole chunks that
    an episode has fewer than others stand in front, so the last n chunks of the batch are the last n of every episode.

    Args:
        parts: for every episode, name -> (S_b, ...). The shapes (...) are the same for all episodes.
        fill: name -> what padding holds.
        chunk_size: places per chunk. None: everything is padded at the end.

    Returns:
        Name -> (B, S, ...). S is the largest S_b, with `chunk_size` rounded up to whole chunks.

    Example:
        >>> import torch
        >>> parts = [{"labels": torch.tensor([1, 2, 3])}, {"labels": torch.tensor([4])}]
        >>> stack(parts, {"labels": -100}, chunk_size=2)["labels"].tolist()
        [[1, 2, 3, -100], [-100, -100, 4, -100]]
    """
    numbers = [len(next(iter(part.values()))) for part in parts]
    places = max(numbers)
    if chunk_size:
        places = -(-places // chunk_size) * chunk_size
    firsts = [(places - number) // chunk_size * chunk_size if chunk_size else 0 for number in numbers]
    stacked = {}
    for name, like in parts[0].items():
        stacked[name] = like.new_full((len(parts), places, *like.shape[1:]), fill[name])
        for row, part, first, number in zip(stacked[name], parts, firsts, numbers, strict=True):
            row[first : first + number] = part[name]
    return stacked


def stack_chunks(parts: Sequence[Batch], fill: Mapping[str, float], chunk_size: int) -> Batch:
    """As `stack`, with the examples of each episode divided into chunks: name -> (B, K, n, ...).

    The names get the prefix `chunk_`.
    """
    stacked = stack(parts, fill, chunk_size)
    return {f"chunk_{name}": t.unflatten(1, (t.shape[1] // chunk_size, chunk_size)) for name, t in stacked.items()}
