"""Slots that keep single tokens as they are: the latest, and those at and after what surprised the reader most."""

import torch
from torch import Tensor

KEPT = ("kept_key", "kept_value", "kept_trace", "kept_age")  # the token axis of each is the last but one
NEVER = 2**31  # the age of a slot that holds nothing yet
# Chosen on the validation packages of examples/research/documents/code_curve.py with the embedded base: other text may want others.
MOST_SURPRISAL = 4.0  # nats; beyond, the younger token is worth more, not the stranger one
TRACE = 8  # tokens over which a surprise is felt, half as much at each
FORGETTING = 0.005  # nats of surprisal that a token loses per token read after it
LATEST = 0.25  # share of the slots that hold the latest tokens whatever their surprisal


def trace(surprisal: Tensor) -> Tensor:  # (B, C) in nats -> (B, C)
    """What is left at a token of the surprises up to it: `sum_j 2^-(j + 1) min(surprisal[t - j], 4)`, j = 0..7.

    The tokens right after a surprise are needed to copy what followed it, though they surprise little themselves. A
    chunk begins with no trace of the one before.
    """
    before = torch.nn.functional.pad(surprisal.clamp_max(MOST_SURPRISAL), (TRACE - 1, 0))
    weights = 0.5 ** torch.arange(TRACE, 0, -1, device=surprisal.device, dtype=surprisal.dtype)
    return (before.unfold(-1, TRACE, 1) * weights).sum(-1)


def keep_tokens(tokens: dict[str, Tensor], num_kept: int) -> dict[str, Tensor]:
    """The K tokens worth keeping, the oldest first: the latest K / 4, and of the others those of the highest

        trace of the surprisal - 0.005 age

    A token that was predicted, among others that were, tells a query little that the base does not know, and takes
    attention from those that do. All tokens age alike, so choosing among the chosen of two texts is choosing among all
    of their tokens.

    Args:
        tokens: `kept_key`, `kept_value` (B, L, H, T, D), keys at position 0; `kept_trace` (B, 1, 1, T, 1) in
            nats; `kept_age` (B, 1, 1, T, 1), real tokens after this one, `NEVER` for no token at all; T >= K.
        num_kept: K.
    """
    age = tokens["kept_age"]
    score = tokens["kept_trace"] - FORGETTING * age
    score = torch.where(age < LATEST * num_kept, torch.inf, score)
    chosen = score.topk(num_kept, -2).indices  # (B, 1, 1, K, 1)
    oldest_first = age.take_along_dim(chosen, -2).argsort(dim=-2, descending=True, stable=True)
    chosen = chosen.take_along_dim(oldest_first, -2)
    return {name: t.take_along_dim(chosen, -2) for name, t in tokens.items()}


def followed_by(kept: dict[str, Tensor], later: dict[str, Tensor], num_later: Tensor) -> dict[str, Tensor]:
    """What K slots keep of a text and of `num_later` (B,) tokens read after it, of which `later` is what they keep."""
    age = kept["kept_age"]
    aged = kept | {"kept_age": (age + num_later.view(-1, 1, 1, 1, 1)).where(age < NEVER, NEVER)}
    return keep_tokens({name: torch.cat([aged[name], later[name]], -2) for name in KEPT}, age.shape[-2])
