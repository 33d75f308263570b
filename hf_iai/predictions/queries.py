"""Queries: prompts whose answers are predicted after reading a chunk.

Axes: B tasks, N queries (N / B consecutive ones for each task), T tokens of a prompt, S places after it, C tokens of a
chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases.base import Base
from ..bases.places import ages_of, positions_of
from ..bases.prefixes import MaskedPrefix
from ..tensors import NO_LOSS


@dataclass(frozen=True)
class Queries:
    """N prompts without their answers, padded on the right; `prompts_of` makes them."""

    ids: Tensor  # (N, T), or embeddings (N, T, d)
    mask: Tensor  # (N, T)

    def __len__(self) -> int:
        return len(self.ids)

    def repeated(self, times: int) -> "Queries":
        """Repeat every query a number of times in a row."""
        return Queries(self.ids.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0))

    def followed_by(
        self,
        base: Base,
        chunk: dict[str, Tensor] | None,  # what `read_keys_values` returned; None: no chunk
        embeddings: Tensor,  # (N, S, d)
        real: Tensor | None = None,  # (N, S) 0 for padding among the embeddings; there is none by default
    ) -> tuple[Tensor, Tensor]:
        """One pass over [chunk][prompt][embeddings]. There is no padding between the three, whatever their lengths.

        Returns:
            Last hidden states, (N, S, d) each: at the places before the embeddings, which predict them, and at the
            embeddings' own places.
        """
        num = embeddings.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(self), num) if real is None else real], 1)
        order = (mask == 0).long().argsort(dim=1, stable=True).unsqueeze(-1)  # padding last
        prompts = base.embed(self.ids)
        text = torch.cat([prompts, embeddings.to(prompts.dtype)], 1).take_along_dim(order, 1)
        mask = mask.gather(1, order.squeeze(-1))
        if chunk is None:
            prefix = base.no_prefix(len(self))
        else:
            layers = list(zip(chunk["key"].unbind(1), chunk["value"].unbind(1), strict=True))
            prefix = MaskedPrefix(layers, chunk["mask"])
        positions = positions_of(mask) + base.next_position(prefix, len(self))
        hidden, _ = base.read(prefix, text, mask, positions, text.shape[1])
        own = self.mask.sum(1, keepdim=True) + torch.arange(num, device=mask.device)  # (N, S)
        return tuple(hidden.take_along_dim(at.unsqueeze(-1), 1) for at in (own - 1, own))


def read_keys_values(base: Base, embeddings: Tensor, mask: Tensor) -> dict[str, Tensor]:  # (B, C, d), (B, C)
    """Read a chunk once for all queries about it.

    Returns:
        `key` and `value` (B, L, H, C, D), and `mask` (B, C), all with padding first.
    """
    order = mask.argsort(dim=1, stable=True)
    embeddings, mask = embeddings.take_along_dim(order.unsqueeze(-1), 1), mask.gather(1, order)
    prefix = base.no_prefix(len(mask))
    _, keys_values = base.read(prefix, embeddings, mask, positions_of(mask), mask.shape[1])
    keys, values = (torch.stack(tensors, 1) for tensors in zip(*keys_values, strict=True))
    # Padding attends to nothing, and some kernels then return arbitrary values, which may be infinite or NaN. A weight
    # of 0 would not remove those.
    real = mask[:, None, None, :, None] != 0
    return {"key": keys.where(real, 0), "value": values.where(real, 0), "mask": mask}


def prompts_of(
    ids: Tensor,  # (N, T)
    mask: Tensor,  # (N, T)
    labels: Tensor | None,  # (N, T)
) -> tuple[Queries, Tensor | None]:
    """Split queries into prompts and answers.

    The answer of a query is its labelled tokens, which must be its last tokens. Its first token is never predicted. A
    row that is all padding becomes a prompt of one token without an answer.

    Args:
        ids: token ids of prompts and answers.
        mask: 1 for real tokens, 0 for padding.
        labels: the ids of the answer's tokens, -100 before them; None if there are no answers.

    Returns:
        The prompts, and the answers' tokens (N, A), with -100 after the end of shorter answers, or None.

    Raises:
        ValueError: if labels have another shape, or an unlabelled token follows a labelled one.
    """
    answers = None
    if labels is not None:
        if labels.shape != ids.shape:
            raise ValueError(f"labels of queries {tuple(ids.shape)} must have their shape, got {tuple(labels.shape)}")
        answered = (labels != NO_LOSS) & (mask != 0) & (positions_of(mask) > 0)
        count = answered.sum(1, keepdim=True)  # (N, 1)
        if (answered != ((mask != 0) & (ages_of(mask) < count))).any():
            raise ValueError(
                "a query's labelled tokens are its answer, which must be its last tokens: label them with their ids, "
                f"and all before them with {NO_LOSS}"
            )
        order = (~answered).long().argsort(dim=1, stable=True)[:, : max(1, int(count.max()))]
        answers = labels.masked_fill(~answered, NO_LOSS).gather(1, order)
        mask = mask.masked_fill(answered, 0)
    mask = mask.clone()
    mask[:, 0] = torch.where(mask.any(1), mask[:, 0], 1)
    order = (mask == 0).long().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    mask = mask.gather(1, order)
    return Queries(ids.gather(1, order).masked_fill(mask == 0, 0), mask), answers
