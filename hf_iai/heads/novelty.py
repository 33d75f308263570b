"""Which tokens say what nothing later repeats.

Axes: B tasks, L layers, H key/value heads, T tokens, D head width.
"""

import torch
from torch import Tensor

from .kept import NEVER

NEAR = 4  # a token is kept for what it and the tokens within so many places say


@torch.no_grad()
def unrepeated(tokens: dict[str, Tensor], num: int, least_age: int) -> Tensor:  # -> (B, L, H, T, 1) bool
    """Find the tokens that say what nothing later repeats, the same ones in every layer and head.

        repeated(i) = mean over l, h of max_j cos(k_i - mean k, k_j - mean k),    age_j < age_i - least_age / 2
        score(i)    = -mean of repeated(j) over tokens j that are within 4 places of i

    k_i is the key of token i in a layer and head, at position 0. Only tokens that all layers and heads hold are
    compared and found, since a base can use a span only if all of its layers hold it; the first token is left out.
    repeated(i) is -1 where no token comes far enough after i. So a fact that is told once stays, whatever is said
    between it and its question, as long as that repeats itself; and a sentence of a kind that comes again and again
    goes. Tokens nearby do not count, since one fact of a list looks like the next. With few slots there is little to
    compare with.

    Args:
        tokens: `key` (B, L, H, T, D), `age` (B, L, H, T, 1); see `heads.chosen`.
        num: how many tokens to find for each task, at most.
        least_age: younger tokens are not found, and half of it is the distance from which a token counts as far.

    Example:
        >>> import torch
        >>> key = torch.eye(5)[[4, 1, 0, 1, 2, 1, 2]].view(1, 1, 1, 7, 5)
        >>> tokens = {"key": key, "age": torch.arange(6, -1, -1).view(1, 1, 1, 7, 1) * 10}
        >>> unrepeated(tokens, num=1, least_age=15).flatten().tolist()
        [False, False, True, False, False, False, False]

    Source: ours; that redundant keys need not be kept is from R-KV, Cai et al., arXiv 2505.24133.
    """
    at, shared = _shared(tokens["age"])
    age = tokens["age"][:, 0, 0, :, 0]  # (B, T) of the first head
    shared &= age != age.masked_fill(age == NEVER, -1).amax(1, keepdim=True)  # the first token is kept anyway
    score = -_repeated(tokens["key"], at, age, shared, least_age // 2)
    near = ((age[:, :, None] - age[:, None]).abs() <= NEAR) & shared[:, None]  # (B, T, T)
    score = (near * score[:, None]).sum(-1) / near.sum(-1).clamp_min(1)
    score = score.masked_fill(~shared | (age < least_age), -torch.inf)
    best = score.topk(min(num, score.shape[1]), 1)
    found = torch.zeros_like(shared).scatter(1, best.indices, best.values > -torch.inf)  # (B, T)
    # Tokens that are not shared may point at the place of another one, so the marks are added.
    marks = torch.zeros_like(at).scatter_add(-1, at, found[:, None, None].expand_as(at).long())
    return marks.bool()[..., None]


def _shared(age: Tensor) -> tuple[Tensor, Tensor]:  # (B, L, H, T, 1) -> (B, L, H, T), (B, T)
    """The places in every head of the tokens of the first one, and which of these tokens all heads hold."""
    ordered, order = age.squeeze(-1).sort(-1)
    wanted = age[:, :1, :1, :, 0].expand_as(order).contiguous()
    place = torch.searchsorted(ordered, wanted).clamp_max(age.shape[-2] - 1)
    shared = (ordered.gather(-1, place) == wanted).all(2).all(1) & (wanted[:, 0, 0] != NEVER)
    return order.gather(-1, place), shared


def _repeated(key: Tensor, at: Tensor, age: Tensor, shared: Tensor, far: int) -> Tensor:  # -> (B, T)
    """The cosine to the most similar token that came more than `far` tokens later, -1 to 1, in the mean over heads."""
    later = (age[:, None] < age[:, :, None] - far) & shared[:, None]  # (B, T, T)
    real, total = shared[:, None, :, None], 0
    for of_layer, places in zip(key.unbind(1), at.unbind(1), strict=True):  # one layer at a time: T * T is large
        k = of_layer.take_along_dim(places[..., None], -2)  # (B, H, T, D)
        mean = (k * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp_min(1)
        k = torch.nn.functional.normalize(k - mean, dim=-1)
        total = total + (k @ k.mT).masked_fill_(~later[:, None], -1).amax(-1).mean(1)
    return total / key.shape[1]
