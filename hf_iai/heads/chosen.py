"""Slots that hold single tokens, chosen for each layer and head.

Axes: B tasks, L layers, H key/value heads, T tokens, K slots, D head width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .kept import FORGETTING, NEVER
from .novelty import unrepeated

# The token axis of each is the last but one. Keys are at position 0. `age` is the number of real tokens after a token,
# or `NEVER` for an empty slot. What `worth` means depends on the rule.
CHOSEN = ("key", "value", "worth", "age")
LATEST = 0.5  # share of the slots that always hold the latest tokens
NOVEL = 0.25  # share that holds what nothing later repeats, with the rule "novelty"


def by_attention(worth: Tensor, age: Tensor) -> Tensor:
    """The mean attention that a token has received from itself and the tokens after it; `worth` is the sum.

    Source: H2O, Zhang et al., arXiv 2306.14048, section 4.
    """
    return worth / (age + 1)


def by_worth(worth: Tensor, age: Tensor) -> Tensor:
    """`worth` itself: for chunks that were read apart, the mean attention from the tokens of the same chunk."""
    return worth


def by_surprisal(worth: Tensor, age: Tensor) -> Tensor:
    """The trace of the surprisal, `heads.kept.trace`, less what a token loses by age; `worth` is the trace."""
    return worth - FORGETTING * age


def by_age(worth: Tensor, age: Tensor) -> Tensor:
    """The latest tokens; `worth` is not used."""
    return -age.float()


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "attention": by_attention,
    "surprisal": by_surprisal,
    "recent": by_age,
    "novelty": by_attention,  # for the slots that are left
    "worth": by_worth,
}


def choose_tokens(tokens: dict[str, Tensor], num_slots: int, rule: str) -> dict[str, Tensor]:
    """Choose the K tokens to keep: the first one read, the latest K / 2, and those that the rule ranks highest.

    Most models attend to the first token wherever else they have nothing to attend to, so it is never dropped. The rule
    "novelty" keeps K / 4 tokens that nothing later repeats (`heads.novelty`) before it ranks the others by attention.

    Args:
        tokens: `key` and `value` (B, L, H, T, D), `worth` and `age` (B, L, H, T, 1), with T at least K.
        num_slots: K.
        rule: a key of `RULES`.

    Returns:
        The same tensors with T = K, empty slots first, then the oldest token.

    Example:
        >>> import torch
        >>> age = torch.arange(5, -1, -1).view(1, 1, 1, 6, 1)
        >>> worth = torch.tensor([0.0, 1, 9, 2, 0, 0]).view(1, 1, 1, 6, 1)
        >>> tokens = {"key": age.float(), "value": age.float(), "worth": worth, "age": age}
        >>> choose_tokens(tokens, 4, "attention")["age"].flatten().tolist()
        [5, 3, 1, 0]
    """
    age, empty = tokens["age"], tokens["age"] == NEVER
    score = RULES[rule](tokens["worth"], age)
    oldest = age.masked_fill(empty, -1).amax(-2, keepdim=True)
    sure = (age < LATEST * num_slots) | (age == oldest)
    if rule == "novelty":
        sure = sure | unrepeated(tokens, int(NOVEL * num_slots), math.ceil(LATEST * num_slots))
    score = score.masked_fill(sure, torch.inf).masked_fill(empty, -torch.inf)
    chosen = score.topk(num_slots, -2).indices  # (B, L, H, K, 1)
    oldest_first = age.take_along_dim(chosen, -2).argsort(dim=-2, descending=True, stable=True)
    chosen = chosen.take_along_dim(oldest_first, -2)
    return {name: tokens[name].take_along_dim(chosen, -2) for name in CHOSEN}


def with_later(kept: dict[str, Tensor], later: dict[str, Tensor], num_later: Tensor, rule: str) -> dict[str, Tensor]:
    """The tokens to keep of a text and a text after it.

    Args:
        kept: K tokens of the earlier text.
        later: tokens of the later text.
        num_later: number of tokens of the later text, (B,).
        rule: a key of `RULES`.
    """
    age = kept["age"]
    aged = kept | {"age": (age + num_later.view(-1, 1, 1, 1, 1)).where(age < NEVER, NEVER)}
    both = {name: torch.cat([aged[name], later[name]], -2) for name in CHOSEN}
    return choose_tokens(both, age.shape[-2], rule)
